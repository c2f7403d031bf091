from __future__ import annotations

import gc
import weakref

from torch import nn

from zeroshard.core.leaves import holds, is_marked, mark, marked, unmark


def nest() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))


def test_of_marked_modules_inside_each_other_the_outermost_counts() -> None:
    model = nest()
    mark(model[0])
    mark(model[1])
    mark(model[1][0])
    assert marked(model) == [model[0], model[1]]
    unmark(model[1])
    assert marked(model) == [model[0], model[1][0]]


def test_a_mark_concerns_one_model_only() -> None:
    model = nest()
    mark(model[1])
    assert marked(nest()) == []
    assert not is_marked(nest()[1])
    assert holds(model[1][0].weight)
    assert not holds(model[0].weight)


def test_a_mark_keeps_no_module_alive() -> None:
    model = nest()
    mark(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
