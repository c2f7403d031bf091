"""From whatever the user passes to plain JSON values: reading, comments, duplicate keys.

A file may hold `//`, `#` and `/* */` comments and trailing commas, which people write because
DeepSpeed reads Hjson. The rest of Hjson (bare words, missing commas) is not accepted: it turns
typing mistakes into other values. Comments are replaced by blanks of the same shape, so the line
and column of an error are those of the file.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zeroshard.config.values import ascii_only, is_block, is_list, is_mapping, shorten, show
from zeroshard.errors import ConfigError, compose

__all__ = ["Source", "decode", "read"]

_STRING = r'"(?:[^"\\\n]|\\.)*"?'
_COMMENT = re.compile(rf"({_STRING})|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
# A comma after an opening bracket or another comma is a mistake, not a trailing comma.
_TRAILING_COMMA = re.compile(rf"({_STRING}|[\[{{,:]\s*,)|,(?=\s*[\]}}])")
_BASE64 = re.compile(r"[A-Za-z0-9_-]+={0,2}")

_FORMS = "pass a dict, the path of a JSON file, or JSON in url-safe base64."


@dataclass(frozen=True, slots=True)
class Source:
    """A configuration as plain values, before any key was looked at."""

    name: str
    """What errors call it: the path as it was given, or words for a dict."""

    values: dict[str, object]
    """The object at the top."""

    duplicates: tuple[str, ...] = ()
    """Dotted paths of keys that are written more than once."""


def read(source: str | Path | Mapping[str, object]) -> Source:
    """Read a dict, the path of a JSON file, or JSON in url-safe base64."""
    name = "the config dict"
    _check_kind(source)
    try:
        if isinstance(source, Mapping):
            return Source(name, _plain_mapping(source))
        if isinstance(source, str):
            text = _from_base64(source)
            if text is not None:
                return decode(text, "the base64 config")
            if not source:
                raise ConfigError(compose("the path of the configuration is empty.", hint=_FORMS))
            source = Path(source)
        name = ascii_only(str(source))
        return decode(_read_file(source, name), name)
    except RecursionError:
        raise _too_deep(name) from None


def _check_kind(source: object) -> None:
    if not isinstance(source, str | Path | Mapping):
        raise ConfigError(
            compose(f"a configuration cannot be loaded from {show(source)}.", hint=_FORMS)
        )


def decode(text: str, name: str) -> Source:
    """Decode JSON with comments and trailing commas."""
    try:
        value: object = json.loads(_strict(text), object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise ConfigError(
            compose(
                f"{name} is not JSON: {error.msg.removesuffix(' at')} "
                f"at line {error.lineno}, column {error.colno}.",
                hint="comments and trailing commas are allowed; all else has to be JSON.",
            )
        ) from None
    except ValueError:
        raise ConfigError(
            compose(f"{name} holds a number of thousands of digits.", hint="write it shorter.")
        ) from None
    except RecursionError:
        raise _too_deep(name) from None
    duplicates: list[str] = []
    values = _without_pairs(value, "", duplicates)
    if not is_block(values):
        raise ConfigError(
            compose(f"{name} holds {show(values)}, not an object.", hint="write { ... } around it.")
        )
    return Source(name, values, tuple(duplicates))


def _too_deep(name: str) -> ConfigError:
    return ConfigError(
        compose(
            f"{name} is nested too deeply, or holds itself.",
            hint="no key needs more than a few levels; look for a missing bracket.",
        )
    )


def _strict(text: str) -> str:
    """Blank out comments and trailing commas, outside strings, keeping every position."""
    without_comments = _COMMENT.sub(lambda match: match[1] or re.sub(r"[^\n]", " ", match[0]), text)
    return _TRAILING_COMMA.sub(lambda match: match[1] or " ", without_comments)


class _Pairs:
    """A decoded object, with its keys as often as they were written."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        self.pairs = pairs


def _without_pairs(value: object, path: str, duplicates: list[str]) -> object:
    """Turn decoded objects into dicts, collecting the keys that are lost by that."""
    if is_list(value):
        return [
            _without_pairs(item, f"{path}[{index}]", duplicates) for index, item in enumerate(value)
        ]
    if not isinstance(value, _Pairs):
        return value
    plain: dict[str, object] = {}
    for key, item in value.pairs:
        dotted = f"{path}.{ascii_only(key)}" if path else ascii_only(key)
        if key in plain and dotted not in duplicates:
            duplicates.append(dotted)
        plain[key] = _without_pairs(item, dotted, duplicates)
    return plain


def _plain_mapping(value: Mapping[str, object] | Mapping[object, object]) -> dict[str, object]:
    """Copy nested mappings and lists, so that nothing later changes under the configuration."""
    plain: dict[str, object] = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise ConfigError(
                compose(
                    f"the config dict has the key {show(key)}, which is not a string.",
                    hint="keys are strings, as in JSON.",
                )
            )
        plain[key] = _plain(item)
    return plain


def _plain(value: object) -> object:
    if is_mapping(value):
        return _plain_mapping(value)
    return [_plain(item) for item in value] if is_list(value) else value


def _from_base64(source: str) -> str | None:
    """Decode base64 if it holds what may be an object; a plain path never does."""
    if not _BASE64.fullmatch(source):
        return None
    try:
        padded = source.rstrip("=") + "=" * (-len(source.rstrip("=")) % 4)
        text = base64.urlsafe_b64decode(padded).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return text if text.lstrip().startswith(("{", "//", "/*", "#")) else None


def _read_file(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            compose(
                f"{name} is not text: byte {error.start} is not UTF-8.",
                hint="save the file as UTF-8.",
            )
        ) from None
    except FileNotFoundError:
        fact = f"the configuration file {shorten(name)} does not exist."
    except IsADirectoryError:
        fact = f"{name} is a directory, not a configuration file."
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        fact = f"the configuration file {shorten(name)} cannot be read: {cause}."
    raise ConfigError(
        compose(
            fact,
            hint="this looks like JSON text: pass json.loads(text)." if "{" in name else _FORMS,
        )
    )
