"""The command `zeroshard io-bench`: what buses, host and drive give, and what that is worth.

The rates come from :mod:`zeroshard.core.rates`; here they are asked for, and turned into what a
step of a model of so many parameters would take.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from zeroshard.errors import UsageError, compose
from zeroshard.host.memory import bytes_free, in_words

__all__ = ["BusRate", "DriveRate", "Model", "Rates", "Room", "io_bench", "what_it_means"]

_GIB = 1 << 30
_MIB = 1 << 20
_STATE_BYTES = 12  # of a parameter: master weight and two moments, in fp32
_LARGEST_BUFFER = 256 * _MIB
_NO_LIMIT = 10_000


@dataclass(frozen=True)
class DriveRate:
    """What a file gave with one choice of settings."""

    block_bytes: int
    depth: int
    write_bytes_per_second: float
    read_bytes_per_second: float
    both_ways_bytes_per_second: float


@dataclass(frozen=True)
class BusRate:
    """What copies between the host and some devices gave, all of these together."""

    gpus: int
    to_gpu_bytes_per_second: float
    to_host_bytes_per_second: float
    both_ways_bytes_per_second: float


@dataclass(frozen=True)
class Rates:
    """What was measured."""

    bus: tuple[BusRate, ...]
    host_copy_bytes_per_second: float
    update_parameters_per_second: float
    update_bytes_per_second: float
    threads: int
    drive: tuple[DriveRate, ...]
    drive_is_direct: bool


@dataclass(frozen=True)
class Room:
    """What there is to take, in bytes and in parameters whose state that holds."""

    host_bytes_free: int
    drive_bytes_free: int

    @property
    def host_parameters(self) -> float:
        """How many parameters' state fits into host memory."""
        return self.host_bytes_free / _STATE_BYTES

    @property
    def drive_parameters(self) -> float:
        """How many parameters' state fits on the drive."""
        return self.drive_bytes_free / _STATE_BYTES


@dataclass(frozen=True)
class Model:
    """What a step of a model with all of its optimizer state off the device costs at these rates.

    Attributes:
        parameters: how many it has.
        state_bytes: master weights and two moments in fp32.
        bus_seconds: to move the state to the devices and back, both ways at once; None without any.
        update_seconds: to update it on the host instead.
        drive_seconds: to read it from the drive and write it back, both at once.
        fits_host: whether the state fits into host memory that is free.
        fits_drive: whether it fits on the drive.
    """

    parameters: float
    state_bytes: float
    bus_seconds: float | None
    update_seconds: float
    drive_seconds: float
    fits_host: bool
    fits_drive: bool


@dataclass(frozen=True)
class Found:
    """All that the command has to say."""

    path: str
    rates: Rates
    room: Room
    models: tuple[Model, ...]


def what_it_means(parameters: float, rates: Rates, room: Room) -> Model:
    """Work out what a model of so many parameters would take at the best of these rates."""
    nbytes = _STATE_BYTES * parameters
    bus = max((found.both_ways_bytes_per_second for found in rates.bus), default=None)
    drive = max(found.both_ways_bytes_per_second for found in rates.drive)
    return Model(
        parameters=parameters,
        state_bytes=nbytes,
        bus_seconds=None if bus is None else 2 * nbytes / bus,
        update_seconds=parameters / rates.update_parameters_per_second,
        drive_seconds=2 * nbytes / drive,
        fits_host=nbytes <= room.host_bytes_free,
        fits_drive=nbytes <= room.drive_bytes_free,
    )


@click.command("io-bench", short_help="Measure buses, host and a drive, for offloading.")
@click.argument(
    "path", type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True)
)
@click.option(
    "--size",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    metavar="GIB",
    help="Size of the file. Caches of a drive that are larger make it look faster than it is.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Least time of one measurement.",
)
@click.option(
    "--block-size",
    "--block_size",
    "blocks",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    default=(1, 4, 16),
    show_default=True,
    metavar="MIB",
    help="What one request of the drive moves; may be repeated.",
)
@click.option(
    "--depth",
    "depths",
    type=click.IntRange(1, 64),
    multiple=True,
    default=(1, 8, 32),
    show_default=True,
    metavar="N",
    help="Requests of the drive at once, in each direction; may be repeated.",
)
@click.option(
    "--parameters",
    type=click.FloatRange(min=1),
    multiple=True,
    default=(1e9, 8e9, 32e9, 70e9),
    metavar="N",
    help="Size of a model to work it out for, such as 8e9; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print an object for programs.")
def io_bench(
    path: Path,
    *,
    size: float,
    seconds: float,
    blocks: Sequence[float],
    depths: Sequence[int],
    parameters: Sequence[float],
    as_json: bool,
) -> None:
    """Measure what offloading can get out of this host and the drive of the folder PATH.

    That is: copies between host and GPUs, copies within the host, the optimizer's update on the
    host, and a file that is written and read around the page cache. The file has no name and goes
    away by itself. Nothing else should run on the host meanwhile.
    """
    from zeroshard.core.files import free_bytes  # noqa: PLC0415 - torch takes a moment

    nbytes = max(round(size * _GIB), 1)
    free = free_bytes(path)
    if nbytes > free:
        raise UsageError(
            compose(
                f"the file would take {in_words(nbytes)} in {path}, and {in_words(free)} are free.",
                hint="name a smaller --size, or another folder.",
            )
        )
    settings = [(max(round(block * _MIB), 1), depth) for block in blocks for depth in depths]
    rates = _measure(path, nbytes, seconds, settings)
    room = Room(host_bytes_free=bytes_free() or 0, drive_bytes_free=free)
    models = tuple(what_it_means(count, rates, room) for count in parameters)
    found = Found(str(path), rates, room, models)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        click.echo(_as_tables(found))


def _measure(path: Path, nbytes: int, seconds: float, settings: Sequence[tuple[int, int]]) -> Rates:
    import torch  # noqa: PLC0415 - as above

    from zeroshard.core import rates  # noqa: PLC0415
    from zeroshard.core.files import ALIGNMENT, FileSettings  # noqa: PLC0415

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    buffer = -(-min(nbytes, _LARGEST_BUFFER) // ALIGNMENT) * ALIGNMENT

    def over(chosen: Sequence[torch.device]) -> BusRate:
        found = rates.bus(chosen, buffer, seconds)
        return BusRate(len(chosen), found.to_devices, found.to_host, found.both_ways)

    device = devices[0] if devices else torch.device("cpu")
    source, target = rates.host_memory(device, 2, buffer)
    source.view(torch.int64).random_()
    drives: list[DriveRate] = []
    is_direct = True
    for number, (block, depth) in enumerate(settings, 1):
        _say(f"measuring the drive, {number} of {len(settings)}")
        found = rates.drive(path, FileSettings(block, depth), nbytes, (source, target), seconds)
        drives.append(DriveRate(block, depth, found.write, found.read, found.both_ways))
        is_direct = is_direct and found.is_direct
    _say("measuring the host")
    copied = rates.host_copy(buffer, seconds)
    updated = rates.host_update(buffer // 4, seconds)
    if devices:
        _say("measuring the bus")
    buses = [over(devices[:1])] if devices else []
    if len(devices) > 1:
        buses.append(over(devices))
    return Rates(
        bus=tuple(buses),
        host_copy_bytes_per_second=copied,
        update_parameters_per_second=updated,
        update_bytes_per_second=updated * rates.BYTES_OF_AN_UPDATE,
        threads=torch.get_num_threads(),
        drive=tuple(drives),
        drive_is_direct=is_direct,
    )


def _say(what: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"{what} ...", err=True)


def _as_tables(found: Found) -> str:
    """Lay it out in text that needs neither colour nor a terminal."""
    from rich.console import Console  # noqa: PLC0415 - only this command draws

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _NO_LIMIT
    console = Console(width=width, color_system=None, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        for part in _parts(found):
            console.print(part)
            console.print()
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _parts(found: Found) -> Iterator[object]:
    rates, room = found.rates, found.room
    rows: list[tuple[str, ...]] = []
    for bus in rates.bus:
        gpus = "1 GPU" if bus.gpus == 1 else f"{bus.gpus} GPUs at once"
        rows += [
            (f"host to {gpus}", _gb(bus.to_gpu_bytes_per_second), ""),
            (f"{gpus} to host", _gb(bus.to_host_bytes_per_second), ""),
            (f"host and {gpus}, both ways", _gb(bus.both_ways_bytes_per_second), "sum of both"),
        ]
    threads = f"{rates.threads} thread{'s' * (rates.threads > 1)}"
    rows.append(("copy within host memory", _gb(rates.host_copy_bytes_per_second), threads))
    update = f"{rates.update_parameters_per_second / 1e9:.2f} billion parameters/s, {threads}"
    rows.append(("fused AdamW on the host", _gb(rates.update_bytes_per_second), update))
    yield _table(("memory", "GB/s", ""), rows)
    if not rates.bus:
        yield "No GPU is visible, so no bus was measured."
    yield _table(
        (
            f"drive of {found.path}",
            "requests at once",
            "write GB/s",
            "read GB/s",
            "sum of both at once",
        ),
        [
            (
                f"blocks of {drive.block_bytes / _MIB:g} MiB",
                str(drive.depth),
                _gb(drive.write_bytes_per_second),
                _gb(drive.read_bytes_per_second),
                _gb(drive.both_ways_bytes_per_second),
            )
            for drive in rates.drive
        ],
    )
    if not rates.drive_is_direct:
        yield "The file system does not take direct I/O, so the page cache is in these rates."
    host = f"{room.host_bytes_free / _GIB:.1f} GiB of host memory that are free hold"
    drive = f"{room.drive_bytes_free / _GIB:.1f} GiB of the drive"
    yield (
        f"At {_STATE_BYTES} bytes of state per parameter, the {host} "
        f"{room.host_parameters / 1e9:.1f} billion parameters, and the {drive} "
        f"{room.drive_parameters / 1e9:.1f} billion. Seconds per step:"
    )
    yield _table(
        ("parameters", "state", "bus, in and out", "or update on host", "drive, in and out"),
        [
            (
                f"{model.parameters / 1e9:g} billion",
                f"{model.state_bytes / 1e9:.0f} GB",
                _seconds(model.bus_seconds, model.fits_host),
                _seconds(model.update_seconds, model.fits_host),
                _seconds(model.drive_seconds, model.fits_drive),
            )
            for model in found.models
        ],
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> object:
    from rich.table import Table  # noqa: PLC0415 - as above

    table = Table(box=None)
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if title and number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _gb(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f}"


def _seconds(seconds: float | None, fits: bool) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f}" if fits else f"{seconds:.2f} (no room)"
