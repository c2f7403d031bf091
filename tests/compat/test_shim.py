"""The package ``deepspeed`` itself: its names, what it refuses, and what it says then."""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import pickle
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from packaging.version import Version
from torch import nn

import deepspeed
import zeroshard
from forked import run_ranks

SHIM = Path(deepspeed.__file__).parent

# What Accelerate, Transformers, PEFT, TRL and Lightning look up, most of them after a bare import.
CONTRACT = """
    DeepSpeedEngine __version__ add_config_arguments checkpointing.configure comm.get_rank
    comm.init_distributed comm.is_initialized get_accelerator init_distributed initialize
    log_dist logger tp_model_init zero.GatheredParameters zero.Init
    zero.register_external_parameter checkpoint.utils.clone_tensors_for_torch_save
    checkpointing.checkpoint checkpointing.get_cuda_rng_tracker checkpointing.is_configured
    launcher.runner.DEEPSPEED_ENVIRONMENT_NAME ops.__compatible_ops__
    ops.adagrad.DeepSpeedCPUAdagrad ops.adam.DeepSpeedCPUAdam ops.adam.FusedAdam
    ops.aio.AsyncIOBuilder.NAME ops.lamb.FusedLamb ops.lion.DeepSpeedCPULion
    runtime.activation_checkpointing.checkpointing.checkpoint
    runtime.base_optimizer.DeepSpeedOptimizer runtime.engine.DeepSpeedEngine
    runtime.lr_schedules.VALID_LR_SCHEDULES runtime.lr_schedules.WarmupLR
    runtime.sequence_parallel.ulysses_sp.UlyssesSPAttentionHF
    runtime.sequence_parallel.ulysses_sp.UlyssesSPDataLoaderAdapter
    runtime.utils.move_to_device runtime.zero.partition_parameters.ZeroParamStatus.AVAILABLE
    runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3
    runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer utils.groups._get_sequence_parallel_group
    utils.groups._get_sequence_parallel_rank utils.groups._get_sequence_parallel_world_size
    utils.instrument_w_nvtx utils.logger utils.logging.logger utils.safe_get_full_fp32_param
    utils.safe_get_full_grad utils.set_z3_leaf_modules utils.z3_leaf_module
    utils.zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict
    utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint
    utils.zero_to_fp32.get_model_state_file utils.zero_to_fp32.get_optim_files
    utils.zero_to_fp32.load_state_dict_from_zero_checkpoint
    DeepSpeedEngine._consolidated_16bit_state_dict
    DeepSpeedEngine._zero3_consolidated_16bit_state_dict DeepSpeedEngine.backward
    DeepSpeedEngine.compile DeepSpeedEngine.destroy DeepSpeedEngine.get_global_grad_norm
    DeepSpeedEngine.load_checkpoint DeepSpeedEngine.no_sync DeepSpeedEngine.save_checkpoint
    DeepSpeedEngine.set_gradient_accumulation_boundary DeepSpeedEngine.step
    DeepSpeedEngine.zero_gather_16bit_weights_on_model_save DeepSpeedEngine.zero_grad
"""


def run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, with folders at the front of its path."""
    prelude = f"import sys; sys.path[:0] = {[str(folder) for folder in path]!r}\n"
    command = [sys.executable, "-W", "error", "-c", prelude + code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def ended_with_import_error(code: str, *path: Path) -> str:
    ended = run(f"{code}\nimport deepspeed", *path)
    assert ended.returncode == 1, ended.stdout
    assert "ImportError: " in ended.stderr
    return ended.stderr


def resolve(chain: str) -> Any:
    found: Any = deepspeed
    for name in chain.split("."):
        found = getattr(found, name)
    return found


def modules() -> list[str]:
    files = [path.relative_to(SHIM.parent).with_suffix("") for path in SHIM.rglob("*.py")]
    return sorted(".".join(file.parts).removesuffix(".__init__") for file in files)


def test_a_bare_import_is_silent_and_quick_and_gives_every_name_of_the_contract() -> None:
    code = f"""
import deepspeed
assert "torch" not in sys.modules and "zeroshard" not in sys.modules

for chain in {CONTRACT.split()!r}:
    found = deepspeed
    for name in chain.split("."):
        found = getattr(found, name)
"""
    ended = run(code)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_deepspeed_of_another_folder_is_refused_with_the_command_that_mends_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise AssertionError\n")
    message = ended_with_import_error(f"sys.path.append({str(tmp_path)!r})", SHIM.parent)
    assert f"DeepSpeed itself is in {tmp_path / 'deepspeed'}" in message
    assert "pip uninstall -y deepspeed" in message
    assert "pip install . ./shim" in message


def test_a_deepspeed_that_is_only_registered_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deepspeed-0.16.4.dist-info").mkdir()
    message = ended_with_import_error("", SHIM.parent, tmp_path)
    assert f"registered by {tmp_path / 'deepspeed-0.16.4.dist-info'}" in message


def test_files_of_deepspeed_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    shutil.copytree(SHIM, tmp_path / "deepspeed")
    (tmp_path / "deepspeed" / "pipe").mkdir()
    message = ended_with_import_error("", tmp_path)
    assert "files of DeepSpeed itself (pipe) are in the same folder" in message


def test_entries_of_the_path_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    unreadable = tmp_path / ("a name too long for a file system " * 10)  # for root, too
    ended = run(
        "import deepspeed", tmp_path / "file", tmp_path / "nothing", unreadable, SHIM.parent
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_two_checkouts_of_zeroshard_do_not_disturb_each_other(tmp_path: Path) -> None:
    shutil.copytree(SHIM, tmp_path / "deepspeed")
    ended = run("import deepspeed", tmp_path, SHIM.parent)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_report_says_who_answers_to_the_name(tmp_path: Path) -> None:
    code = "from zeroshard.launch.report import _deepspeed; print(_deepspeed())"
    ended = run(code, SHIM.parent)
    assert "(zeroshard under this name, in " in ended.stdout, ended.stderr
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").touch()
    mixed = run(code, tmp_path, SHIM.parent)
    assert "(DeepSpeed itself, mixed with another one" in mixed.stdout, mixed.stderr


def test_the_version_passes_the_floors_that_libraries_ask_for() -> None:
    version = Version(importlib.metadata.version("deepspeed"))
    assert version == Version(deepspeed.__version__)
    assert version >= Version("0.18.2")


def test_names_are_zeroshards_own_objects() -> None:
    assert resolve("runtime.engine.DeepSpeedEngine") is zeroshard.Engine
    assert deepspeed.DeepSpeedEngine is zeroshard.Engine
    assert resolve("zero.Init") is zeroshard.zero.Init
    assert deepspeed.init_distributed is zeroshard.init_distributed
    assert deepspeed.DeepSpeedConfigError is zeroshard.ConfigError


@pytest.mark.parametrize(
    ("name", "autospec"),
    [
        ("initialize", False),
        ("init_distributed", True),
        ("zero.Init", False),
        ("DeepSpeedEngine", True),
        ("checkpointing.configure", False),
    ],
)
def test_names_can_be_patched_and_come_back(name: str, autospec: bool) -> None:
    before = resolve(name)
    with mock.patch(f"deepspeed.{name}", autospec=autospec):
        assert resolve(name) is not before
    assert resolve(name) is before


def test_every_module_imports_and_lists_its_names() -> None:
    for name in modules():
        module = import_module(name)
        listed = dir(module)
        assert listed == sorted(set(listed))
        for attribute in [*getattr(module, "__all__", []), *listed]:
            getattr(module, attribute)


@pytest.mark.parametrize(
    "statement",
    [
        "import deepspeed.moe",
        "from deepspeed.moe.layer import MoE",
        "from deepspeed import PipelineModule",
        "from deepspeed import init_inference",
        "import deepspeed.ops.sparse_attention",
        "from deepspeed.runtime.utils import see_memory_usage",
        "from deepspeed.runtime.fp16.loss_scaler import LossScaler",
        "from deepspeed.zero import TiledLinear",
    ],
)
def test_importing_what_is_not_there_says_what_is_instead(statement: str) -> None:
    with pytest.raises(ImportError, match="has no such name") as caught:
        exec(statement)
    hint = str(caught.value).partition("hint: ")[2]
    assert hint
    assert "drop-in.md" not in hint


def test_a_name_that_nobody_knows_is_refused_with_the_page_that_lists_them() -> None:
    with pytest.raises(AttributeError, match=r"deepspeed\.zero\.nonsense.*\n\nhint: .*drop-in\.md"):
        _ = deepspeed.zero.nonsense
    for statement in ("import deepspeed.nonsense", "from deepspeed.runtime.engine import nonsense"):
        with pytest.raises(ImportError, match=r"nonsense: .*\n\nhint: .*drop-in\.md"):
            exec(statement)
    assert not hasattr(deepspeed, "nonsense")


def test_tensor_and_sequence_parallelism_are_refused_where_they_would_divide_anything() -> None:
    model = nn.Linear(2, 2)
    assert deepspeed.tp_model_init(model, tp_size=1, dtype=torch.float32) is model
    with pytest.raises(zeroshard.UsageError, match="no tensor parallelism"):
        deepspeed.tp_model_init(model=model, tp_size=2, dtype=torch.float32, config=None)
    sequences = resolve("runtime.sequence_parallel.ulysses_sp")
    with pytest.raises(zeroshard.UsageError, match="no sequence parallelism"):
        sequences.UlyssesSPAttentionHF.register_with_transformers(model_name_or_path=model)
    with pytest.raises(zeroshard.UsageError, match="no sequence parallelism"):
        sequences.UlyssesSPDataLoaderAdapter([], sp_rank=0)


def test_each_rank_is_alone_in_every_parallelism_but_that_of_data() -> None:
    def rank(_: int, world: int) -> None:
        groups = deepspeed.utils.groups
        assert groups._get_data_parallel_world_size() == deepspeed.comm.get_world_size() == world
        assert groups._get_data_parallel_rank() == deepspeed.comm.get_rank()
        assert groups._get_sequence_parallel_world_size() == 1
        mine = torch.tensor([deepspeed.comm.get_rank()])
        alone = groups._get_sequence_parallel_group()
        deepspeed.comm.all_reduce(mine, group=alone)
        assert mine.item() == deepspeed.comm.get_rank()
        assert groups._get_sequence_parallel_group() is alone
        deepspeed.comm.all_reduce(mine)
        assert mine.item() == 1

    run_ranks(rank)


def test_batches_are_moved_with_their_containers() -> None:
    batch = {"x": torch.ones(2), "y": [torch.zeros(1), "text"]}
    moved = resolve("runtime.utils.move_to_device")(batch, "meta")
    assert moved["x"].is_meta
    assert moved["y"][0].is_meta
    assert moved["y"][1] == "text"


def test_scripts_learn_that_state_can_be_kept_on_nvme() -> None:
    builder = resolve("ops.aio.AsyncIOBuilder")
    assert deepspeed.ops.__compatible_ops__[builder.NAME] is True
    assert builder().is_compatible()


def test_copies_for_a_file_are_compact_and_tied_tensors_stay_tied() -> None:
    buffer = torch.arange(6.0)
    tied = buffer[:2]
    state = {"a": tied, "b": buffer[:2], "c": [buffer[2:]], "step": 3}
    saved = resolve("checkpoint.utils.clone_tensors_for_torch_save")(state)
    assert saved["a"].untyped_storage().nbytes() == 8
    assert saved["a"] is saved["b"]
    assert saved["step"] == 3
    torch.testing.assert_close(saved["c"][0], buffer[2:])
    buffer.zero_()
    assert saved["c"][0].sum() == 2 + 3 + 4 + 5


class Reader(nn.Module):
    """Reads a weight of a module inside it without calling that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        deepspeed.zero.register_external_parameter(self, self.second.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.first(x), self.second.weight)


NAMES = (
    *("ds_id", "ds_numel", "ds_shape", "ds_status", "ds_tensor", "ds_persist"),
    *("ds_active_sub_modules", "all_gather", "partition", "partition_numel"),
)


def shares_of(model: nn.Module) -> set[tuple[bool, ...]]:
    return {tuple(hasattr(param, name) for name in NAMES) for param in model.parameters()}


def started(stage: int, model: nn.Module, **zero: object) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage, **zero},
    }
    return deepspeed.initialize(model=model, config=config)[0]


@pytest.mark.parametrize("world", [1, 2])
def test_parameters_have_deepspeeds_attributes_at_stage_3_and_at_no_other(world: int) -> None:
    def rank(_: int, __: int) -> None:
        everything, nothing = {(True,) * len(NAMES)}, {(False,) * len(NAMES)}
        assert shares_of(Reader()) == nothing
        for stage in (0, 1, 2):
            engine = started(stage, Reader())
            assert shares_of(engine.module) == nothing
            engine.destroy()
        engine = started(3, Reader())
        assert shares_of(engine.module) == everything
        weight = engine.module.first.weight
        assert weight.ds_shape == torch.Size([8, 8])
        assert weight.ds_numel == 64
        assert weight.ds_tensor.shape == (weight.partition_numel(),)
        weight.ds_active_sub_modules.clear()
        assert len({param.ds_id for param in engine.module.parameters()}) == 3

    run_ranks(rank, world)


def test_the_status_of_a_parameter_follows_its_data_and_copies_are_plain() -> None:
    def rank(_: int, __: int) -> None:
        status = resolve("runtime.zero.partition_parameters.ZeroParamStatus")
        torch.manual_seed(0)
        reference = Reader()
        torch.manual_seed(0)
        model = started(3, Reader(), stage3_param_persistence_threshold=10).module
        weight, bias = model.first.weight, model.first.bias
        assert (weight.ds_status, weight.shape) == (status.NOT_AVAILABLE, (0,))
        assert (weight.ds_persist, bias.ds_persist) == (False, True)
        assert bias.ds_status is status.AVAILABLE
        with deepspeed.zero.GatheredParameters(model.parameters()):
            assert weight.ds_status is status.AVAILABLE
            assert shares_of(copy.deepcopy(model)) == {(False,) * len(NAMES)}
            for plain in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
                assert type(plain) is nn.Parameter
                assert torch.equal(plain, reference.first.weight)
                assert not hasattr(plain, "ds_id")
        handle = weight.all_gather(async_op=True)
        assert weight.ds_status is status.INFLIGHT
        handle.wait()
        assert torch.equal(weight, reference.first.weight)
        with torch.no_grad():
            weight.fill_(3.0)
        weight.partition(has_been_updated=True)
        assert weight.ds_status is status.NOT_AVAILABLE
        assert weight.ds_tensor.eq(3.0).all()
        weight.all_gather()
        assert weight.eq(3.0).all()
        weight.partition()
        named = list(model.ds_external_parameters())
        assert [(name, param is model.second.weight) for name, param in named] == [
            ("second.weight", True)
        ]
        assert list(model.first.ds_external_parameters()) == []

    run_ranks(rank)


def test_a_model_built_in_shards_has_the_attributes_before_there_is_an_engine() -> None:
    def rank(_: int, __: int) -> None:
        with deepspeed.zero.Init():
            model = Reader()
        plain = nn.Linear(2, 2)
        assert shares_of(model) == {(True,) * len(NAMES)}
        assert resolve("runtime.zero.is_zero_param")(model.first.weight)
        assert not resolve("runtime.zero.is_zero_param")(plain.weight)

    run_ranks(rank)


def test_marked_modules_show_the_mark() -> None:
    model = Reader()
    deepspeed.utils.set_z3_leaf_modules(model, [nn.Linear])
    assert model.first._z3_leaf is True
    assert model._z3_leaf is False
    assert all(hasattr(model, name) for name in dir(model))  # which the compiler takes for granted
    deepspeed.utils.unset_z3_leaf_modules(model, [nn.Linear])
    assert model.first._z3_leaf is False


def test_messages_for_some_ranks_come_from_zeroshards_logger(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "zeroshard"):
        deepspeed.log_dist("to the first", ranks=[0])
        deepspeed.log_dist("to the second", ranks=[1])
        deepspeed.log_dist("to all")
    assert [record.getMessage() for record in caplog.records] == [
        "[rank 0] to the first",
        "[rank 0] to all",
    ]


def test_optimizers_of_deepspeeds_names_step_as_torchs_do() -> None:
    def trained(make: Any, **options: Any) -> torch.Tensor:
        torch.manual_seed(1)
        model = nn.Linear(4, 3)
        optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1, **options)
        for _ in range(3):
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.weight.detach()

    def rank(_: int, __: int) -> None:
        ops = deepspeed.ops
        pairs = [
            (trained(ops.adam.DeepSpeedCPUAdam), trained(torch.optim.AdamW)),
            (trained(ops.adam.DeepSpeedCPUAdam, adamw_mode=False), trained(torch.optim.Adam)),
            (trained(ops.adam.FusedAdam), trained(torch.optim.AdamW)),
            (trained(ops.adam.FusedAdam, adam_w_mode=False), trained(torch.optim.Adam)),
            (trained(ops.adagrad.DeepSpeedCPUAdagrad), trained(torch.optim.Adagrad)),
        ]
        for ours, torchs in pairs:
            torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-7)
        lions = (ops.lion.DeepSpeedCPULion, ops.lion.FusedLion, zeroshard.optim.Lion)
        first, *others = map(trained, lions)
        assert all(torch.equal(first, other) for other in others)
        with pytest.raises(zeroshard.UsageError, match="bias_correction"):
            trained(ops.adam.DeepSpeedCPUAdam, bias_correction=False)

    run_ranks(rank, 1)


def test_the_accelerator_answers_what_scripts_ask() -> None:
    device = deepspeed.get_accelerator()
    assert device is resolve("accelerator.get_accelerator")()
    assert device.device_name() == device.current_device_name() == "cpu"
    assert device.communication_backend_name() == "gloo"
    assert device.is_available()
    assert device.memory_allocated() > 0
    assert device.supported_dtypes() == [torch.float32, torch.float16, torch.bfloat16]
    assert device.is_fp16_supported()
    assert device.on_accelerator(torch.ones(1))
    device.empty_cache()
    with pytest.raises(AttributeError, match=r"torch\.cpu has no such name"):
        device.graph_capture()
