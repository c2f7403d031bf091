from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroshard.launch.output import Output, _InterruptFilter

TRACEBACK = b'Traceback (most recent call last):\n  File "train.py", line 1\n    fail()\n'


class Stream:
    """A rank's stream into a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses: list[OSError] = []
        self.sink = os.open(path, os.O_RDWR | os.O_CREAT)
        self.output = Output(self.sink, self.losses.append)

    def write(self, data: bytes) -> None:
        os.write(self.output.writer, data)
        self.output.pass_on()


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[Stream]:
    stream = Stream(tmp_path / "sink")
    yield stream
    os.close(stream.sink)


def test_bytes_pass_unchanged_and_the_last_lines_are_kept(stream: Stream) -> None:
    data = b"".join(b"line %d \xff\r\n" % number for number in range(20_000))
    for start in range(0, len(data), 4096):
        stream.write(data[start : start + 4096])
    assert stream.path.read_bytes() == data
    assert [line[:10] for line in stream.output.last_lines(2)] == ["line 19998", "line 19999"]


def test_the_last_lines_begin_at_the_last_traceback(stream: Stream) -> None:
    stream.write(b"before\n" + TRACEBACK + b"ValueError: one\nbetween\n" + TRACEBACK)
    stream.write(b"ValueError: two\nafter\n")
    lines = stream.output.last_lines(40)
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2:] == ["ValueError: two", "after"]
    assert len(lines) == 5
    assert stream.output.last_lines(2) == [lines[0], "  ...", "ValueError: two", "after"]


def test_colors_and_overwritten_states_are_left_out_of_the_last_lines(stream: Stream) -> None:
    stream.write(b"\r 10%\r 20%\r\x1b[31m100%\x1b[0m\r\n\n\x1b[2Kdone\n")
    assert stream.output.last_lines(9) == ["100%", "done"]


def test_a_line_without_end_is_cut_where_it_is_repeated(stream: Stream) -> None:
    stream.write(b"x" * 40000)
    assert stream.output.last_lines(3) == ["x" * 1000 + " ..."]
    assert stream.path.stat().st_size == 40000


def test_the_stream_ends_with_its_last_writer(stream: Stream) -> None:
    os.write(stream.output.writer, b"end")
    stream.output.started()
    assert not stream.output.pass_on()
    assert stream.path.read_bytes() == b"end"


def test_a_full_disk_is_told_once() -> None:
    losses: list[OSError] = []
    full = os.open("/dev/full", os.O_WRONLY)
    output = Output(full, losses.append)
    for _ in range(2):
        os.write(output.writer, b"line\n")
        output.pass_on()
    os.close(full)
    assert [error.strerror for error in losses] == ["No space left on device"]
    assert output.last_lines(1) == ["line"]


def test_tracebacks_of_interrupts_are_dropped_and_nothing_else(stream: Stream) -> None:
    stream.write(TRACEBACK + b"KeyboardInterrupt\nshown before\n")
    stream.output.drop_interrupts()
    kept = b"saving\n" + TRACEBACK + b"ValueError: disk\nsaved\n"
    interrupt = TRACEBACK + b"KeyboardInterrupt\n"
    of_torch = b"".join(b"[rank1]: " + line for line in interrupt.splitlines(keepends=True))
    stream.write(interrupt + kept + of_torch + b"no newline")
    stream.output.close()
    shown = TRACEBACK + b"KeyboardInterrupt\nshown before\n" + kept + b"no newline"
    assert stream.path.read_bytes() == shown


@given(
    st.lists(st.sampled_from([b"text\n", b"  indented\n", TRACEBACK, b"E: x\n", b"\n", b"end"])),
    st.integers(1, 50),
)
def test_what_is_no_interrupt_is_never_dropped_however_it_is_cut(
    parts: list[bytes], size: int
) -> None:
    data = b"".join(parts)
    chosen = _InterruptFilter()
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    assert b"".join(map(chosen.feed, chunks)) + chosen.flush() == data
