from __future__ import annotations

import pytest
from torch import nn

from unit.engine.small import Block, Net, make, on_ranks
from zeroshard import UsageError, zero
from zeroshard.core.leaves import marked


@pytest.mark.parametrize("name", [Block, "Block", f"{Block.__module__}.Block"])
def test_modules_are_marked_by_class_or_by_either_of_its_names(name: type | str) -> None:
    model = Net()
    assert zero.set_z3_leaf_modules(model, [name]) == list(model.blocks)
    assert marked(model) == list(model.blocks) == zero.get_z3_leaf_modules(model)
    assert zero.z3_leaf_module(model.blocks[0])
    assert not zero.z3_leaf_module(model.head)
    assert zero.z3_leaf_parameter(model.blocks[0].up.weight)
    assert not zero.z3_leaf_parameter(model.head.weight)
    assert zero.unset_z3_leaf_modules(model, [name]) == list(model.blocks)
    assert marked(model) == []


def test_subclasses_of_a_class_are_marked_too() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(1, 1), nn.Tanh())
    assert zero.set_z3_leaf_modules(model, [nn.Linear]) == [model[0]]


def test_a_class_that_the_model_lacks_is_named_with_those_it_has() -> None:
    model = Net()
    with pytest.raises(UsageError, match=r"class Stone\.(.|\n)*hint: it has Block, Linear"):
        zero.set_z3_leaf_modules(model, ["Stone"])
    assert zero.set_z3_leaf_modules(model, [nn.Conv2d], raise_if_not_found=False) == []
    with pytest.raises(UsageError, match="class Conv2d"):
        zero.unset_z3_leaf_modules(model, [nn.Conv2d])


def test_an_object_in_place_of_a_class_is_refused() -> None:
    model = Net()
    with pytest.raises(UsageError, match=r"by their classes, not by Block"):
        zero.set_z3_leaf_modules(model, [model.blocks[0]])  # type: ignore[list-item]


def test_modules_are_marked_by_name_and_by_suffix() -> None:
    model = Net()
    found, missing = zero.set_z3_leaf_modules_by_name(
        model, ["blocks.1", "nothing"], raise_if_not_found=False
    )
    assert (found, missing) == ([model.blocks[1]], ["nothing"])
    found, missing = zero.set_z3_leaf_modules_by_suffix(model, ["up"])
    assert (found, missing) == ([block.up for block in model.blocks], [])
    with pytest.raises(UsageError, match=r"name nothing\.(.|\n)*blocks\.0\.up"):
        zero.set_z3_leaf_modules_by_name(model, ["nothing"])


def test_a_container_is_never_called_and_cannot_be_marked() -> None:
    with pytest.raises(UsageError, match=r"ModuleList cannot be a leaf(.|\n)*inside it"):
        zero.set_z3_leaf_modules_by_name(Net(), ["blocks"])


@on_ranks(2, (0, 3))
def test_marks_after_initialize_come_too_late(stage: int) -> None:
    engine = make(stage)
    with pytest.raises(UsageError, match=r"Block was made a leaf(.|\n)*before initialize"):
        zero.set_z3_leaf_modules(engine.module, [Block])
