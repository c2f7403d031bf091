"""Parameters that wait for an engine: who may read them, when, and what becomes of edits."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import zeroshard
from forked import run_ranks
from zeroshard import UsageError
from zeroshard.core import collectives, transport
from zeroshard.core.slots import slot_of

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 5)
        self.third = nn.Linear(5, 3, bias=False)


def build() -> Net:
    """A model whose values are those of rank 0: seed 0."""
    torch.manual_seed(dist.get_rank())
    with zeroshard.zero.Init():
        return Net()


def plain() -> Net:
    torch.manual_seed(0)
    return Net()


def is_full(param: Tensor) -> bool:
    slot = slot_of(param)
    assert slot is not None
    return slot.unit.is_full


def full(model: nn.Module) -> dict[str, Tensor]:
    with zeroshard.gathered(model):
        return {name: param.detach().clone() for name, param in model.named_parameters()}


def on_ranks(work: Callable[[int], Any], world: int = 2) -> list[Any]:
    return run_ranks(lambda rank, _: work(rank), world)


def test_a_read_without_gradients_by_all_ranks_has_the_values() -> None:
    def work(rank: int) -> None:
        model, wanted = build(), plain()
        assert model.first.weight.shape == model.first.weight.data.shape == (0,)
        with torch.no_grad():
            assert model.first.weight.shape == model.first.weight.data.shape == (5, 6)
            assert (len(model.first.weight), model.first.bias.numel()) == (5, 5)
            assert not is_full(model.first.weight)
            assert torch.equal(model.first.weight + 1, wanted.first.weight + 1)
            assert torch.equal(model.second.bias.data * 2, wanted.second.bias * 2)
            assert torch.equal(model.third.weight.detach()[1], wanted.third.weight[1])
            assert torch.equal(model.third(torch.ones(5)), wanted.third(torch.ones(5)))

    on_ranks(work)


def test_a_state_dict_may_be_read_by_all_ranks_with_gradients_on() -> None:
    def work(rank: int) -> None:
        model, wanted = build(), plain().state_dict()
        with pytest.raises(UsageError, match="was read while"):
            model.first.weight * 2
        for name, value in model.state_dict().items():
            assert value.cpu().numpy().tolist() == wanted[name].tolist()
            assert torch.equal(value.to(torch.float64), wanted[name].double())

    on_ranks(work)


@pytest.mark.parametrize("world", [2, 3])
def test_edits_by_all_ranks_last_with_the_values_of_rank_0(world: int) -> None:
    def work(rank: int) -> None:
        model = build()
        torch.manual_seed(rank)
        with torch.no_grad():
            nn.init.normal_(model.first.weight)
            model.first.bias.data.fill_(rank + 7)
            nn.init.zeros_(model.second.weight[2])
        torch.manual_seed(0)
        wanted = torch.empty(5, 6).normal_()
        got = full(model)
        assert torch.equal(got["first.weight"], wanted)
        assert torch.equal(got["first.bias"], torch.full((5,), 7.0))
        row = plain().second.weight.detach()
        row[2] = 0
        assert torch.equal(got["second.weight"], row)

    on_ranks(work, world)


def test_one_unit_is_full_besides_those_whose_memory_is_in_use() -> None:
    def work(rank: int) -> None:
        model = build()
        with torch.no_grad():
            model.first.weight.sum()
            assert is_full(model.first.bias)
            model.second.weight.sum()
            assert not is_full(model.first.bias)
            kept = model.second.weight.view(-1) if rank else None  # on one rank alone
            model.third.weight.sum()
            assert is_full(model.second.weight)
            del kept
            model.first.weight.sum()
            assert not is_full(model.second.weight)
            with zeroshard.gathered(model.third):
                assert not is_full(model.first.weight)

    on_ranks(work)


def test_a_collective_that_lets_go_late_hides_no_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """As threads of gloo's do that have no turn on a busy host."""
    users: list[threading.Timer] = []

    class Late:
        def __init__(self, full: Tensor, ticket: collectives.Ticket) -> None:
            self._views, self._ticket = [full.view(-1)], ticket

        def wait(self) -> None:
            self._ticket.wait()
            users.append(threading.Timer(0.02, self._views.clear))
            users[-1].start()

    def work(rank: int) -> None:
        model = build()
        real = collectives.all_gather
        monkeypatch.setattr(
            transport, "all_gather", lambda full, *rest: Late(full, real(full, *rest))
        )
        with zeroshard.gathered(model.first):
            kept = model.first.bias.detach()
            users[-1].join()
        assert torch.equal(kept, plain().first.bias)
        with torch.no_grad():
            view = model.second.weight.view(-1)
            users[-1].join()
            model.third.weight.sum()
            assert is_full(model.second.weight)
            del view

    on_ranks(work)


def test_an_edit_through_a_view_that_is_kept_for_long_lasts() -> None:
    def work(rank: int) -> None:
        model = build()
        with torch.no_grad():
            view = model.first.weight[0]
            model.second.weight.sum()
            view.fill_(5)
            del view
        engine = zeroshard.initialize(model=model, config=CONFIG)[0]
        assert torch.equal(full(engine.module)["first.weight"][0], torch.full((6,), 5.0))

    on_ranks(work)


@pytest.mark.parametrize("modifier", [0, 1])
def test_what_the_modifier_alone_reads_in_its_block_is_gathered_with_the_help_of_the_others(
    modifier: int,
) -> None:
    def work(rank: int) -> None:
        model = build()
        with torch.no_grad(), zeroshard.gathered(model.first, modifier_rank=modifier):
            if rank == modifier:
                model.first.bias.fill_(1)
                model.second.weight.fill_(model.third.weight.sum().item())
                model.third.weight.data[0] = 4
                with zeroshard.gathered(model.second, modifier_rank=modifier):
                    model.second.bias.fill_(3)
        got, wanted = full(model), plain()
        assert torch.equal(got["first.weight"], wanted.first.weight)
        assert torch.equal(got["first.bias"], torch.ones(5))
        total = torch.full((5, 5), wanted.third.weight.sum().item())
        assert torch.equal(got["second.weight"], total)
        assert torch.equal(got["second.bias"], torch.full((5,), 3.0))
        assert torch.equal(got["third.weight"][0], torch.full((5,), 4.0))
        assert torch.equal(got["third.weight"][1:], wanted.third.weight[1:])
        assert not any(is_full(param) for param in model.parameters())

    on_ranks(work, 3)


def test_ranks_whose_values_are_not_kept_may_have_none() -> None:
    def work(rank: int) -> None:
        model = build()
        with torch.no_grad():
            weight: Any = model.first.weight
            assert weight.copy_(torch.ones(5, 6) if rank == 0 else None) is weight
            with zeroshard.gathered(model.second, modifier_rank=1):
                if rank == 1:
                    model.third.weight.copy_(torch.full((3, 5), 2.0))
            if rank == 0:
                with pytest.raises(TypeError):
                    model.third.weight.copy_(None)  # type: ignore[arg-type]
            else:
                model.third.weight.copy_(torch.zeros(3, 5))
        got = full(model)
        assert torch.equal(got["first.weight"], torch.ones(5, 6))
        assert torch.equal(got["third.weight"], torch.full((3, 5), 2.0))

    on_ranks(work)


def test_ranks_that_want_different_things_are_all_told_what_each_one_wants() -> None:
    def alone(rank: int) -> None:
        model = build()
        with pytest.raises(UsageError) as caught, torch.no_grad():
            if rank == 1:
                model.second.weight.sum()
            zeroshard.initialize(model=model, config=CONFIG)
        assert "rank 0: call initialize(); rank 1: read Linear#2.weight" in str(caught.value)
        assert "zeroshard.gathered" in str(caught.value)

    def another(rank: int) -> None:
        model = build()
        said = pytest.raises(UsageError, match=r"rank 0: read Linear#1.*rank 1: read Linear#3")
        with said, torch.no_grad():
            (model.third if rank else model.first).weight.sum()

    def other_units(rank: int) -> None:
        model = build()
        said = pytest.raises(UsageError, match="do different things")
        with said, zeroshard.gathered(model.third if rank else model.first):
            pass

    def not_the_modifier(rank: int) -> None:
        model = build()
        said = pytest.raises(UsageError, match=r"rank 0: leave gathered.*rank 1: read Linear#2")
        with said, torch.no_grad(), zeroshard.gathered(model.first, modifier_rank=0):
            if rank == 1:
                model.second.weight.sum()

    for work in (alone, another, other_units, not_the_modifier):
        on_ranks(work)


def test_two_parameters_are_compared_in_their_shards() -> None:
    def work(rank: int) -> None:
        torch.manual_seed(rank)
        with zeroshard.zero.Init():
            one, same, other = nn.Linear(5, 7), nn.Linear(5, 7, bias=False), nn.Linear(5, 7)
        last = nn.Linear(5, 7)
        with torch.no_grad(), zeroshard.gathered([one, same, other], modifier_rank=0):
            same.weight.copy_(one.weight)
            other.weight.copy_(one.weight)
            last.weight.copy_(one.weight)
            other.weight[6, 4] += 1
        assert torch.equal(one.weight, one.weight)
        assert torch.equal(one.weight, same.weight)
        assert torch.equal(one.weight, last.weight)
        assert not torch.equal(one.weight, other.weight)
        assert not torch.equal(last.weight, other.weight.data)
        assert not torch.equal(one.weight, one.bias)
        assert not any(is_full(each.weight) for each in (one, same, other))

    on_ranks(work, 3)


def test_a_state_dict_shows_names_and_has_values_while_they_are_gathered() -> None:
    def work(rank: int) -> None:
        model, wanted = build(), plain().state_dict()
        state = model.state_dict()
        assert list(state) == list(wanted)
        assert all(each.shape == (0,) and each.dtype == torch.float32 for each in state.values())
        assert not any(is_full(param) for param in model.parameters())
        with pytest.raises(UsageError, match="was read while"):
            copy.deepcopy(state)
        with zeroshard.gathered(model):
            copied = copy.deepcopy(state)
            assert all(torch.equal(state[name], value) for name, value in wanted.items())
        assert all(torch.equal(copied[name], value) for name, value in wanted.items())

    on_ranks(work)


def test_a_bias_is_fitted_to_weights_of_no_shape() -> None:
    def work(rank: int) -> None:
        model = build()
        bias, missing = model.first.bias, model.first.weight.shape[0] - model.first.bias.shape[0]
        bias.data = functional.pad(bias.data, (0, missing), "constant", 0)
        assert torch.equal(full(model)["first.bias"], plain().first.bias)
        with pytest.raises(UsageError, match="was read while"):
            functional.pad(bias, (0, 1))

    on_ranks(work)


def test_data_that_is_replaced_in_a_block_is_kept_if_it_fits() -> None:
    def work(rank: int) -> None:
        model = build()
        with zeroshard.gathered(model.first, modifier_rank=0):
            model.first.bias.data = torch.arange(5.0) + rank
        assert torch.equal(full(model)["first.bias"], torch.arange(5.0))
        said = pytest.raises(UsageError, match=r"data was replaced .* shape \(4,\)")
        with said, zeroshard.gathered(model.first, modifier_rank=0):
            model.first.bias.data = torch.ones(4)

    on_ranks(work)
