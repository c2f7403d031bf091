"""What would train wrong in silence, and is refused, or is as in plain PyTorch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import zeroshard
from unit.engine.small import (
    STAGES,
    Block,
    Bomb,
    InjectedError,
    Net,
    assert_equal_weights,
    batch,
    loss_of,
    make,
    on_ranks,
    train,
    weights_of,
)
from zeroshard import DistributedError, UsageError

FREED = r"blocks\.0\.up\.weight was read while its unit is freed"


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (Spectral, r"0\.weight is complex"),
        (lambda: nn.Embedding(3, 4, max_norm=1.0), r"0 is an embedding with max_norm"),
        (lambda: nn.EmbeddingBag(3, 4, max_norm=1.0), r"0 is an embedding with max_norm"),
    ],
    ids=["complex", "embedding", "embedding_bag"],
)
@on_ranks(1)
def test_layers_that_cannot_be_trained_right_are_refused(layer: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text + r"(.|\n)*hint: "):
        make(1, nn.Sequential(layer()))


@pytest.mark.parametrize(
    "read",
    [
        lambda p: p.data.sum(),
        lambda p: p.data.clamp_(-1, 1),
        lambda p: p.detach() + 1,
        lambda p: p.T,
        lambda p: p.cpu().numpy(),
        lambda p: p.data.float(),
        lambda p: p.tolist(),
        lambda p: setattr(p, "data", torch.ones(6, 4)),
    ],
    ids=["data", "edit_of_data", "detach", "transpose", "cpu", "cast", "tolist", "new_data"],
)
@on_ranks(2)
def test_no_way_to_read_or_edit_a_freed_parameter_is_silent(read: Any) -> None:
    engine = make(3)
    with pytest.raises(UsageError, match=FREED):
        read(engine.module.blocks[0].up.weight)


@on_ranks(2)
def test_what_says_nothing_of_the_values_may_be_asked_of_a_freed_parameter() -> None:
    param = make(3).module.blocks[0].up.weight
    assert param.shape == (0,)
    assert (param.dtype, param.device.type, param.requires_grad) == (torch.float32, "cpu", True)
    assert param.grad is None
    assert param.is_leaf
    assert "Parameter" in repr(param)


@on_ranks(2)
def test_moving_a_model_to_where_it_is_changes_nothing() -> None:
    engine = make(3)
    before = weights_of(engine)
    engine.to("cpu")
    assert_equal_weights(weights_of(engine), before)
    train(engine, steps=1)


@on_ranks(2, STAGES)
def test_what_is_kept_from_inside_gathered_may_be_read_later(stage: int) -> None:
    engine = make(stage)
    want = weights_of(engine)
    with zeroshard.gathered(engine.module):
        state = engine.module.state_dict()
        view = engine.module.head.weight.detach()
        written = io.BytesIO()
    train(engine, steps=0)
    torch.save(state, written)
    written.seek(0)
    assert_equal_weights(torch.load(written), want)
    assert torch.equal(view, want["head.weight"])
    train(engine, steps=2)  # the engine goes on in memory of its own
    if not engine.runtime.units[0].lifetime.params_stay:
        assert_equal_weights(state, want)
        assert not any(unit.is_full for unit in engine.runtime.units)
    assert not torch.equal(weights_of(engine)["head.weight"], want["head.weight"])


@on_ranks(2, STAGES)
def test_arrays_of_numpy_may_be_made_inside_gathered_and_kept(stage: int) -> None:
    engine, other = make(stage), make(stage)
    want = weights_of(engine)["head.weight"]
    with zeroshard.gathered(engine.module):
        kept = engine.module.head.weight.detach().numpy()
        engine.module.blocks[0].up.weight.detach().numpy()  # and dropped
    assert torch.equal(torch.from_numpy(kept.copy()), want)
    train(engine)
    train(other)
    assert_equal_weights(weights_of(engine), weights_of(other))


@on_ranks(2, STAGES)
def test_the_model_may_run_inside_gathered(stage: int) -> None:
    engine, other = make(stage), make(stage)
    with zeroshard.gathered(engine.module):
        before = engine.module.head.weight.sum()
        loss = loss_of(engine)
        assert torch.equal(engine.module.head.weight.sum(), before)
        engine.backward(loss)
        assert torch.equal(engine.module.head.weight.sum(), before)
    engine.step()
    train(other, steps=1)
    assert_equal_weights(weights_of(engine), weights_of(other))


@on_ranks(2, STAGES)
def test_a_step_inside_gathered_shows_the_new_weights(stage: int) -> None:
    engine = make(stage)
    with zeroshard.gathered(engine.module):
        before = engine.module.head.weight.detach().clone()
        train(engine, steps=1)
        inside = engine.module.head.weight.detach().clone()
    assert not torch.equal(inside, before)
    assert torch.equal(weights_of(engine)["head.weight"], inside)


@on_ranks(2, STAGES)
def test_a_graph_from_before_a_step_is_refused_after_it(stage: int) -> None:
    engine = make(stage)
    old = loss_of(engine)
    train(engine, steps=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.backward(old)
    train(engine, steps=1)


@on_ranks(2)
def test_weights_cannot_be_gathered_without_the_ranks_that_hold_them() -> None:
    engine = make(3)
    dist.destroy_process_group()
    engine.destroy()
    with (
        pytest.raises(UsageError, match=r"engine was destroyed(.|\n)*before engine\.destroy\(\)"),
        zeroshard.gathered(engine.module),
    ):
        pass


@on_ranks(2, STAGES)
def test_a_backward_that_fails_before_it_reaches_the_model_ends_it_on_all_ranks(
    stage: int,
) -> None:
    engine, other = make(stage), make(stage)
    train(engine, steps=1)
    fails = dist.get_rank() == 0
    loss = (engine(batch(1)) - 1).square().mean()
    with pytest.raises(InjectedError if fails else DistributedError):
        loss = Bomb.apply(loss) if fails else loss
        engine.backward(loss)
    engine.reset()
    engine.backward(loss_of(engine, 1))
    engine.step()
    train(other)
    assert_equal_weights(weights_of(engine), weights_of(other))


@on_ranks(2, STAGES)
def test_arguments_arrive_as_the_very_objects_that_were_passed(stage: int) -> None:
    seen: list[Any] = []

    class Remembers(Net):
        def forward(self, x: Tensor, more: dict[str, Any]) -> Tensor:
            seen.append((x, more, more["list"]))
            more["answer"] = super().forward(x)
            return more["answer"]

    engine = make(stage, Remembers())
    x = batch(0) * torch.ones((), requires_grad=True)
    more: dict[str, Any] = {"list": [1, x]}
    engine.backward(engine(x, more).square().mean())
    assert seen[0][0] is x
    assert seen[0][1] is more
    assert seen[0][2] is more["list"]
    assert more["answer"].requires_grad


@on_ranks(2)
def test_an_edit_of_one_rank_is_found_after_any_number_of_edits_of_all() -> None:
    engine = make(1, nn.Sequential(*(Block() for _ in range(70))))
    engine.backward(engine(torch.ones(2, 4)).mean())
    with torch.no_grad():
        for number, block in enumerate(engine.module):
            if number < 69 or dist.get_rank():
                block.up.bias.add_(1)
    said = pytest.raises(UsageError, match=r"69\.up\.weight .* edited on rank 1 and not on rank 0")
    with said:
        engine.step()


@on_ranks(1)
def test_a_parameter_that_joins_the_model_late_is_found_after_a_resume_too(tmp_path: Path) -> None:
    first, engine = make(), make()
    train(first, steps=4)
    first.save_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path)
    engine.module.late = nn.Linear(2, 2)
    engine.backward(loss_of(engine))
    with pytest.raises(UsageError, match=r"late\.weight was added to the model"):
        engine.step()
