"""What configure() settles, what it refuses, and what it says has no effect."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import zeroshard
from zeroshard import checkpointing
from zeroshard.checkpointing import process
from zeroshard.checkpointing.settings import Settings, model_parallel_axis
from zeroshard.config import load
from zeroshard.core.mesh import Axis

BLOCK = {
    "partition_activations": False,
    "cpu_checkpointing": True,
    "contiguous_memory_optimization": True,
    "number_checkpoints": 4,
    "synchronize_checkpoint_boundary": True,
}
CONFIG = {"train_micro_batch_size_per_gpu": 1, "activation_checkpointing": BLOCK}


@pytest.fixture(autouse=True)
def _a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_process", process._Process())


def settings() -> Settings:
    return process._process.settings


def mpu(family: str, size: int = 2, rank: int = 1) -> Any:
    return SimpleNamespace(
        **{
            f"get_{family}_world_size": lambda: size,
            f"get_{family}_rank": lambda: rank,
            f"get_{family}_group": lambda: "group",
        }
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_scripts_reach_the_calls_through_the_package() -> None:
    assert zeroshard.checkpointing is checkpointing
    assert checkpointing.__all__ == sorted(checkpointing.__all__)
    assert all(callable(getattr(checkpointing, name)) for name in checkpointing.__all__)


def test_the_number_of_layers_alone_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    assert not checkpointing.is_configured()
    checkpointing.configure(num_checkpoints=24)
    assert checkpointing.is_configured()
    assert settings() == Settings(num_checkpoints=24)
    assert warnings(caplog) == []


@pytest.mark.parametrize("form", ["dict", "path", "text path", "loaded"])
def test_the_block_is_read_from_any_form_of_a_configuration(form: str, tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(CONFIG))
    forms: dict[str, Any] = {
        "dict": CONFIG,
        "path": path,
        "text path": str(path),
        "loaded": load(CONFIG),
    }
    checkpointing.configure(deepspeed_config=forms[form])
    assert settings() == Settings(
        on_host=True, contiguous=True, num_checkpoints=4, synchronize=True
    )


def test_arguments_go_before_the_block_unless_they_are_none() -> None:
    checkpointing.configure(
        None,
        CONFIG,
        contiguous_checkpointing=False,
        num_checkpoints=7,
        checkpoint_in_cpu=None,
        synchronize=False,
    )
    assert settings() == Settings(on_host=True, num_checkpoints=7)


def test_a_second_call_replaces_the_first_as_a_whole() -> None:
    checkpointing.configure(checkpoint_in_cpu=True, num_checkpoints=3)
    checkpointing.configure(synchronize=True)
    assert settings() == Settings(synchronize=True)


def test_single_settings_change_later() -> None:
    checkpointing.configure(mpu("model_parallel"), checkpoint_in_cpu=True)
    checkpointing.set_num_layers(5)
    checkpointing.partition_activations_in_checkpoint(True)
    checkpointing.reset()
    axis = Axis(2, 1, "group", "group")  # type: ignore[arg-type]
    assert settings() == Settings(axis, partition=True, on_host=True, num_checkpoints=5)


@pytest.mark.parametrize("family", ["tensor_model_parallel", "slice_parallel", "model_parallel"])
def test_every_kind_of_mpu_names_the_group(family: str) -> None:
    axis = model_parallel_axis(mpu(family, size=4, rank=3))
    assert (axis.size, axis.rank, axis.gather) == (4, 3, "group")


def test_the_tensor_parallel_group_goes_before_the_model_parallel_one() -> None:
    both = SimpleNamespace(
        **vars(mpu("tensor_model_parallel", 2)), **vars(mpu("model_parallel", 8))
    )
    assert model_parallel_axis(both).size == 2


@pytest.mark.parametrize("alone", [None, mpu("model_parallel", size=1, rank=0)])
def test_a_single_rank_is_no_group(alone: object) -> None:
    assert model_parallel_axis(alone) == Axis(1, 0)


def test_an_mpu_that_names_no_group_is_refused() -> None:
    with pytest.raises(zeroshard.UsageError, match="SimpleNamespace, does not say which ranks"):
        checkpointing.configure(SimpleNamespace(get_model_parallel_rank=lambda: 0))


@pytest.mark.parametrize("number", [0, -1, True, 2.5, "4"])
def test_a_number_of_checkpoints_that_is_none_is_refused(number: Any) -> None:
    with pytest.raises(zeroshard.UsageError, match="num_checkpoints must be a whole number from 1"):
        checkpointing.configure(num_checkpoints=number)
    with pytest.raises(zeroshard.UsageError, match="num_checkpoints"):
        checkpointing.set_num_layers(number)
    assert settings() == Settings()
    assert not checkpointing.is_configured()


def test_one_buffer_waits_for_the_number_of_its_places(caplog: pytest.LogCaptureFixture) -> None:
    """A script that has no say over the number, as behind a trainer's switches, still trains."""
    checkpointing.configure(checkpoint_in_cpu=True, contiguous_checkpointing=True)
    (text,) = warnings(caplog)
    assert 'nothing says how many places its buffer has. Set "number_checkpoints"' in text
    assert settings().num_slots == 0
    checkpointing.set_num_layers(3)
    assert settings().num_slots == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"partition_activations": True}, "partition_activations has no effect"),
        ({"contiguous_checkpointing": True}, "contiguous_memory_optimization has no effect"),
        ({"profile": True}, "profile has no effect"),
    ],
)
def test_what_has_no_effect_is_said_once(
    arguments: dict[str, bool], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointing.configure(**arguments)  # type: ignore[arg-type]
    checkpointing.reset()
    checkpointing.set_num_layers(2)
    (text,) = warnings(caplog)
    assert text.startswith(said)


def test_what_has_an_effect_is_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    checkpointing.configure(
        mpu("model_parallel"), partition_activations=True, contiguous_checkpointing=True,
        num_checkpoints=2, synchronize=True,
    )  # fmt: skip
    assert warnings(caplog) == []
