"""In which order the ranks gather and reduce, and how they agree on it.

[Note: agreed windows]
Collectives of one group must be issued in the same order by all ranks, but ranks may run different
modules: experts, a vision tower, another order of blocks. So no collective of a step is issued
because one rank's module asked for it. The ranks agree on a *window*, a short list of operations,
and each issues exactly these. A rank that turns out not to need one of them issues it all the same
and drops the result; a rank that needs something else first issues the rest of the window, then
asks for a new one. Any rank can complete a window alone, without running a module, so

* no rank waits for a module that another one does not run, unless the caller's own collectives
  inside forward make it, and
* whatever one rank waits for, every other rank issues before it waits for anything itself.

A window comes from what ranks expect to need, which is what they needed in the last pass of the
same kind. Each shows its expectation to the others (a few integers over the host group) and the
window is their longest common prefix. Ranks that agree all the time, the normal case, exchange some
integers every 64 operations, ahead of the device. Where already the first operations differ, the
window holds the first wish of every rank. A reduction that a window holds but a rank cannot yet
serve contributes zeros there, and what arrives later is reduced again at the end of backward: sums
lose nothing.

Expectations are only hints. An order that changes costs the rest of a window in unused prefetches,
and windows start short again after that.

Shards in files are read ahead of their gathers, by what this rank needed before; see
[Note: reading ahead] in `staging.py`. A gather that is not needed yet is not issued before its
shard has been read, as that would make the host wait, and with it the computation.

Gathers that a rank makes alone, by reading the memory of others, have no order to agree on. They
are in no window: each is issued when it is needed, or ahead of that as far as the budget goes and
by what this rank needed before. Where all gathers are of that kind only reductions are agreed on,
and forward ends without the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, NamedTuple

from zeroshard.core.attendance import forget_word, leave_word, word_of
from zeroshard.core.collectives import Answered, Exchange
from zeroshard.core.mesh import Mesh
from zeroshard.core.store import Store
from zeroshard.core.unit import Unit
from zeroshard.errors import DistributedError, OffloadError, UsageError, compose

__all__ = [
    "ABORT",
    "END",
    "END_FORWARD",
    "STEP",
    "Limits",
    "Op",
    "Schedule",
    "common_window",
    "look_ahead",
    "mirror",
]

_WINDOW = 64
_WINDOW_AFTER_A_MISS = 2
_LONGEST_RECORD = 100_000


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a schedule may keep full beside what is in use, in bytes of full units.

    ``ahead``: gathered before it is needed; None allows one unit of any size. ``live``: full at
    once, beyond which nothing is gathered ahead or kept; what is needed is gathered all the same.
    ``reuse``: a unit that is needed again within so many gathered bytes is not freed in between.
    ``overlap``: false to finish each reduction before the computation goes on.
    """

    ahead: int | None = None
    live: int | None = None
    reuse: int = 0
    overlap: bool = True


DEFAULT = Limits()


class Op(NamedTuple):
    """A collective on a unit, or a mark: what a rank shows that wants no more of them now."""

    kind: Literal["gather", "reduce", "end"]
    unit: int


END = Op("end", -1)
END_FORWARD = Op("end", -2)
ABORT = Op("end", -3)
STEP = Op("end", -4)
_MARKS = {mark.unit: mark for mark in (END, END_FORWARD, ABORT, STEP)}


def common_window(wishes: Sequence[Sequence[Op]]) -> list[Op]:
    """The operations that all ranks issue next, from what each would like to issue.

    The longest common prefix if there is one; else the first wish of every rank, gathers before
    reductions because a rank that wants a gather cannot go on without it. Empty if all want none
    but are at different marks.
    """
    prefix: list[Op] = []
    for ops in zip(*wishes, strict=False):
        if any(op != ops[0] for op in ops):
            break
        prefix.append(ops[0])
    if prefix:
        return prefix
    heads = {wish[0] for wish in wishes if wish}
    gathers = sorted(op for op in heads if op.kind == "gather")
    return gathers or sorted((op for op in heads if op.kind == "reduce"), reverse=True)


def look_ahead(
    events: Iterable[Op],
    sizes: Mapping[int, int],
    ahead: Sequence[int],
    budget: int | None,
    live: int | None = None,
) -> Iterator[Op]:
    """Pull gathers forward so that each starts before the unit is needed.

    Args:
        events: gathers and reductions in the order in which they fall due.
        sizes: bytes of each full unit.
        ahead: units already gathered before their time.
        budget: bytes that may be gathered before their time; None allows one unit of any size.
        live: bytes of what is gathered early and the unit in use together.
    """
    due = deque(events)
    early = list(ahead)
    while due:
        op = due.popleft()
        if op.kind == "reduce":
            yield op
        elif op.unit in early:
            early.remove(op.unit)
        else:
            yield op
        # The gathers that may start while the computation that follows `op` runs.
        taken: list[int] = []
        for coming in due:
            if coming.kind != "gather" or coming.unit in early:
                continue
            if coming.unit == op.unit:  # in use until then, and freed before it is needed again
                break
            total = sum(sizes[unit] for unit in early) + sizes[coming.unit]
            if early if budget is None else total > budget:
                break
            if live is not None and total + sizes.get(op.unit, 0) > live:
                break
            early.append(coming.unit)
            taken.append(coming.unit)
        yield from (Op("gather", unit) for unit in taken)


def mirror(forward: Sequence[Op], past_forward: Sequence[Op], past: Sequence[Op]) -> list[Op]:
    """Gathers and reductions of a backward that goes through the units of ``forward`` in reverse.

    Args:
        forward: what this forward gathered.
        past_forward: what the last one gathered, before the backward ``past``.
        past: which of those units that backward gathered again, and which it reduced.
    """
    known = {op.unit for op in past_forward}
    again = {op.unit for op in past if op.kind == "gather"}
    reduced = {op.unit for op in past if op.kind == "reduce"}
    first_use = {op.unit: at for at, op in reversed(list(enumerate(forward)))}
    ops: list[Op] = []
    for at in reversed(range(len(forward))):
        op = forward[at]
        if op.kind != "gather":
            continue
        if op.unit in again or op.unit not in known:
            ops.append(op)
        # A gradient is complete with the earliest use in forward, the last one in backward.
        if first_use[op.unit] == at and (op.unit in reduced or op.unit not in known):
            ops.append(Op("reduce", op.unit))
    return ops


class Schedule:
    """Issues the collectives of forward and backward passes in agreed windows.

    See [Note: agreed windows].
    """

    def __init__(self, units: Sequence[Unit], mesh: Mesh, limits: Limits = DEFAULT) -> None:
        self._units, self._mesh, self._limits = units, mesh, limits
        self._budget = limits.ahead if limits.overlap else 0
        self._index = {unit: index for index, unit in enumerate(units)}
        self._sizes = {index: unit.nbytes_full for index, unit in enumerate(units)}
        self._reuse = limits.reuse
        if limits.live is not None:
            # A pass there and back has half of this full at its turning point, and the unit in use.
            comes_and_goes = (u.nbytes_full for u in units if not u.lifetime.params_stay)
            room = limits.live - max(comes_and_goes, default=0)
            self._reuse = min(limits.reuse, max(2 * room, 0))
        self._ask = Exchange(mesh, 1 + _WINDOW)
        self._window: deque[Op] = deque()
        self._trust = _WINDOW  # operations to agree on at once; few while expectations fail
        self._ahead: list[int] = []  # gathered, not needed yet, oldest first
        self._kept: list[int] = []  # left full because the pass needs them again soon, oldest first
        self._gathered = 0  # bytes needed since the record began ...
        self._gathered_at: dict[int, int] = {}  # ... and up to the last use of each unit
        self._ready: list[int] = []  # gradients complete, reduction not issued
        self._reducing: Unit | None = None
        self._issued: set[int] = set()  # reduced since the last end of backward
        # By kind of pass and, where several backwards follow one forward, by their number.
        self._history: dict[tuple[str, int], list[Op]] = {}
        self._num_backwards = 0
        self._record: list[Op] = []
        self._mirrored: list[Op] | None = None  # instead of history, until the pass ends
        self._kind = ""
        self._cursor: int | None = None
        self._gathers = any(not unit.lifetime.params_stay for unit in units)
        readers = (unit.store.reader for unit in units if not unit.lifetime.params_stay)
        self._readers = list(dict.fromkeys(reader for reader in readers if reader is not None))
        self._has_own = False  # whether this rank gathers some units alone
        self._in_forward = self._is_aborting = self._is_cut_off = False

    # What happened before, and what to expect from it

    def begin(self, kind: str) -> None:
        """The outermost forward starts, and a pass of this kind unless one is still open."""
        gathered = [unit for unit in self._units if not unit.lifetime.params_stay]
        self._has_own = any(unit.gathers_alone for unit in gathered)
        self._in_forward = not all(unit.gathers_alone for unit in gathered)
        if not self._record:
            self._kind, self._num_backwards, self._cursor = kind, 0, 0
        self._read_ahead()

    def _close_record(self) -> None:
        self._mirrored, self._trust = None, _WINDOW
        self._history[self._kind, self._num_backwards] = self._record
        self._num_backwards += 1
        self._clear_record()
        self._cursor = 0

    def _clear_record(self) -> None:
        self._record = []
        self._gathered = 0
        self._gathered_at.clear()

    @property
    def _past(self) -> Sequence[Op]:
        if self._mirrored is not None:
            return self._mirrored
        return self._history.get((self._kind, self._num_backwards), ())

    def _expect_backward(self) -> None:
        """Where forward was not what it was before, expect backward to be its mirror image."""
        past = self._history.get((self._kind, self._num_backwards), [])
        ends = [at for at, op in enumerate(past) if op == END_FORWARD]
        number = self._record.count(END_FORWARD)
        if number > len(ends):
            return
        end = ends[number - 1]
        if self._record[:-1] != past[:end]:
            self._mirrored, self._cursor = mirror(self._record, past[:end], past[end:]), 0

    def _note(self, op: Op) -> None:
        if len(self._record) < _LONGEST_RECORD:
            self._record.append(op)
        if op.kind == "gather":
            self._gathered += self._sizes[op.unit]
            self._gathered_at[op.unit] = self._gathered
        if not self._advance(op):
            self._review_kept()

    def _advance(self, op: Op) -> bool:
        """Move on in what is expected; say whether this was it."""
        past = self._past
        if self._cursor is None:
            return False
        if self._cursor < len(past) and past[self._cursor] == op:
            self._cursor += 1
            return True
        # Something was skipped, or is new: go on after the next place where this happened before,
        # but not in backward while this is forward.
        for at in range(self._cursor, len(past)):
            if past[at] == op:
                self._cursor = at + 1
                break
            if past[at].kind == "end":
                break
        return False

    def _coming(self) -> Iterator[Op]:
        """What is to come until the end of the pass."""
        past = self._past
        return (
            past[at] for at in range(len(past) if self._cursor is None else self._cursor, len(past))
        )

    def _expected(self, now: Sequence[Op] = ()) -> Iterator[Op]:
        """What is to come after ``now`` until the next mark, gathers of kept units left out."""
        gathered, gathered_at = self._gathered, dict(self._gathered_at)
        stays = {op.unit for op in now}
        stays.update(unit for unit in gathered_at if self._units[unit].is_full)
        for op in self._coming():
            if op.kind == "end":
                return
            if op.kind == "gather":
                between = gathered - gathered_at.get(op.unit, -self._reuse - 1)
                gathered += self._sizes[op.unit]
                gathered_at[op.unit] = gathered
                if op.unit in stays and between <= self._reuse:
                    continue
                stays.add(op.unit)
            yield op

    def keeps(self, unit: Unit) -> bool:
        """Whether the pass needs this unit again so soon that freeing it would be in vain."""
        index = self._index[unit]
        distance = self._distance(index)
        if distance is None or (distance and not self._is_room_for(0)):
            return False
        if index not in self._kept:
            self._kept.append(index)
        return True

    def _distance(self, unit: int) -> int | None:
        """Bytes that are expected to be gathered before a unit is needed again; None if many."""
        between = 0
        for op in self._coming():
            if op.kind == "gather":
                if op.unit == unit:
                    return between
                between += self._sizes[op.unit]
                if between > self._reuse:
                    return None
        return None

    def _is_room_for(self, nbytes: int) -> bool:
        if self._limits.live is None:
            return True
        full = (unit for unit in self._units if unit.is_full and not unit.lifetime.params_stay)
        return sum(unit.nbytes_full for unit in full) + nbytes <= self._limits.live

    def _review_kept(self) -> None:
        """The pass took another way: free what it is not about to use."""
        for index in [each for each in self._kept if self._distance(each) is None]:
            self._kept.remove(index)
            self._units[index].free()

    def _drop_kept(self) -> None:
        while self._kept:
            self._units[self._kept.pop()].free()

    # Agreement

    def _agree(self, now: Sequence[Op]) -> None:
        """Replace the empty window by the next one all ranks issue; ``now`` is wanted for sure."""
        assert not self._window, "a window is completed before the next is agreed on"
        reductions = [Op("reduce", unit) for unit in self._ready]
        due = [*now, *(op for op in self._expected(now) if op not in reductions)]
        wish = [*reductions, *self._look_ahead(due)]
        self._window.extend(self._exchange(wish[: self._trust]))
        self._trust = min(2 * self._trust, _WINDOW)

    def _look_ahead(self, due: Iterable[Op]) -> Iterator[Op]:
        """What is to be agreed on, in the order in which it may start."""
        ops = look_ahead(due, self._sizes, self._ahead, self._budget, self._limits.live)
        return (op for op in ops if not self._is_own(op))

    def _is_own(self, op: Op) -> bool:
        """Whether this rank issues an operation without the others."""
        return op.kind == "gather" and self._units[op.unit].gathers_alone

    def _exchange(self, wish: Sequence[Op]) -> list[Op]:
        """The window that follows from the wishes of all ranks."""
        wishes = self._show(wish)
        if wish[0] == END and all(other[0] in {END, STEP} for other in wishes):
            return [END]  # the others had ended this backward, or had none
        return common_window(wishes)

    def _show(self, wish: Sequence[Op]) -> list[list[Op]]:
        """Show a wish to the others, and see theirs."""
        count = len(self._units)
        numbers = [op.unit + (count if op.kind == "reduce" else 0) for op in wish]
        padded = [len(numbers), *numbers, *([0] * (_WINDOW - len(numbers)))]
        self._is_cut_off = True  # until the others have answered
        with Answered(self._mesh.rank, self._describe(wish[0])):
            answers = self._ask(padded)
        self._is_cut_off = False
        wishes = [[self._op(number) for number in answer[1 : 1 + answer[0]]] for answer in answers]
        aborting = [rank for rank, other in enumerate(wishes) if ABORT in other]
        if aborting and ABORT not in wish:
            self._is_aborting = True
            if word := next(filter(None, map(word_of, aborting)), ""):
                raise OffloadError(word)
            raise DistributedError(
                compose(
                    f"rank {self._mesh.rank} wants {self._describe(wish[0])}, but an exception "
                    f"made rank {aborting[0]} leave its backward.",
                    hint="see the error of that rank. To go on, catch this error on all ranks, "
                    "call engine.reset() and continue with the next batch.",
                )
            )
        return wishes

    def _op(self, number: int) -> Op:
        count = len(self._units)
        if number < 0:
            return _MARKS[number]
        return Op("gather", number) if number < count else Op("reduce", number - count)

    def _describe(self, op: Op) -> str:
        if op == STEP:
            return "to step"
        return (
            "its pass to end" if op.kind == "end" else f"to {op.kind} {self._units[op.unit].name}"
        )

    # Issuing

    def _issue(self, op: Op) -> None:
        unit = self._units[op.unit]
        if op.kind == "gather":
            # Where the unit is in use already, the gather only serves other ranks.
            if not unit.is_full:
                self._make_room(op.unit)
                self._ahead.append(op.unit)
            unit.gather()
            return
        if op.unit in self._ready:
            self._ready.remove(op.unit)
        # One reduction under way at a time bounds the memory of full gradients.
        self._settle()
        unit.reduce()
        self._reducing = unit
        self._issued.add(op.unit)
        if not self._limits.overlap:
            self._settle()

    def _settle(self) -> None:
        if self._reducing is not None:
            self._reducing.settle()
            self._reducing = None

    def _complete_window(self) -> None:
        """Issue what is left of the window, wanted or not."""
        while self._window:
            op = self._window.popleft()
            if op.kind == "gather":
                self._trim(op.unit)
            self._issue(op)

    def _trim(self, coming: int) -> None:
        """Make room in the budget by dropping what was gathered in vain, oldest first."""
        while self._ahead and not self._fits(coming):
            self._units[self._ahead.pop(0)].free()

    def _make_room(self, coming: int) -> None:
        """Free kept units, those that are needed last first."""
        while self._kept and not self._is_room_for(self._sizes[coming]):
            self._units[self._kept.pop(0)].free()

    def _fits(self, coming: int) -> bool:
        if self._budget is None:
            return not self._ahead
        return sum(self._sizes[unit] for unit in (*self._ahead, coming)) <= self._budget

    def _run_ahead(self) -> None:
        """Issue what may start now: gathers within the budget, reductions that are ready."""
        while self._window:
            op = self._window[0]
            if op.kind == "reduce":
                may_start = op.unit in self._ready
            else:  # a unit in use is freed and gathered again, not gathered now
                may_start = (
                    self._fits(op.unit)
                    and not self._units[op.unit].is_full
                    and self._units[op.unit].store.is_at_hand
                    and self._is_room_for(self._sizes[op.unit])
                )
            if not may_start:
                break
            self._issue(self._window.popleft())
        self._gather_ahead()
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Let shards that are to be gathered be brought nearer, across the marks of the pass."""
        for reader in self._readers:
            reader.expect(self._to_read())

    def _to_read(self) -> Iterator[Store]:
        gathered = {*self._ahead, *self._kept}
        for op in self._coming():
            if op.kind != "gather":
                continue
            if op.unit in gathered:  # for its next use, and not for those after it
                gathered.remove(op.unit)
            else:
                yield self._units[op.unit].store

    def _gather_ahead(self) -> None:
        """Start what this rank gathers alone and is about to need, within the budget."""
        if not self._has_own or (self._budget is None and self._ahead):
            return
        for op in self._expected():
            if not self._is_own(op) or op.unit in self._ahead:
                continue
            is_in_use = self._units[op.unit].is_full  # and freed before it is needed again
            if is_in_use or not self._fits(op.unit) or not self._is_room_for(self._sizes[op.unit]):
                return
            self._issue(op)

    # What hooks call

    def need(self, unit: Unit) -> None:
        """Make a unit's parameters readable now.

        Raises:
            OffloadError: this rank's shard cannot be read. The pass is over on all ranks.
        """
        try:
            self._need(unit)
        except OffloadError:
            self._is_aborting = True
            raise

    def _need(self, unit: Unit) -> None:
        index = self._index[unit]
        op = Op("gather", index)
        if unit.is_full and index not in self._ahead:
            if index in self._kept:
                self._kept.remove(index)
                self._note(op)
            unit.wait()
            return
        self._note(op)
        if index in self._ahead:
            self._ahead.remove(index)
        else:
            self._fetch(op)
        unit.wait()
        self._run_ahead()

    def take(self, unit: Unit) -> bool:
        """Make a unit readable if it happens to be full; say whether it is."""
        index = self._index[unit]
        if unit.is_full:
            if index in self._ahead:
                self._ahead.remove(index)
            unit.wait()
        return unit.is_full

    def _fetch(self, op: Op) -> None:
        """Issue operations up to this gather, agreeing on a new window if it is not in this one."""
        if self._is_own(op):
            self._issue(op)
            self._ahead.remove(op.unit)
            return
        while True:
            if self._window and op not in self._window:
                self._trust = _WINDOW_AFTER_A_MISS
            while self._window:
                head = self._window.popleft()
                if head.kind == "gather" and head != op:
                    self._trim(head.unit)
                self._issue(head)
                if head == op:
                    self._ahead.remove(op.unit)
                    return
            self._agree([op])

    def ready(self, unit: Unit) -> None:
        """A unit's gradient is complete: reduce it in its turn."""
        index = self._index[unit]
        self._note(Op("reduce", index))
        self._ready.append(index)
        if not self._window:
            self._agree([])
        self._run_ahead()

    def finish(self, reducible: Iterable[Unit]) -> None:
        """End of backward: every rank has reduced every one of these units, used or not."""
        for unit in reducible:
            index = self._index[unit]
            if index not in self._ready and (unit.has_gradient or index not in self._issued):
                self._ready.append(index)
        self._complete_window()
        self._ready = [
            index
            for index in sorted(set(self._ready), reverse=True)
            if self._units[index].has_gradient or index not in self._issued
        ]
        window: list[Op] = []
        while END not in window:
            wish = [*(Op("reduce", index) for index in self._ready), END][:_WINDOW]
            window = self._exchange(wish)
            self._window.extend(op for op in window if op != END)
            self._complete_window()
        self._settle()
        self._issued.clear()
        self._drop_ahead()
        self._close_record()

    def end_forward(self, kind: str) -> None:
        """End of the outermost forward: serve the others until all of them are there.

        The caller may go on to a collective of its own, and a rank that waits there serves nobody.
        """
        is_own = self._kind == kind  # else this forward runs inside a pass of another kind
        expects_backward = is_own and kind != "forward"
        if self._gathers and expects_backward and not self._is_cut_off:
            self._note(END_FORWARD)
            self._expect_backward()
        if self._in_forward and not (self._is_cut_off or self._is_aborting):
            due = self._expected() if expects_backward else ()
            wish = self._look_ahead(due)
            # No reductions: a rank that gives its batch up would lose what others contribute.
            self._leave_forward([*takewhile(lambda op: op.kind == "gather", wish)])
        if is_own and not expects_backward:
            self._drop_ahead()
            self._close_record()

    def _leave_forward(self, next_wish: Sequence[Op]) -> None:
        """Take part in windows until no rank wants more in forward; agree on the next one, too."""
        self._in_forward = False
        while True:
            self._complete_window()
            window = self._exchange([END_FORWARD, *next_wish[: self._trust]][:_WINDOW])
            at_end = not window or window[0] == END_FORWARD
            self._window.extend(op for op in window if op != END_FORWARD)
            if at_end:
                return

    def meet(self, edited: Sequence[Unit] = (), overlooked: Sequence[Unit] = ()) -> None:
        """All ranks step together: serve those that are still in a forward or a backward.

        Args:
            edited: units that this rank has edited, which all ranks are to have edited.
            overlooked: those whose edits would be lost on this rank.

        Raises:
            UsageError: on every rank, if another one has edited other units, or loses an edit.
        """
        self._complete_window()
        notes = [Op("gather", self._index[unit]) for unit in edited]
        notes += [Op("reduce", self._index[unit]) for unit in overlooked]
        wishes = self._show([STEP, *notes][:_WINDOW])
        while any(wish[0] != STEP for wish in wishes):
            self._window.extend(common_window(wishes))
            self._complete_window()
            wishes = self._show([STEP, *notes][:_WINDOW])
        shown = [wish[1:] for wish in wishes]
        while any(len(wish) == _WINDOW for wish in wishes):
            notes = notes[_WINDOW - 1 :]
            wishes = self._show([STEP, *notes][:_WINDOW])
            shown = [[*before, *wish[1:]] for before, wish in zip(shown, wishes, strict=True)]
        self._check_edits(shown)
        self._settle()
        self._issued.clear()
        self._drop_ahead()

    def _check_edits(self, notes: Sequence[Sequence[Op]]) -> None:
        """Refuse to step with edits that not all ranks have, or that the step would undo."""
        for rank, ops in enumerate(notes):
            for op in ops:
                name, hint = self._units[op.unit].name, "zeroshard.gathered(..., modifier_rank=0)."
                if op.kind == "reduce":
                    raise UsageError(
                        compose(
                            f"{name} was edited on rank {rank} through its .data; the master "
                            "weights, which the step updates, know nothing of that, and the edit "
                            "would be lost.",
                            hint="edit the parameter itself, under torch.no_grad() and on every "
                            f"rank, or inside {hint}",
                        )
                    )
                others = [other for other, theirs in enumerate(notes) if op not in theirs]
                if others:
                    raise UsageError(
                        compose(
                            f"{name} was edited on rank {rank} and not on rank {others[0]}: their "
                            "weights would not be the same any more.",
                            hint=f"edit it on every rank, or inside {hint}",
                        )
                    )

    def reset(self, in_backward: bool, word: str = "") -> None:
        """Give up the pass under way, in a way that the other ranks can follow.

        Args:
            in_backward: all ranks are to give it up.
            word: what is lost to this rank for good, which all of them raise then.
        """
        if word:
            leave_word(word)
        if self._is_cut_off:
            self._window.clear()
        self._complete_window()
        if self._is_cut_off:
            pass  # nobody is there to be told
        elif in_backward or self._is_aborting:
            # Gradients of this pass are lost on this rank, so they must be on all.
            while self._exchange([ABORT]) != [ABORT]:
                pass
            if word:
                forget_word()
        elif self._in_forward:
            self._leave_forward([])
        self._in_forward = self._is_aborting = False
        self._drop_ahead()
        self._settle()
        self._ready.clear()
        self._issued.clear()
        self._clear_record()
        self._cursor = self._mirrored = None

    def _drop_ahead(self) -> None:
        self._drop_kept()
        while self._ahead:
            self._units[self._ahead.pop()].free()
