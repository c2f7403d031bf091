"""Named streams of random numbers, and states that a recomputation finds again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from zeroshard import UsageError, checkpointing
from zeroshard.checkpointing import process
from zeroshard.checkpointing.rng import MODEL_PARALLEL, RandomStates, RngTracker


@pytest.fixture(autouse=True)
def _a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_process", process._Process())


def numbers() -> Tensor:
    return torch.rand(4)


def numbers_from(seed: int) -> Tensor:
    return torch.rand(4, generator=torch.Generator().manual_seed(seed))


def test_a_stream_starts_from_its_seed_and_goes_on_where_it_was() -> None:
    tracker = RngTracker()
    tracker.add("a", 5)
    drawn = []
    for _ in range(2):
        with tracker.fork("a"):
            drawn.append(numbers())
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(drawn[0], torch.rand(4, generator=generator))
    assert torch.equal(drawn[1], torch.rand(4, generator=generator))


def test_streams_leave_the_usual_numbers_alone() -> None:
    torch.manual_seed(1)
    want = [numbers(), numbers()]
    torch.manual_seed(1)
    tracker = RngTracker()
    got = [numbers()]
    tracker.add("a", 5)
    with pytest.raises(KeyError), tracker.fork("a"):
        numbers()
        raise KeyError
    got.append(numbers())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_saved_states_continue_a_stream() -> None:
    tracker = RngTracker()
    tracker.add("a", 5)
    saved = tracker.get_states()
    with tracker.fork("a"):
        want = numbers()
    other = RngTracker()
    other.set_states(saved)
    with other.fork("a"):
        assert torch.equal(numbers(), want)


def test_names_and_seeds_are_taken_once_until_a_reset() -> None:
    tracker = RngTracker()
    tracker.add("a", 5)
    with pytest.raises(UsageError, match='a stream "a" already'):
        tracker.add("a", 6)
    with pytest.raises(UsageError, match="seed 5 belongs to another stream"):
        tracker.add("b", 5)
    assert list(tracker.get_states()) == ["a"]
    tracker.reset()
    tracker.add("b", 5)
    assert list(tracker.get_states()) == ["b"]


def test_an_unknown_stream_is_an_error_that_names_the_known_ones() -> None:
    tracker = RngTracker()
    tracker.add("dropout", 5)
    with pytest.raises(UsageError, match=r"no stream \"drop\"; it has \['dropout'\]"):
        tracker.fork("drop").__enter__()


@pytest.mark.parametrize("rank", [0, 3])
def test_seeding_gives_equal_numbers_outside_and_different_ones_inside(rank: int) -> None:
    mpu = SimpleNamespace(
        get_model_parallel_world_size=lambda: 4,
        get_model_parallel_rank=lambda: rank,
        get_model_parallel_group=lambda: None,
    )
    checkpointing.configure(mpu)
    checkpointing.model_parallel_cuda_manual_seed(100)
    assert torch.equal(numbers(), numbers_from(100))
    with checkpointing.get_cuda_rng_tracker().fork():
        assert torch.equal(numbers(), numbers_from(100 + 2718 + rank))
    checkpointing.model_parallel_cuda_manual_seed(200)  # starts all over
    assert list(checkpointing.get_cuda_rng_tracker().get_states()) == [MODEL_PARALLEL]


def test_reseeding_the_stream_leaves_the_usual_numbers_alone() -> None:
    checkpointing.model_parallel_cuda_manual_seed(100)
    checkpointing.model_parallel_reconfigure_tp_seed(300)
    assert torch.equal(numbers(), numbers_from(100))
    with checkpointing.get_cuda_rng_tracker().fork():
        assert torch.equal(numbers(), numbers_from(300 + 2718))


def test_restored_states_repeat_the_usual_numbers_and_those_of_streams() -> None:
    tracker = RngTracker()
    tracker.add("a", 5)

    def draw() -> list[Tensor]:
        usual = numbers()
        with tracker.fork("a"):
            return [usual, numbers(), numbers()]

    then = RandomStates.now(tracker, [torch.device("cpu")])
    want = draw()
    now = RandomStates.now(tracker, [])
    for _ in range(2):
        with then.restored():
            assert all(torch.equal(a, b) for a, b in zip(draw(), want, strict=True))
    after = draw()
    now.apply()
    assert all(torch.equal(a, b) for a, b in zip(after, draw(), strict=True))
