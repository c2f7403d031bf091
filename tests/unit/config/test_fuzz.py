"""Two thousand damaged files: each is a configuration or one clear error, and nothing else."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeroshard.config import Config, Facts, Given, explain, load
from zeroshard.config.keys import ALIASES
from zeroshard.config.override import override
from zeroshard.config.source import read
from zeroshard.config.table import TABLE
from zeroshard.errors import ConfigError

KNOWN = sorted([*TABLE, *ALIASES])
SEEDS = [
    path.read_text(encoding="utf-8") for path in (Path(__file__).parent / "seeds").glob("*.json")
]
FACTS = Facts(
    dtype="fp16", hidden_size=64, given={("optimizer", "params", "lr"): Given(0.1, "args.lr")}
)
ODD = ["auto", "", "\u00e9\u2028", "\ud800", "Infinity", "cpu", "nvme", "bf16", "AdamW", "x" * 500]
NUMBERS = [0, 1, -1, 3, 10**30, -(10**400), 5e8, 0.5, 1e308, math.inf, -math.inf, math.nan]


def value(rng: random.Random, depth: int = 0) -> object:
    """Draw a value that most keys do not take."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return rng.choice([True, False, None])
    if kind in (1, 2):
        return rng.choice(NUMBERS)
    if kind in (3, 4):
        return rng.choice(ODD)
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
    names = [rng.choice(rng.choice(KNOWN)) for _ in range(rng.randrange(3))]
    return {rng.choice([name, name[:-1], "k\u00e9y"]): value(rng, depth + 1) for name in names}


def put(values: dict[str, object], path: tuple[str, ...], new: object) -> None:
    for part in path[:-1]:
        inner = values.get(part)
        if not isinstance(inner, dict):
            inner = values[part] = {}
        values = inner
    values[path[-1]] = new


def wrong_values(rng: random.Random) -> str:
    values: dict[str, object] = {}
    for _ in range(rng.randrange(1, 8)):
        put(values, rng.choice(KNOWN), value(rng))
    return json.dumps(values)


def random_keys(rng: random.Random) -> str:
    values: dict[str, object] = {}
    for _ in range(rng.randrange(1, 5)):
        path = list(rng.choice(KNOWN))
        name = path[rng.randrange(len(path))]
        end = rng.randrange(len(name) + 1)
        path[-1] = name[:end] + rng.choice(["", "x", "_", "\u00fc", ".", "1"]) + name[end + 1 :]
        put(values, tuple(path), value(rng))
    return json.dumps(values, ensure_ascii=rng.random() < 0.5)


def changed(rng: random.Random) -> str:
    values = json.loads(rng.choice(SEEDS))
    for _ in range(rng.randrange(1, 4)):
        put(values, rng.choice(KNOWN), rng.choice([True, False, None, "auto", 1, 64, 0.5]))
    return json.dumps(values)


def truncated(rng: random.Random) -> str:
    text = rng.choice(SEEDS)
    return text[: rng.randrange(len(text))]


def damaged(rng: random.Random) -> str:
    text = rng.choice(SEEDS)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text))
        text = (
            text[:at] + rng.choice('{}[]",:/*#\n 01e-+tfnN\\\u00e9') + text[at + rng.randrange(3) :]
        )
    return text


def nested(rng: random.Random) -> str:
    inside = json.dumps(value(rng))
    for _ in range(rng.choice([2, 20, 2000])):
        key = json.dumps(rng.choice(rng.choice(KNOWN)))
        inside = rng.choice([f"[{inside}]", f"{{{key}: {inside}}}"])
    return f'{{"fp16": {inside}}}'


def doubled(rng: random.Random) -> str:
    one, two = wrong_values(rng)[1:-1], wrong_values(rng)[1:-1]
    return f"{{{one}, {two}, {one}}}"


KINDS = (wrong_values, changed, random_keys, truncated, damaged, nested, doubled)


def check(attempt: Callable[[], object]) -> bool:
    """Tell whether a configuration came out; anything but a clear error is raised."""
    try:
        attempt()
    except ConfigError as error:
        text = str(error)
        assert text.isascii()
        assert len(text.splitlines()[0]) < 2000
        return False
    return True


@pytest.mark.parametrize("part", range(8))
def test_two_thousand_files_end_in_a_configuration_or_a_clear_error(
    part: int, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    accepted = 0
    for number in range(part * 250, (part + 1) * 250):
        rng = random.Random(number)
        text = KINDS[number % len(KINDS)](rng)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        ranks = rng.randrange(1, 9)
        alone = check(lambda: load(path))
        asked = check(lambda: load(path, FACTS))
        assert alone or not asked, "facts only ever ask for more"
        assert check(lambda: explain(path)) == alone
        assert check(lambda: explain(path, facts=FACTS)) == asked
        check(partial(explain, path, world=ranks))
        accepted += alone
    assert 5 < accepted < 200  # both ends of the road are taken


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
odd_values = st.recursive(
    scalars | st.just("auto"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@given(st.lists(st.tuples(st.sampled_from(KNOWN), odd_values), max_size=6))
def test_any_values_of_known_keys_give_a_config_or_a_clear_error(
    assigned: list[tuple[tuple[str, ...], object]],
) -> None:
    values: dict[str, object] = {}
    for path, new in assigned:
        put(values, path, new)
    for facts in (None, FACTS):
        try:
            assert isinstance(load(values, facts), Config)
        except ConfigError as error:
            assert str(error).isascii()


@given(st.lists(st.text(max_size=30)), st.sampled_from(KNOWN), odd_values)
def test_any_assignments_are_set_or_refused(
    texts: list[str], path: tuple[str, ...], new: object
) -> None:
    assignments = [f"{'.'.join(path)}={json.dumps(new)}", *texts]
    try:
        override(read({"zero_optimization": True, "fp16": {"enabled": 1}}), assignments)
    except ConfigError as error:
        assert str(error).isascii()
