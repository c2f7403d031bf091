"""Kinds of values: what a key accepts, and what an error says that it accepts.

Values are taken strictly: `true` is not 1 and "8" is not 8. The one liberty is DeepSpeed's, that
a whole number may be written as 5e8.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from zeroshard.config.values import is_auto, is_block, is_sequence

__all__ = [
    "Anything",
    "Block",
    "Budget",
    "Count",
    "CountOrNone",
    "Device",
    "DtypeName",
    "Flag",
    "FlagOrNone",
    "Fraction",
    "FractionOrNone",
    "Kernels",
    "Kind",
    "LargestNumel",
    "LargestNumelFromOne",
    "Name",
    "Names",
    "NamesOrAuto",
    "NamesOrNone",
    "NotNegative",
    "PathOrNone",
    "Positive",
    "ScalePower",
    "SizeOrNone",
    "Stage",
    "StepsPerPrint",
    "Text",
    "Where",
    "Whole",
    "expected",
    "misfit",
    "one_of",
]

Kind: TypeAlias = Any
"""An annotated type; there is no narrower word for these in Python's type system."""

# A number that fp32 can still hold: larger loss scales are infinite in every compute dtype.
_LARGEST_SCALE_POWER = 127
_LAST_STAGE = 3

_DTYPES = {
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
}


def expected(what: str) -> PydanticCustomError:
    """Make the error of a value of the wrong kind; the caller adds the key and the value."""
    return PydanticCustomError("expected", "{expected}", {"expected": what})


def misfit(kind: Kind, value: object) -> str | None:
    """Say what a kind accepts, if it does not accept a value."""
    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return str(first.get("ctx", {}).get("expected", first["msg"]))
    return None


@cache
def _adapter(kind: Kind) -> TypeAdapter[object]:
    return TypeAdapter(kind)


def _whole(
    least: int | None = None, most: int | None = None, *, nullable: bool = False
) -> BeforeValidator:
    what = "a whole number"
    what += "" if least is None else f" of at least {least}"
    what += "" if most is None else f" and at most {most}"
    what += " or null" if nullable else ""

    def check(value: object) -> int | None:
        if value is None and nullable:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise expected(what)
        if (least is not None and value < least) or (most is not None and value > most):
            raise expected(what)
        return value

    return BeforeValidator(check)


def _bound(least: int) -> BeforeValidator:
    """Check a largest number of elements, of which only the whole part can matter."""
    what = f"a number of elements of at least {least} or null"

    def check(value: object) -> int | None:
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise expected(what)
        if value < least or not (isinstance(value, int) or math.isfinite(value)):
            raise expected(what)
        return int(value)

    return BeforeValidator(check)


def _number(what: str, fits: Callable[[float], bool]) -> BeforeValidator:
    def check(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise expected(what)
        try:
            number = float(value)
        except OverflowError:
            raise expected(what) from None
        if not math.isfinite(number) or not fits(number):
            raise expected(what)
        return number

    return BeforeValidator(check)


def _budget(value: object) -> object:
    if value is None or is_auto(value):
        return value
    message = misfit(NotNegative, value)
    if message is not None:
        raise expected('"auto", a number of GiB of at least 0 or null')
    return value


def _fraction_or_none(value: object) -> object:
    if value is not None and misfit(Fraction, value) is not None:
        raise expected("a number from 0 to 1 or null")
    return value


def _flag(*, nullable: bool = False) -> BeforeValidator:
    def check(value: object) -> bool | None:
        if isinstance(value, bool) or (value is None and nullable):
            return value
        raise expected("true, false or null" if nullable else "true or false")

    return BeforeValidator(check)


def _stage(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LAST_STAGE:
        return value
    raise expected("0, 1, 2 or 3")


def _dtype(value: object) -> str | None:
    if value is None:
        return None
    name = _DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    if name is None:
        raise expected('"fp32", "fp16", "bf16" or null')
    return name


def _steps_per_print(value: object) -> object:
    if isinstance(value, str | float) and value in ("Infinity", "inf", math.inf):
        return None
    return value


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _name(value: object) -> object:
    if not _is_name(value):
        raise expected("a name")
    return value


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise expected("text")
    return value


def _names(value: object) -> object:
    if not is_sequence(value):
        raise expected("a list of names")
    return value


def _names_or_none(value: object) -> object:
    return None if value is None else _names(value)


def _names_or_auto(value: object) -> object:
    if value is None:
        return ()
    if is_auto(value):
        return value
    # Checked here to the last item, as pydantic would report an item once per form of the value.
    if not (is_sequence(value) and all(_is_name(item) for item in value)):
        raise expected('"auto" or a list of names')
    return value


def _choice(*choices: str) -> BeforeValidator:
    """One of some words; null is the first of them."""
    *most, last = (f'"{choice}"' for choice in choices)
    wanted = f"{', '.join(most)} or {last}"

    def check(value: object) -> object:
        if value is None:
            return choices[0]
        if value not in choices:
            raise expected(wanted)
        return value

    return BeforeValidator(check)


def _path(value: object) -> object:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if path is not None and not _is_name(path):
        raise expected("a path or null")
    return path


def _block(value: object) -> object:
    if not is_block(value):
        raise expected("an object")
    return value


def one_of(*choices: str) -> Kind:
    """Make the kind of a word from a list, in any case."""
    quoted = [f'"{choice}"' for choice in choices]

    def check(value: object) -> object:
        if isinstance(value, str) and value.lower() in {choice.lower() for choice in choices}:
            return value
        raise expected(f"{', '.join(quoted[:-1])} or {quoted[-1]}")

    return Annotated[str, BeforeValidator(check)]


Anything: Kind = object
Budget = Annotated[Literal["auto"] | float | None, BeforeValidator(_budget)]
Block = Annotated[dict[str, object], BeforeValidator(_block)]
Count = Annotated[int, _whole(1)]
CountOrNone = Annotated[int | None, _whole(1, nullable=True)]
Device = Annotated[Literal["none", "cpu", "nvme"], _choice("none", "cpu", "nvme")]
DtypeName = Annotated[Literal["fp32", "fp16", "bf16"] | None, BeforeValidator(_dtype)]
Flag = Annotated[bool, _flag()]
FlagOrNone = Annotated[bool | None, _flag(nullable=True)]
Fraction = Annotated[float, _number("a number from 0 to 1", lambda x: 0 <= x <= 1)]
FractionOrNone = Annotated[float | None, BeforeValidator(_fraction_or_none)]
Kernels = Annotated[Literal["auto", "fused", "torch"], _choice("auto", "fused", "torch")]
LargestNumel = Annotated[int | None, _bound(0)]
LargestNumelFromOne = Annotated[int | None, _bound(1)]
Name = Annotated[str, BeforeValidator(_name)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_names)]
NamesOrAuto = Annotated[Literal["auto"] | tuple[Name, ...], BeforeValidator(_names_or_auto)]
NamesOrNone = Annotated[tuple[Name, ...] | None, BeforeValidator(_names_or_none)]
NotNegative = Annotated[float, _number("a finite number of at least 0", lambda x: x >= 0)]
PathOrNone = Annotated[str | None, BeforeValidator(_path)]
Positive = Annotated[float, _number("a finite number greater than 0", lambda x: x > 0)]
ScalePower = Annotated[int, _whole(0, _LARGEST_SCALE_POWER)]
SizeOrNone = Annotated[int | None, _whole(0, nullable=True)]
Stage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(_stage)]
StepsPerPrint = Annotated[CountOrNone, BeforeValidator(_steps_per_print)]
Text = Annotated[str, BeforeValidator(_text)]
Transfer = Annotated[Literal["auto", "nccl", "copy_engine"], _choice("auto", "nccl", "copy_engine")]
Where = Annotated[Literal["auto", "gpu", "cpu"], _choice("auto", "gpu", "cpu")]
Whole = Annotated[int, _whole()]
