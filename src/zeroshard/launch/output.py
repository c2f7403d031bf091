"""What a rank writes: passed on as it comes, with its last lines kept for a failure message."""

from __future__ import annotations

import fcntl
import os
import re
import select
import termios
import time
import tty
from collections.abc import Callable

__all__ = ["STDERR", "Output", "is_writable"]

STDERR = 2
_KEPT_BYTES = 1 << 16
_READ_BYTES = 1 << 16
_SHOWN = 1000  # characters of one line
_READS = 64  # more than a pipe or a pseudo-terminal holds
_WAIT_S = 0.2  # between looks at whether the sink still matters
_TRACEBACK = b"Traceback (most recent call last)"
# torch puts "[rank3]: " before each line of a traceback.
_RANK_PREFIX = re.compile(rb"^\[rank\d+\]:\s?")
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Output:
    """One rank's stream from the rank's end, ``writer``, to a sink such as the console.

    Where the sink is a terminal, the rank's end is one too, so that progress bars and colors are
    what they would be without a launcher between.

    Where nobody reads the sink, the rank waits, as it would without a launcher. Once ``is_ending``
    holds, what the sink does not take is dropped: it must not keep anything from ending.
    """

    def __init__(
        self,
        sink: int,
        on_loss: Callable[[OSError], None],
        is_ending: Callable[[], object] = lambda: False,
    ) -> None:
        self._sink = sink
        self._is_ending = is_ending
        self._on_loss: Callable[[OSError], None] | None = on_loss
        self.reader, self.writer = _pseudo_terminal(sink) if os.isatty(sink) else os.pipe()
        os.set_blocking(self.reader, False)
        self._kept = bytearray()
        self._interrupts: _InterruptFilter | None = None
        self.traceback_time_s = 0.0  # since the epoch, of the last one seen

    def started(self) -> None:
        """Leave the writing end to the rank."""
        os.close(self.writer)

    def pass_on(self) -> bool:
        """Pass on what is there to read; False once the stream has ended."""
        for _ in range(_READS):  # not forever: others want to be heard too
            try:
                data = os.read(self.reader, _READ_BYTES)
            except BlockingIOError:
                return True
            except OSError:  # the end of a pseudo-terminal
                return False
            if not data:
                return False
            self._kept += data
            del self._kept[:-_KEPT_BYTES]
            if _TRACEBACK in data:
                self.traceback_time_s = time.time()
            self._write(self._interrupts.feed(data) if self._interrupts else data)
        return True

    def drop_interrupts(self) -> None:
        """Keep tracebacks of KeyboardInterrupt from now on to ourselves."""
        self._interrupts = self._interrupts or _InterruptFilter()

    def last_lines(self, count: int) -> list[str]:
        """Return the last traceback and what follows it, or else the last lines, at most some."""
        text = _ESCAPE.sub("", self._kept.decode(errors="replace"))
        # Of a progress bar only the last state counts.
        lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
        lines = [line if len(line) <= _SHOWN else f"{line[:_SHOWN]} ..." for line in lines if line]
        starts = [number for number, line in enumerate(lines) if _TRACEBACK.decode() in line]
        if starts and len(lines) - starts[-1] > count:
            return [lines[starts[-1]], "  ...", *lines[-count:]]
        return lines[starts[-1] :] if starts else lines[-count:]

    def close(self) -> None:
        """Write what is held back, and let go of the stream."""
        self.pass_on()
        if self._interrupts:
            self._write(self._interrupts.flush())
        os.close(self.reader)

    def _write(self, data: bytes) -> None:
        try:
            while data:
                if is_writable(self._sink, timeout_s=0 if self._is_ending() else _WAIT_S):
                    # A pipe that can be written to takes so much without waiting.
                    data = data[os.write(self._sink, data[: select.PIPE_BUF]) :]
                elif self._is_ending():
                    return
        except BrokenPipeError:
            return  # a reader that went away (`zeroshard ... | head`) must not end the training
        except OSError as error:
            if self._on_loss is not None:
                self._on_loss(error)
            self._on_loss = None


def is_writable(sink: int, *, timeout_s: float) -> bool:
    """Tell whether something can be written now, or within some time."""
    return bool(select.select([], [sink], [], timeout_s)[1])


class _InterruptFilter:
    """Drops tracebacks that end in KeyboardInterrupt: each rank has one after Ctrl-C."""

    def __init__(self) -> None:
        self._partial = b""
        self._traceback: list[bytes] = []

    def feed(self, data: bytes) -> bytes:
        *lines, self._partial = (self._partial + data).split(b"\n")
        return b"".join(self._line(line + b"\n") for line in lines)

    def flush(self) -> bytes:
        held = b"".join(self._traceback) + self._partial
        self._traceback, self._partial = [], b""
        return held

    def _line(self, line: bytes) -> bytes:
        text = _RANK_PREFIX.sub(b"", line)
        if not self._traceback and not text.startswith(_TRACEBACK):
            return line
        self._traceback.append(line)
        if len(self._traceback) == 1 or text.startswith(b" "):
            return b""
        held, self._traceback = self._traceback, []
        return b"" if text.startswith(b"KeyboardInterrupt") else b"".join(held)


def _pseudo_terminal(like: int) -> tuple[int, int]:
    """Open a pseudo-terminal of the size of another terminal, and return its two ends."""
    reader, writer = os.openpty()
    tty.setraw(writer)  # the bytes are treated once, by the terminal they end up on
    size = fcntl.ioctl(like, termios.TIOCGWINSZ, bytes(8))
    fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
    return reader, writer
