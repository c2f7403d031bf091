"""Agreed windows: their arithmetic, and whole schedules on simulated ranks.

The simulation runs one thread for each rank. Units are fakes whose collectives really wait for the
other ranks, so a schedule that issues them in another order, or not at all, is caught in the act. A
deadlock is noticed the moment it arises: all threads wait and nothing any of them waits for holds.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest import mock

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from zeroshard.core import schedule as schedule_module
from zeroshard.core.lifetime import STAGES, Lifetime
from zeroshard.core.schedule import END, Limits, Op, Schedule, common_window, look_ahead, mirror
from zeroshard.errors import DistributedError

WINDOW = 64


def gather(unit: int) -> Op:
    return Op("gather", unit)


def reduce(unit: int) -> Op:
    return Op("reduce", unit)


# Windows ----------------------------------------------------------------------------------------

units = st.integers(0, 4)
ops = st.builds(Op, st.sampled_from(("gather", "reduce")), units)
wishes = st.lists(ops, max_size=6).map(lambda wish: [*wish, END])


@st.composite
def wishes_of_ranks(draw: st.DrawFn) -> list[list[Op]]:
    """One wish for each rank; ranks often begin alike."""
    shared = draw(st.lists(ops, max_size=4))
    return [
        shared[: draw(st.integers(0, 4))] + draw(wishes) for _ in range(draw(st.integers(1, 4)))
    ]


def common_start(ranks: list[list[Op]]) -> list[Op]:
    return [
        column[0]
        for column in takewhile(lambda column: len({*column}) == 1, zip(*ranks, strict=False))
    ]


@given(wishes_of_ranks())
def test_what_all_ranks_wish_first_is_issued_in_that_order(ranks: list[list[Op]]) -> None:
    common = common_start(ranks)
    assume(common)
    assert common_window(ranks) == common


@given(wishes_of_ranks())
def test_ranks_that_differ_at_once_each_get_the_gather_they_wait_for(ranks: list[list[Op]]) -> None:
    assume(not common_start(ranks))
    window = common_window(ranks)
    heads = {wish[0] for wish in ranks} - {END}
    gathers = {op for op in heads if op.kind == "gather"}
    assert set(window) == (gathers or heads)
    assert len(window) == len(set(window)) > 0


@given(wishes_of_ranks(), st.randoms(use_true_random=False))
def test_a_window_does_not_depend_on_who_wishes_what(ranks: list[list[Op]], random: Any) -> None:
    shuffled = random.sample(ranks, len(ranks))
    assert common_window(shuffled) == common_window(ranks)


@given(wishes_of_ranks())
def test_agreeing_again_and_again_fulfils_every_wish_of_every_rank(ranks: list[list[Op]]) -> None:
    rounds_at_most = sum(map(len, ranks)) + 1
    left = [list(wish) for wish in ranks]
    for _ in range(rounds_at_most):
        window = common_window(left)
        assert window, "a round without an operation would repeat for ever"
        for op in window:
            for wish in left:
                if wish[0] == op:
                    del wish[0]
        left = [wish or [END] for wish in left]
        if END in window:
            break
    assert left == [[END]] * len(ranks)


def test_nobody_goes_on_before_all_are_at_the_end() -> None:
    assert common_window([[END], [END]]) == [END]
    assert common_window([[END], [reduce(1), END]]) == [reduce(1)]


def test_ranks_without_any_wish_agree_on_nothing() -> None:
    assert common_window([[], []]) == []


# Looking ahead ----------------------------------------------------------------------------------

NUM_UNITS = 5
sizes = st.lists(st.integers(0, 9), min_size=NUM_UNITS, max_size=NUM_UNITS).map(
    lambda all_sizes: dict(enumerate(all_sizes))
)
budgets = st.one_of(st.none(), st.integers(0, 20))
events = st.lists(ops, max_size=12)
ahead = st.lists(units, max_size=3, unique=True)


@given(events, sizes, ahead, budgets)
def test_every_gather_is_issued_once_unless_it_is_ahead_already(
    due: list[Op], size_of: dict[int, int], early: list[int], budget: int | None
) -> None:
    issued = Counter(op.unit for op in look_ahead(due, size_of, early, budget) if op[0] == "gather")
    wanted = Counter(op.unit for op in due if op.kind == "gather")
    assert issued == wanted - Counter(early)


@given(events, sizes, ahead, budgets)
def test_reductions_keep_their_order(
    due: list[Op], size_of: dict[int, int], early: list[int], budget: int | None
) -> None:
    issued = [op for op in look_ahead(due, size_of, early, budget) if op.kind == "reduce"]
    assert issued == [op for op in due if op.kind == "reduce"]


@given(events, sizes, ahead, budgets)
@example([gather(0), gather(1), gather(0)], dict.fromkeys(range(NUM_UNITS), 0), [], 9)
@example([gather(0), gather(0)], dict.fromkeys(range(NUM_UNITS), 0), [], 9)
def test_what_is_issued_serves_the_events_in_their_order_within_the_budget(
    due: list[Op], size_of: dict[int, int], early: list[int], budget: int | None
) -> None:
    """Replay what is issued, using each unit as soon as it is there and its turn has come."""
    held, coming, last = set(early), list(due), None

    def use_what_is_there() -> None:
        nonlocal last
        while coming and coming[0].kind == "gather" and coming[0].unit in held:
            last = coming.pop(0).unit
            held.remove(last)

    for op in look_ahead(due, size_of, early, budget):
        use_what_is_there()
        if coming[0] == op:  # due now
            last = coming.pop(0).unit
            continue
        assert op.kind == "gather", f"{op} is issued before {coming[0]}"
        assert op.unit not in held, f"{op} is issued twice for one use"
        assert op.unit != last, f"{op} is issued while the unit is in use"
        if budget is None:
            assert not held, f"{op} is the second unit that is held before its time"
        held.add(op.unit)
        if budget is not None:
            assert sum(size_of[unit] for unit in held) <= budget
    use_what_is_there()
    assert not coming


CHAIN = [gather(0), gather(1), gather(2), gather(2), reduce(2), gather(1), reduce(1), gather(0)]
SAME_SIZE = dict.fromkeys(range(NUM_UNITS), 10)


@pytest.mark.parametrize(
    ("budget", "issued"),
    [
        (0, "g0 g1 g2 g2 r2 g1 r1 g0"),
        (9, "g0 g1 g2 g2 r2 g1 r1 g0"),
        (10, "g0 g1 g2 g2 g1 r2 g0 r1"),
        (20, "g0 g1 g2 g2 g1 g0 r2 r1"),
        (None, "g0 g1 g2 g2 g1 r2 g0 r1"),
    ],
)
def test_gathers_start_as_early_as_the_budget_allows(budget: int | None, issued: str) -> None:
    got = look_ahead(CHAIN, SAME_SIZE, [], budget)
    assert " ".join(f"{op.kind[0]}{op.unit}" for op in got) == issued


def test_a_unit_that_exceeds_the_budget_waits_for_its_turn_and_holds_up_later_ones() -> None:
    due = [gather(0), reduce(4), gather(1), gather(2)]
    assert list(look_ahead(due, {0: 1, 1: 99, 2: 1}, [], 5)) == due


# Simulated ranks --------------------------------------------------------------------------------


class InjectedError(Exception):
    """What a step of a rank may raise."""


class DeadlockError(Exception):
    """All ranks wait, and nothing that any of them waits for holds."""


class World:
    """What the threads share: collectives that have been issued, and who waits for what."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.condition = threading.Condition()
        self.issued: list[list[Op]] = [[] for _ in range(size)]
        self.shown: list[list[list[int]]] = [[] for _ in range(size)]
        self._waits: dict[int, Callable[[], bool]] = {}
        self._running = size
        self._failed = False

    def block(self, rank: int, holds: Callable[[], bool]) -> None:
        with self.condition:
            self._waits[rank] = holds
            self.condition.notify_all()
            while not holds():
                stuck = len(self._waits) == self._running and not any(
                    other() for other in self._waits.values()
                )
                if stuck or self._failed:
                    raise DeadlockError(f"rank {rank} waits for ever")
                self.condition.wait()
            del self._waits[rank]

    def leave(self, failed: bool) -> None:
        with self.condition:
            self._running -= 1
            self._failed = self._failed or failed
            self.condition.notify_all()

    def issue(self, rank: int, op: Op) -> Callable[[], None]:
        """Issue a collective; what is returned waits until all ranks have issued it."""
        with self.condition:
            position = len(self.issued[rank])
            for other in self.issued:
                if len(other) > position:
                    assert other[position] == op, f"{op} meets {other[position]}"
            self.issued[rank].append(op)
            self.condition.notify_all()

        def everywhere() -> bool:
            return all(len(other) > position for other in self.issued)

        return lambda: self.block(rank, everywhere)

    def show(self, rank: int, numbers: list[int]) -> list[list[int]]:
        with self.condition:
            turn = len(self.shown[rank])
            self.shown[rank].append(list(numbers))
            assert len({len(shown[turn]) for shown in self.shown if len(shown) > turn}) == 1
            self.condition.notify_all()
        self.block(rank, lambda: all(len(shown) > turn for shown in self.shown))
        return [shown[turn] for shown in self.shown]


@dataclass
class Mesh:
    """As much of a mesh as a schedule looks at."""

    rank: int
    threads: World


class Exchange:
    """Stands in for the exchange over the host's process group."""

    def __init__(self, mesh: Mesh, length: int) -> None:
        self.mesh, self.length = mesh, length

    def __call__(self, numbers: list[int]) -> list[list[int]]:
        assert len(numbers) == self.length
        return self.mesh.threads.show(self.mesh.rank, numbers)


@pytest.fixture(autouse=True, scope="module")
def ranks_are_threads() -> Iterator[None]:
    with mock.patch.object(schedule_module, "Exchange", Exchange):
        yield


@dataclass(eq=False)
class FakeUnit:
    """A unit that stores numbers instead of tensors, with the waits of the real one."""

    index: int
    nbytes_full: int
    world: World
    rank: int
    lifetime: Lifetime
    on_gather: Callable[[], None] = lambda: None
    gathers_alone: bool = False
    is_full: bool = False
    has_gradient: bool = False
    gradient: int = 0
    reduced: int = 0
    num_gathers: int = 0
    num_reductions: int = 0
    _gathering: list[Callable[[], None]] = field(default_factory=list)
    _reducing: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = f"unit {self.index}"
        self.store = SimpleNamespace(index=self.index, reader=None, is_at_hand=True)
        self.is_full = self.lifetime.params_stay

    def gather(self) -> None:
        self._finish(self._gathering)
        self.is_full = True
        self.num_gathers += 1
        if not self.gathers_alone:
            self._gathering.append(self.world.issue(self.rank, gather(self.index)))
        self.on_gather()

    def wait(self) -> None:
        assert self.is_full, f"{self.name} is waited for, but freed"
        self._finish(self._gathering)

    def free(self) -> None:
        self._finish(self._gathering)
        self.is_full = self.lifetime.params_stay

    def collect(self) -> None:
        self.has_gradient = True
        self.gradient += 1

    def reduce(self) -> None:
        self.settle()
        self.num_reductions += 1
        self._reducing.append(self.world.issue(self.rank, reduce(self.index)))
        self.reduced += self.gradient
        self.gradient, self.has_gradient = 0, False

    def settle(self) -> None:
        self._finish(self._reducing)

    def _finish(self, tickets: list[Callable[[], None]]) -> None:
        for ticket in tickets:
            ticket()
        tickets.clear()


class Step(NamedTuple):
    """What hooks report: a module opens or the innermost one closes, or a gradient is complete.

    A late gradient is one that nobody knew to be complete before the end of backward. An error
    makes the rank give up the pass; so does a skip, before backward begins.
    """

    verb: Literal["open", "close", "grad", "late", "error", "skip"]
    unit: int = -1


class Forward(NamedTuple):
    """One call of the model; of kind "forward" if no backward follows from it."""

    kind: str
    steps: Sequence[Step]


class Pass(NamedTuple):
    """Forwards and what they are for: one backward, or nothing more."""

    forwards: Sequence[Forward]
    backward: Sequence[Step] | None = None


def evaluation(steps: Sequence[Step]) -> Pass:
    return Pass([Forward("forward", steps)])


def training(
    forward: Sequence[Step], backward: Sequence[Step] = (), kind: str = "boundary"
) -> Pass:
    return Pass([Forward(kind, forward)], backward)


@dataclass
class Model:
    """What all ranks have in common."""

    sizes: Sequence[int]
    budget: int | None = None
    live: int | None = None
    reuse: int = 0
    overlap: bool = True
    frozen: frozenset[int] = frozenset()
    stays: bool = False
    alone: frozenset[int] = frozenset()
    """Units that a rank gathers without the others."""
    far: frozenset[int] = frozenset()
    """Units whose shards are in files, and on some ranks never read before they are needed."""


@dataclass
class Log:
    """What one rank did, pass by pass."""

    issued: list[list[Op]] = field(default_factory=list)
    num_exchanges: list[int] = field(default_factory=list)
    given_up: list[int] = field(default_factory=list)
    expected: list[list[int]] = field(default_factory=list)
    """What was to be read ahead, nearest first."""


class Rank:
    """One rank: a schedule over fake units, driven as the hooks drive it."""

    def __init__(self, rank: int, model: Model, world: World) -> None:
        self.rank, self.world, self.model = rank, world, model
        self.units = [
            FakeUnit(index, size, world, rank, STAGES[1 if model.stays else 3], self.check_memory)
            for index, size in enumerate(model.sizes)
        ]
        for index in model.alone:
            self.units[index].gathers_alone = True
        for index in model.far:
            self.units[index].store = SimpleNamespace(
                index=index, reader=self, is_at_hand=(rank + index) % 2 == 0
            )
        self.trained = [unit for unit in self.units if unit.index not in model.frozen]
        limits = Limits(model.budget, model.live, model.reuse, model.overlap)
        self.schedule = Schedule(self.units, Mesh(rank, world), limits)  # type: ignore[arg-type]
        self.open: list[FakeUnit] = []
        self.kept: set[FakeUnit] = set()
        self.in_backward = False
        self.log = Log()

    def expect(self, coming: Iterable[Any]) -> None:
        """As a reader of shards in files does, which has room for three."""
        self.log.expected.append([store.index for store in islice(coming, 3)])

    def check_memory(self) -> None:
        """At most the budget is full before its time, or else one unit of any size."""
        if self.model.stays:
            return
        early = [u for u in self.units if u.is_full and u not in self.open and u not in self.kept]
        budget = self.model.budget if self.model.overlap else 0
        if budget is None:
            assert len(early) <= 1, f"{[u.name for u in early]} are there before their time"
        elif len(early) > 1:
            assert sum(unit.nbytes_full for unit in early) <= budget

    def run(self, passes: Sequence[Pass]) -> None:
        for number, one in enumerate(passes):
            num_issued, num_shown = len(self.world.issued[self.rank]), self.num_shown
            try:
                self.run_one(one)
            except (InjectedError, DistributedError):
                self.give_up()
                self.log.given_up.append(number)
            self.kept.clear()
            assert not self.model.stays or not any(unit.num_gathers for unit in self.units)
            assert self.model.stays or not any(unit.is_full for unit in self.units)
            self.log.issued.append(self.world.issued[self.rank][num_issued:])
            self.log.num_exchanges.append(self.num_shown - num_shown)

    def run_one(self, one: Pass) -> None:
        self.in_backward = False
        reductions = [unit.num_reductions for unit in self.units]
        for forward in one.forwards:
            self.schedule.begin(forward.kind)
            self.do_all(forward.steps)
            self.schedule.end_forward(forward.kind)
        if one.backward is None:
            return
        self.in_backward = True
        self.do_all(one.backward)
        for unit in self.units:
            unit.free()
        self.schedule.finish(self.trained)  # type: ignore[arg-type]
        for unit, before in zip(self.units, reductions, strict=True):
            reduced = unit.num_reductions > before
            assert reduced or unit not in self.trained, f"{unit.name} was not reduced"
            assert not unit.has_gradient, f"{unit.name} lost a gradient"

    def give_up(self) -> None:
        self.schedule.reset(self.in_backward)
        self.open.clear()
        for unit in self.units:
            unit.free()
            unit.gradient, unit.has_gradient = 0, False

    @property
    def num_shown(self) -> int:
        return len(self.world.shown[self.rank])

    def do_all(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self.do(step)
        while self.open:
            self.close()

    def do(self, step: Step) -> None:
        if step.verb == "open":
            unit = self.units[step.unit]
            self.open.append(unit)
            self.kept.discard(unit)
            self.schedule.need(unit)
        elif step.verb == "close" and self.open:
            self.close()
        elif step.verb in ("grad", "late") and self.units[step.unit] in self.trained:
            unit = self.units[step.unit]
            unit.collect()
            if step.verb == "grad":
                self.schedule.ready(unit)
        elif step.verb in ("error", "skip"):
            self.in_backward = self.in_backward and step.verb == "error"
            raise InjectedError
        for unit in self.open:
            assert unit.is_full, f"{unit.name} was freed while it is in use"

    def close(self) -> None:
        unit = self.open.pop()
        if unit in self.open:
            return
        if self.schedule.keeps(unit):  # type: ignore[arg-type]
            self.kept.add(unit)
        else:
            unit.free()


def simulate(model: Model, passes: Sequence[Sequence[Pass]]) -> list[Log]:
    """Run each rank's passes and return what the ranks did; raise what the first to fail raised."""
    world = World(len(passes))
    ranks = [Rank(rank, model, world) for rank in range(len(passes))]
    errors: list[BaseException] = []

    def live(rank: Rank) -> None:
        try:
            rank.run(passes[rank.rank])
        except BaseException as error:
            errors.append(error)
        finally:
            world.leave(failed=bool(errors))

    threads = [threading.Thread(target=live, args=[rank], daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert all(issued == world.issued[0] for issued in world.issued)
    return [rank.log for rank in ranks]


def steps_over(
    num_units: int, max_size: int, *more: Literal["grad", "late"]
) -> st.SearchStrategy[list[Step]]:
    unit = st.integers(0, num_units - 1)
    kinds = [st.builds(Step, st.just("open"), unit), st.just(Step("close"))]
    if more:
        kinds.append(st.builds(Step, st.sampled_from(more), unit))
    return st.lists(st.one_of(kinds), max_size=max_size)


def passes_over(num_units: int, max_size: int) -> st.SearchStrategy[Pass]:
    """A backward after one forward or several, with evaluations before and between them."""
    kinds = st.sampled_from(("boundary", "boundary", "accumulation", "forward"))
    forward = st.builds(Forward, kinds, steps_over(num_units, max_size))
    backward = steps_over(num_units, max_size, "grad", "late")
    return st.builds(Pass, st.lists(forward, max_size=3), backward)


@st.composite
def models(draw: st.DrawFn) -> Model:
    all_sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    none, every = frozenset[int](), frozenset(range(len(all_sizes)))
    some = draw(st.frozensets(st.sampled_from(sorted(every))))
    return Model(
        sizes=all_sizes,
        budget=draw(budgets),
        live=draw(budgets),
        reuse=draw(st.sampled_from((0, 0, 4, 12, 100))),
        overlap=draw(st.integers(0, 3)) > 0,
        frozen=draw(st.frozensets(st.integers(0, len(all_sizes) - 1), max_size=1)),
        stays=draw(st.integers(0, 5)) == 0,
        alone=draw(st.sampled_from((none, none, every, some))),
        far=draw(st.sampled_from((none, none, every, some))),
    )


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Model, list[list[Pass]]]:
    """Ranks that differ in every pass: units skipped, repeated, nested or in another order.

    They even call the model another number of times. Only backward they run equally often.
    """
    model = draw(models())
    passes = passes_over(len(model.sizes), 7)
    favourites = draw(st.lists(passes, min_size=1, max_size=2))  # so that some passes repeat
    passes = st.one_of(st.sampled_from(favourites), passes)
    count = draw(st.integers(1, 3))
    ranks = st.lists(passes, min_size=count, max_size=count)
    return model, draw(st.lists(ranks, min_size=1, max_size=3))


@given(worlds())
def test_ranks_that_run_different_modules_issue_the_same_collectives_and_never_hang(
    world: tuple[Model, list[list[Pass]]],
) -> None:
    simulate(*world)


def test_shards_in_files_are_read_ahead_in_the_order_of_the_last_pass() -> None:
    (log,) = simulate(Model([10] * 4, far=frozenset(range(4))), [[chain(4)] * 2])
    assert log.expected[0] == []  # nothing is known yet
    second = log.expected[log.expected.index([0, 1, 2]) :]
    # Units 0 and 2 are gathered ahead, as their shards are there in time; 1 and 3 are not.
    assert second[:5] == [[0, 1, 2], [1, 2, 3], [3, 3, 2], [3, 3, 2], [3, 2, 1]]
    assert second[-1] == []


def leave_out(draw: st.DrawFn, steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if draw(st.booleans())]


@st.composite
def worlds_with_gaps(draw: st.DrawFn) -> tuple[Model, list[list[Pass]]]:
    """One long pass that is expected again, then passes that leave out parts of it."""
    model = draw(models())
    forward = draw(steps_over(len(model.sizes), 12))
    backward = draw(steps_over(len(model.sizes), 12, "grad", "late"))
    long = [training(forward, backward)] * 2
    return model, [
        long + [training(leave_out(draw, forward), leave_out(draw, backward)) for _ in range(2)]
        for _ in range(2)
    ]


@given(worlds_with_gaps())
def test_ranks_may_stop_needing_what_they_expected_to_need(
    world: tuple[Model, list[list[Pass]]],
) -> None:
    simulate(*world)


@st.composite
def worlds_with_an_error(draw: st.DrawFn) -> tuple[Model, list[list[Pass]], int]:
    """Ranks that differ, one of which makes an error in some pass.

    An error in backward ends the backward of the others. An error in forward is the caller's to
    spread: the others end their forwards, of which all ranks make as many, and skip backward.
    """
    model, ranks = draw(worlds())
    number = draw(st.integers(0, len(ranks[0]) - 1))
    failing = draw(st.integers(0, len(ranks) - 1))
    if draw(st.booleans()):
        forwards, backward = ranks[failing][number]
        backward = (backward or ())[: draw(st.integers(0, 7))]
        ranks[failing][number] = Pass(forwards, [*backward, Step("error")])
        return model, ranks, number
    steps = steps_over(len(model.sizes), 7)
    count = draw(st.integers(1, 2))
    for rank, passes in enumerate(ranks):
        forwards = [Forward("boundary", draw(steps)) for _ in range(count)]
        if rank == failing:
            forwards[-1] = Forward("boundary", [*forwards[-1].steps, Step("error")])
        passes[number] = Pass(forwards, [Step("skip")])
    return model, ranks, number


@given(worlds_with_an_error())
def test_after_an_error_on_one_rank_all_give_up_the_same_pass_and_go_on(
    case: tuple[Model, list[list[Pass]], int],
) -> None:
    model, ranks, number = case
    for log in simulate(model, ranks):
        assert log.given_up == [number]


def use(unit: int) -> list[Step]:
    return [Step("open", unit), Step("close")]


def chain(num_units: int, order: Sequence[int] | None = None) -> Pass:
    """Forward through the units, all of them in their order unless told so, then backward."""
    units = range(num_units) if order is None else order
    forward = [step for unit in units for step in use(unit)]
    backward = [step for unit in reversed(units) for step in (*use(unit), Step("grad", unit))]
    return training(forward, backward)


def exchanges_at_most(one: Pass, num_ops: int) -> int:
    """One at the start and end of each forward and of backward, and for each full window."""
    return max(2 * len(one.forwards), 1) + 2 * (one.backward is not None) + num_ops // WINDOW


def assert_seldom_talks(log: Log, passes: Sequence[Pass], num_first: int) -> None:
    """After so many passes, in which everything was new."""
    counts = zip(passes, log.issued, log.num_exchanges, strict=True)
    for one, issued, num_exchanges in list(counts)[num_first:]:
        assert num_exchanges <= exchanges_at_most(one, len(issued))


def num_gathers(log: Log) -> int:
    """In the last pass."""
    return sum(op.kind == "gather" for op in log.issued[-1])


def test_ranks_that_gather_alone_agree_on_reductions_and_on_nothing_in_forward() -> None:
    model = Model([10] * 5, budget=20, alone=frozenset(range(5)))
    orders = [(0, 1, 2, 3, 4), (4, 2, 0), (1,)]
    ranks = [
        [chain(5, order), evaluation(use(rank) + use(4)), chain(5, order)]
        for rank, order in enumerate(orders)
    ]
    world = World(3)
    with mock.patch(f"{__name__}.World", lambda _: world):
        logs = simulate(model, ranks)
    for log in logs:
        assert num_gathers(log) == 0
        assert log.num_exchanges[1] == 0
    # A wish is a count, then units to gather, units to reduce (from 5 on), and marks below 0.
    shown = [op for rank in world.shown for wish in rank for op in wish[1 : 1 + wish[0]]]
    assert shown and not any(0 <= op < 5 for op in shown)


def test_a_rank_that_gathers_alone_looks_ahead_of_each_use_by_its_own_past() -> None:
    model = Model([10] * 5, budget=20, alone=frozenset(range(5)))
    rank = Rank(0, model, World(1))
    rank.run([chain(5)])
    was_ahead: list[bool] = []
    need = rank.schedule.need

    def watched(unit: Any) -> None:
        was_ahead.append(unit.is_full)
        need(unit)

    with mock.patch.object(rank.schedule, "need", watched):
        rank.run([chain(5)])
    assert was_ahead == [False, *[True] * 9]


@pytest.mark.parametrize(
    ("reuse", "gathers"),
    # Five units of 10 bytes: the last is used twice in a row, the one before it 20 bytes apart ...
    [(0, 9), (19, 9), (20, 8), (39, 8), (40, 7), (80, 5), (10**6, 5)],
)
def test_units_within_the_reuse_distance_are_gathered_once(reuse: int, gathers: int) -> None:
    model = Model([10] * 5, reuse=reuse)
    for log in simulate(model, [[chain(5)] * 4] * 2):
        assert num_gathers(log) == gathers
        assert_seldom_talks(log, [chain(5)] * 4, num_first=1)


def test_what_stays_for_reuse_makes_room_for_what_is_needed() -> None:
    model = Model([10] * 5, budget=0, live=30, reuse=10**6)
    rank = Rank(0, model, World(1))
    most = 0

    def sample() -> None:
        nonlocal most
        most = max(most, sum(unit.nbytes_full for unit in rank.units if unit.is_full))

    for unit in rank.units:
        unit.on_gather = sample
    rank.run([chain(5)] * 3)
    assert most == 30
    # The first two units gave way to those after them.
    assert num_gathers(rank.log) == 7


def test_ranks_that_keep_different_units_serve_each_other() -> None:
    forth, back = chain(4), chain(4, [3, 2, 1, 0])
    ranks = [[forth] * 3 + [back] * 3, [back] * 3 + [forth] * 3]
    simulate(Model([10] * 4, reuse=10**6), ranks)


@pytest.mark.parametrize("num_units", [1, 2, 5, 70])
@pytest.mark.parametrize("budget", [None, 0, 30, 10**6])
def test_ranks_that_repeat_a_pass_seldom_talk(num_units: int, budget: int | None) -> None:
    passes = [chain(num_units)] * 4
    for log in simulate(Model([10] * num_units, budget), [passes] * 2):
        assert_seldom_talks(log, passes, num_first=1)


@pytest.mark.parametrize("num_units", [1, 2, 5, 70])
@pytest.mark.parametrize("budget", [None, 0, 30, 10**6])
def test_nothing_is_gathered_in_vain_when_a_pass_repeats(
    num_units: int, budget: int | None
) -> None:
    model = Model([10] * num_units, budget)
    (log, _) = simulate(model, [[chain(num_units)] * 4] * 2)
    for issued in log.issued[1:]:
        gathers = Counter(op.unit for op in issued if op.kind == "gather")
        # The last unit's backward follows its forward at once, so it stays full in between.
        assert gathers == {unit: 1 if unit == num_units - 1 else 2 for unit in range(num_units)}


@st.composite
def uniform(draw: st.DrawFn) -> tuple[Model, Pass]:
    """Units in any order and nesting, and the gradient of each once or not at all.

    No limit of what is full: what gives way to it cannot be foreseen.
    """
    model = replace(draw(models()), live=None)
    backward: list[Step] = []
    for step in draw(steps_over(len(model.sizes), 12, "grad", "late")):
        if step.verb in ("open", "close") or step not in backward:
            backward.append(step)
    return model, training(draw(steps_over(len(model.sizes), 12)), backward)


@given(uniform(), st.integers(1, 3))
def test_a_pass_in_any_order_is_agreed_on_in_one_go_when_it_repeats(
    case: tuple[Model, Pass], num_ranks: int
) -> None:
    model, one = case
    for log in simulate(model, [[one] * 3] * num_ranks):
        assert_seldom_talks(log, [one] * 3, num_first=1)


@given(uniform())
def test_a_pass_that_repeats_gathers_no_more_than_the_first_time(case: tuple[Model, Pass]) -> None:
    model, one = case
    (log, _) = simulate(model, [[one] * 3] * 2)
    counts = [sum(op.kind == "gather" for op in issued) for issued in log.issued]
    assert max(counts[1:]) <= counts[0]


def test_a_second_backward_through_one_forward_is_expected_when_it_repeats() -> None:
    first = chain(4)
    passes = [first, Pass([], first.backward)] * 3
    for log in simulate(Model([10] * 4), [passes] * 2):
        assert_seldom_talks(log, passes, num_first=2)


def test_a_pass_of_two_forwards_with_an_evaluation_between_is_expected_when_it_repeats() -> None:
    (forward,), backward = chain(4)
    passes = [Pass([forward, Forward("forward", use(2)), forward], backward)] * 3
    for log in simulate(Model([10] * 4), [passes] * 2):
        assert_seldom_talks(log, passes, num_first=1)


def test_kinds_of_passes_are_remembered_apart() -> None:
    (forward,), backward = chain(3)
    accumulation = training(forward.steps, backward, "accumulation")
    passes = [chain(4), evaluation([*use(3), *use(0)]), accumulation] * 3
    for log in simulate(Model([10] * 4), [passes] * 2):
        assert_seldom_talks(log, passes, num_first=3)


@pytest.mark.parametrize(
    ("budget", "seen"),
    [
        (None, [{0, 1}, {1, 2}, {2, 3}, {3}, {3}]),
        (0, [{0}, {1}, {2}, {3}, {3}]),
        (100, [{0, 1, 2}, {1, 2, 3}, {2, 3}, {3}, {3}]),
        (200, [{0, 1, 2, 3}, {1, 2, 3}, {2, 3}, {3}, {3}]),
    ],
)
def test_gathers_run_ahead_of_their_use_as_far_as_the_budget_allows(
    budget: int | None, seen: list[set[int]]
) -> None:
    """What is there or under way while each unit runs, and what is kept after forward."""
    rank = Rank(0, Model([10, 10, 90, 10], budget), World(1))
    one = chain(4)
    rank.run([one])
    rank.schedule.begin("boundary")
    found: list[set[int]] = []
    for step in one.forwards[0].steps:
        rank.do(step)
        if step.verb == "open":
            found.append({unit.index for unit in rank.units if unit.is_full})
    rank.schedule.end_forward("boundary")
    assert [*found, {unit.index for unit in rank.units if unit.is_full}] == seen


def test_a_gradient_that_arrives_after_its_reduction_is_reduced_again() -> None:
    """Rank 1 needs unit 2 before it has the gradient that both expected to reduce first."""
    early = training([], [Step("grad", 1), Step("grad", 0), *use(2)])
    late = training([], [Step("grad", 1), *use(2), Step("grad", 0)])
    for log in simulate(Model([1, 1, 1], budget=0), [[early, early], [early, late]]):
        assert [issued.count(reduce(0)) for issued in log.issued] == [1, 2]


def test_a_gradient_is_reduced_as_soon_as_it_is_complete_even_in_the_first_pass() -> None:
    (log,) = simulate(Model([1] * 3), [[chain(3)]])
    assert "".join(f"{op.kind[0]}{op.unit}" for op in log.issued[0]) == "g0g1g2g2r2g1r1g0r0"


def test_a_unit_kept_for_a_use_that_does_not_come_is_freed_by_the_next_gather() -> None:
    rank = Rank(0, Model([1, 1]), World(1))
    rank.run([training([*use(0), *use(0), *use(1)])])
    rank.schedule.begin("boundary")
    for step in use(0):
        rank.do(step)
    assert rank.units[0].is_full
    rank.do(Step("open", 1))
    assert not rank.units[0].is_full


def test_a_rank_that_ends_a_pass_early_leaves_no_other_waiting() -> None:
    whole = evaluation([step for unit in range(4) for step in use(unit)])
    part = evaluation(use(0))
    simulate(Model([1] * 4), [[whole, whole], [whole, part]])


def test_what_is_expected_after_a_unit_that_was_left_out_stays_right() -> None:
    (forward,), backward = long = chain(70)
    shorter = training(
        [step for step in forward.steps if step.unit != 5],
        [step for step in backward or () if step.unit != 5],
    )
    for log in simulate(Model([10] * 70), [[long, long, shorter]] * 2):
        assert log.num_exchanges[2] <= exchanges_at_most(shorter, len(log.issued[2])) + 1
        assert len(log.issued[2]) <= len(log.issued[1])


def test_an_unused_unit_is_reduced_once_for_everyone() -> None:
    for log in simulate(Model([1, 1]), [[training([])] * 2] * 2):
        assert [Counter(issued) for issued in log.issued] == [{reduce(0): 1, reduce(1): 1}] * 2


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_reset_leaves_nothing_full_and_the_next_pass_works(in_backward: bool) -> None:
    rank = Rank(0, Model([1] * 4, budget=9), World(1))
    rank.run([chain(4)])
    rank.schedule.begin("boundary")
    rank.do(Step("open", 0))
    assert sum(unit.is_full for unit in rank.units) > 1
    rank.open.clear()
    rank.units[0].free()
    rank.schedule.reset(in_backward)
    assert not any(unit.is_full for unit in rank.units)
    rank.run([chain(4)])


def test_ranks_that_do_not_answer_are_reported_with_what_is_wanted() -> None:
    rank = Rank(0, Model([1]), World(1))
    with (
        mock.patch.object(rank.world, "show", side_effect=RuntimeError("connection lost")),
        pytest.raises(DistributedError, match="rank 0 wants to gather unit 0") as error,
    ):
        rank.run_one(chain(1))
    assert "connection lost" in str(error.value)
    assert "\n\nhint: " in str(error.value)


def test_the_simulation_notices_a_deadlock() -> None:
    """A rank that makes a pass less than the others leaves them waiting."""
    with pytest.raises(DeadlockError):
        simulate(Model([1]), [[chain(1)], []])


def test_an_order_that_changes_is_expected_to_be_mirrored_in_backward() -> None:
    def gather(unit: int) -> Op:
        return Op("gather", unit)

    def reduce(unit: int) -> Op:
        return Op("reduce", unit)

    # Unit 0 is not read in backward, unit 1 takes no gradients.
    past_forward = [gather(unit) for unit in (0, 1, 2, 3)]
    past = [gather(3), reduce(3), gather(2), reduce(2), gather(1), reduce(0)]
    forward = [gather(0), gather(1), gather(3), gather(1), gather(4)]
    assert mirror(forward, past_forward, past) == [
        *(gather(4), reduce(4)),  # never seen: like most
        *(gather(1), gather(3), reduce(3), gather(1)),
        reduce(0),
    ]


@given(st.lists(st.integers(0, 5)))
def test_a_forward_of_new_units_is_mirrored_with_one_reduction_for_each(units: list[int]) -> None:
    ops = mirror([Op("gather", unit) for unit in units], [], [])
    assert [op.unit for op in ops if op.kind == "gather"] == units[::-1]
    assert sorted(op.unit for op in ops if op.kind == "reduce") == sorted(set(units))


@given(st.lists(st.permutations(range(12)), min_size=1, max_size=4), st.integers(1, 12))
def test_an_order_that_changes_costs_one_window_of_gathers_and_no_reduction(
    orders: list[list[int]], num_used: int
) -> None:
    """Whole permutations, and blocks dropped at random, the same on every rank."""
    passes = [chain(12), *(chain(12, order[:num_used]) for order in orders)]
    for log in simulate(Model([1] * 12), [passes] * 2):
        for one, issued in zip(passes[1:], log.issued[1:], strict=True):
            needed = 2 * sum(step.verb == "open" for step in one.forwards[0].steps)
            assert sum(op.kind == "gather" for op in issued) <= needed + 12 + 1
            assert sum(op.kind == "reduce" for op in issued) == 12
