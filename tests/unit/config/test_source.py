"""Reading: forms of a source, comments, trailing commas, duplicates, and broken files."""

from __future__ import annotations

import base64
import json
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeroshard.config import Config, load
from zeroshard.config.source import decode
from zeroshard.errors import ConfigError

Write = Callable[[str], Path]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)

COMMENTED = r"""
// A comment before anything, with "quotes" and a { bracket
{
  # another style
  "train_micro_batch_size_per_gpu": 4, // trailing
  /* over
     lines */
  "optimizer": {
    "type": "AdamW", /* inside */
    "params": {"note": "not // a # comment, /* nor */ this ,}", "quote": "\" // \\", "list": [1, ]},
  }, // the last comma is one too many
}
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_text(text: str) -> Path:
        path = tmp_path / "ds_config.json"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def message(source: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(source)  # type: ignore[arg-type]  (wrong kinds are the point of some tests)
    return str(caught.value)


def test_a_dict_a_path_and_base64_give_the_same_config(write: Write) -> None:
    values = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}
    text = json.dumps(values)
    path = write(text)
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    assert (
        load(values)
        == load(path)
        == load(str(path))
        == load(encoded)
        == load(encoded.rstrip("="))
        == load(types.MappingProxyType(values))
    )


def test_comments_and_trailing_commas_are_read_and_strings_keep_theirs(write: Write) -> None:
    config = load(write(COMMENTED))
    assert config.train_micro_batch_size_per_gpu == 4
    assert config.optimizer is not None
    assert config.optimizer.params == {
        "note": "not // a # comment, /* nor */ this ,}",
        "quote": '" // \\',
        "list": [1],
    }


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_bytes(b'\xef\xbb\xbf{"train_batch_size": 8}')
    assert load(path).train_batch_size == 8


def test_a_syntax_error_is_placed_where_the_file_has_it(write: Write) -> None:
    text = message(write('{\n  // a comment, /* of many\n  "train_batch_size" 8\n}'))
    assert "is not JSON: Expecting ':' delimiter at line 3, column 22." in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[,]",
        "{,}",
        '{"a": [1,,]}',
        '{"a": ,}',
        '{"a": 1 "b": 2}',
        "/* never closed",
        '{"a": "never closed}',
        '{"a": "two\nlines"}',
        "{'a': 1}",
        "stage: 2",
    ],
)
def test_text_that_is_not_json_is_refused_with_its_place(write: Write, text: str) -> None:
    assert "is not JSON: " in message(write(text))
    assert "line " in message(write(text))


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "null"])
def test_json_that_is_not_an_object_is_refused(write: Write, text: str) -> None:
    assert "not an object" in message(write(text))


def test_duplicate_keys_are_refused_at_every_level(write: Write) -> None:
    text = message(
        write('{"fp16": {"enabled": true, "enabled": false}, "steps_per_print": 1, "fp16": {}}')
    )
    assert 'duplicate key "fp16.enabled"' in text
    assert 'duplicate key "fp16"' in text
    assert "2 problems" in text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing.json"
    assert f"the configuration file {path} does not exist" in message(path)
    assert "the configuration file missing does not exist" in message("missing")


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    assert "is a directory" in message(tmp_path)


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_bytes(b'{"a": "\xff"}')
    assert "byte 7 is not UTF-8" in message(path)


@pytest.mark.parametrize("source", ["", "a\0b", "x" * 5000, 3, None, ["ds_config.json"], b"{}"])
def test_anything_else_is_refused(source: object) -> None:
    text = message(source)
    assert "hint: pass a dict, the path of a JSON file, or JSON in url-safe base64" in text
    assert len(text) < 600


def test_json_text_is_told_from_a_path() -> None:
    assert "pass json.loads(text)" in message('{"train_batch_size": 8}')


def test_endless_nesting_is_refused(write: Write) -> None:
    assert "nested too deeply" in message(write("[" * 100_000))
    loop: dict[str, object] = {}
    loop["fp16"] = loop
    assert "nested too deeply" in message(loop)


def test_numbers_too_long_for_python_are_refused(write: Write) -> None:
    assert "digits" in message(write('{"train_batch_size": ' + "1" * 5000 + "}"))
    assert "a number of thousands of digits" in message({"gradient_clipping": 10**5000})


def test_keys_that_are_not_strings_are_refused() -> None:
    assert "has the key 1, which is not a string" in message({1: 2})
    assert "has the key 1, which is not a string" in message({"fp16": {1: 2}})


def test_a_config_does_not_follow_later_changes_of_its_dict() -> None:
    betas = [0.9, 0.999]
    values: dict[str, object] = {"optimizer": {"type": "Adam", "params": {"betas": betas}}}
    config = load(values)
    betas.append(0.5)
    assert config.optimizer is not None
    assert config.optimizer.params == {"betas": [0.9, 0.999]}


def test_messages_are_ascii(write: Write) -> None:
    assert message(write('{"n\u00e9": 1, "fp16": {"enabled": "\\ud800"}}')).isascii()
    assert message("n\u00e9.json").isascii()


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_strict_json_decodes_as_the_standard_library_does(value: object) -> None:
    for indent in (None, 2):
        text = json.dumps({"value": value}, indent=indent)
        assert repr(decode(text, "text").values) == repr(json.loads(text))


known = st.sampled_from(
    [
        *Config.model_fields,
        "bfloat16",
        "stage",
        "enabled",
        "loss_scale",
        "units",
        "type",
        "params",
        "offload_param",
        "device",
        "tensor_parallel",
        "amp",
        "compression_training",
    ]
)
values_near_configs = st.recursive(
    scalars | st.just("auto") | st.binary(max_size=3) | st.tuples(st.integers()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(known | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(known | st.text(max_size=5), values_near_configs, max_size=6))
def test_any_dict_gives_a_config_or_a_config_error(values: dict[str, object]) -> None:
    try:
        assert isinstance(load(values), Config)
    except ConfigError as error:
        assert str(error).isascii()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_truncated_and_damaged_json_gives_a_config_or_a_config_error(data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(COMMENTED)))
    start = data.draw(st.integers(0, end))
    inserted = data.draw(st.text(alphabet='{}[]",:/*#\\\n1e', max_size=4))
    text = COMMENTED[:start] + inserted + COMMENTED[end:]
    for damaged in (COMMENTED[:end], text):
        encoded = base64.urlsafe_b64encode(damaged.encode()).decode()
        for source in (encoded, damaged):
            try:
                load(source)
            except ConfigError:
                continue
        try:
            decode(damaged, "text")
        except ConfigError:
            continue
