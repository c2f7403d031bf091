"""The examples: their text, their model, and the scripts themselves through the launcher."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_lm  # noqa: E402 - the examples are scripts, found by the path set above
from llama import Llama, LlamaConfig, rotary_tables, rotate, sample  # noqa: E402
from stdlib_text import (  # noqa: E402
    HELD_OUT_EVERY,
    load_text,
    random_windows,
    spread_windows,
    unigram_entropy,
)

SMALL = LlamaConfig(context=16, num_layers=2, dim=32, hidden_dim=48)


def run_example(script: str, *options: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "zeroshard", "--num_gpus", str(ranks)]
    return subprocess.run(
        [*launcher, str(EXAMPLES / script), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"},
    )


# Text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(HELD_OUT_EVERY + 2):
        (tmp_path / f"m{index:02}.py").write_bytes(bytes([index]) * (index + 1))
    (tmp_path / "_sysconfigdata_x.py").write_bytes(b"\xff" * 50)
    (tmp_path / "notes.txt").write_bytes(b"\xfe" * 50)
    return tmp_path


def test_every_tenth_file_is_held_out_whole(folder: Path) -> None:
    train, held_out = load_text(folder)
    held = {0, HELD_OUT_EVERY}
    assert held_out.tolist() == [index for index in sorted(held) for _ in range(index + 1)]
    trained = [index for index in range(HELD_OUT_EVERY + 2) if index not in held]
    assert train.tolist() == [index for index in trained for _ in range(index + 1)]


def test_the_standard_library_gives_the_same_split_twice() -> None:
    (train, held_out), again = load_text(), load_text()
    assert train.dtype == held_out.dtype == torch.uint8
    assert len(train) > 5 * len(held_out) > 500_000
    assert torch.equal(train, again[0]) and torch.equal(held_out, again[1])


def test_unigram_entropy_of_even_text_is_the_logarithm_of_its_alphabet() -> None:
    text = torch.arange(256, dtype=torch.uint8).repeat(100)
    assert unigram_entropy(text, text) == pytest.approx(math.log(256))


def test_unigram_entropy_is_the_cross_entropy_of_the_two_texts() -> None:
    train = torch.tensor([0] * 300 + [1] * 100, dtype=torch.uint8)
    held_out = torch.tensor([0, 1, 1, 2], dtype=torch.uint8)
    counts, total = (301, 101, 101, 1), 400 + 256
    expected = -sum(math.log(count / total) for count in counts) / 4
    assert unigram_entropy(train, held_out) == pytest.approx(expected)


def test_targets_are_the_inputs_one_byte_later() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    for x, y in (
        random_windows(text, 50, 16, torch.Generator().manual_seed(0)),
        spread_windows(text, 50, 16),
    ):
        assert x.shape == y.shape == (50, 16)
        assert torch.equal(y, x + 1)


def test_spread_windows_reach_from_the_first_byte_to_the_last() -> None:
    x, y = spread_windows(torch.arange(200, dtype=torch.uint8), 3, 16)
    assert (x[0, 0].item(), y[-1, -1].item()) == (0, 199)


# Model


@pytest.mark.parametrize("tied_head", [True, False])
def test_the_model_returns_logits_or_a_loss(tied_head: bool) -> None:
    model = Llama(LlamaConfig(context=16, num_layers=2, dim=32, hidden_dim=48, tied_head=tied_head))
    tokens = torch.randint(256, (3, 16))
    assert model(tokens).shape == (3, 16, 256)
    assert model(tokens, (tokens + 1) % 256).item() == pytest.approx(math.log(256), rel=0.02)
    assert (model.head.weight is model.embedding.weight) == tied_head


def test_a_position_sees_nothing_that_comes_later() -> None:
    model = Llama(SMALL)
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] += 1
    torch.testing.assert_close(model(tokens)[:, :10], model(changed % 256)[:, :10])


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    cos, sin = rotary_tables(32, 8, 10_000.0)
    q, k = (rotate(torch.randn(8).expand(32, 8), cos, sin) for _ in range(2))
    torch.testing.assert_close(q.norm(dim=1), q[0].norm().expand(32))
    products = q @ k.T
    torch.testing.assert_close(products[5, 2], products[25, 22])


def test_bf16_weights_work_with_fp32_rotary_tables() -> None:
    model = Llama(SMALL)
    for param in model.parameters():
        param.data = param.data.bfloat16()
    assert model(torch.randint(256, (1, 16))).dtype == torch.bfloat16


def test_sampling_continues_the_prompt_past_the_context() -> None:
    prompt = torch.tensor([[1, 2, 3]])
    tokens = sample(Llama(SMALL), prompt, 20, context=SMALL.context)
    assert tokens.shape == (1, 23)
    assert torch.equal(tokens[:, :3], prompt)


# Scripts


def test_the_learning_rate_rises_then_falls_to_a_twentieth() -> None:
    shares = [train_lm.warmup_then_cosine(step, num_steps=300) for step in range(301)]
    peak = shares.index(max(shares))
    assert abs(peak - train_lm.WARMUP_STEPS) <= 1
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert shares[-1] == pytest.approx(0.05)


def numbers(pattern: str, text: str) -> Sequence[float]:
    match = re.search(pattern, text)
    assert match is not None, f"{pattern!r} is not in:\n{text}"
    return [float(group) for group in match.groups()]


@pytest.mark.timeout(180)
def test_train_lm_runs_through_the_launcher(tmp_path: Path) -> None:
    config = json.loads((EXAMPLES / "ds_config.json").read_text())
    config |= {"gradient_accumulation_steps": 2}
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config))

    options = ["--steps", "25", "--batch", "2", "--deepspeed_config", str(path)]
    ended = run_example("train_lm.py", *options)

    assert ended.returncode == 0, ended.stderr
    out = ended.stdout
    (entropy,) = numbers(r"unigram entropy: ([\d.]+) nats", out)
    (before,) = numbers(r"held-out loss before: ([\d.]+) nats", out)
    (after,) = numbers(r"held-out loss after: ([\d.]+) nats", out)
    assert 2.5 < entropy < 4
    assert before == pytest.approx(math.log(256), rel=0.05)
    assert after < before - 0.5
    assert out.count("unigram entropy") == 1, "only rank 0 prints"
    assert re.search(r"step +50/50  loss [\d.]+  [\d,]+ tokens/s  [\d.]+ MB of state", out)
    assert "\ndef " in out
    assert "\x1b" not in out, "a file gets no terminal codes"
    for stage in (0, 1, 2, 3):
        cell = r"[^\d.]+([\d.]+) \(([\d.]+)\)"
        row = numbers(rf"(?m)^\W*{stage}\b{4 * cell}", out)
        for measured, formula in zip(row[::2], row[1::2], strict=True):
            assert measured == pytest.approx(formula, rel=0.01, abs=0.011)


@pytest.mark.timeout(120)
def test_hello_learns() -> None:
    ended = run_example("hello.py")
    assert ended.returncode == 0, ended.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", ended.stdout)]
    assert len(losses) == 5, "only rank 0 prints"
    assert losses[-1] < losses[0] / 2


@pytest.mark.timeout(120)
def test_offload_changes_what_is_where_and_no_loss(tmp_path: Path) -> None:
    ended = run_example("offload.py", "--nvme", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    row = r"loss ([\d.]+) +on the device +([\d.]+) MB +on the host +([\d.]+) MB +in files +([\d.]+)"
    rows = [tuple(map(float, found)) for found in re.findall(row, ended.stdout)]
    assert len(rows) == 5, "only rank 0 prints"
    losses, device, host, files = zip(*rows, strict=True)
    assert len(set(losses)) == 1
    assert list(device) == sorted(device, reverse=True)
    assert device[0] > device[1] > device[2] > 0 == device[4]
    assert host[0] == 0 < host[1] < host[2] < host[3] and files[:4] == (0, 0, 0, 0)
    assert host[3] == pytest.approx(device[0], rel=0.01) == files[4]
    assert list(tmp_path.iterdir()) == []
