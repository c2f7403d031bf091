"""Arithmetic on made-up spans, and what a profile says about a made-up step."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from side_by_side.profiles import (
    Activity,
    activities,
    hidden,
    kind_of,
    overlap,
    summarize,
    union,
)

points = st.integers(0, 40)
spans = st.lists(st.tuples(points, points), max_size=8)


def covered(found: list[tuple[int, int]]) -> set[int]:
    """The unit intervals that lie in a span."""
    return {at for start, end in found for at in range(start, end)}


@given(spans)
def test_a_union_covers_the_same_and_its_spans_are_apart(found: list[tuple[int, int]]) -> None:
    merged = union(found)
    assert covered(merged) == covered(found)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(merged))


@given(spans, spans)
def test_an_overlap_is_as_long_as_what_both_cover(
    first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    assert overlap(first, second) == overlap(second, first) == len(covered(first) & covered(second))


def test_two_gathers_at_once_are_one_stretch_of_time_to_hide() -> None:
    assert hidden([(0, 10), (5, 15)], [(0, 6), (4, 9)]) == pytest.approx(9 / 15)
    assert hidden([(0, 10)], [(10, 20)]) == 0
    assert hidden([], [(0, 1)]) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "gather"),
        ("Memcpy PtoP (Device -> Device)", "gather"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "reduce"),
        ("ncclSymkDevKernel_ReduceScatter_LD_sum_bf16", "reduce"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "reduce"),
        ("ncclDevKernel_SendRecv", "other communication"),
        ("Memcpy DtoD (Device -> Device)", "copy on device"),
        ("Memcpy HtoD (Pinned -> Device)", "copy to or from host"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTN", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float, 4, ...>>", "optimizer"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "elementwise and other"),
    ],
)
def test_a_kernel_is_known_by_its_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_step_is_summed_up_by_kind_hidden_share_and_idle_time() -> None:
    compute, side = 7, 20
    found = [
        Activity("gemm a", compute, 0, 1000),
        Activity("gemm b", compute, 1500, 2500),
        Activity("ncclDevKernel_AllGather", side, 500, 1500),  # 500 under a, 500 under nothing
        Activity("ncclDevKernel_ReduceScatter", 21, 1600, 2000),  # under b
        Activity("copies of gradients", 21, 1200, 1600),  # which hide nothing
        Activity("Memcpy DtoH (Device -> Pageable)", compute, 2500, 2600),
    ]
    summary = summarize(found)
    assert summary["hidden"] == {
        "gather": 0.5,
        "reduce": 1.0,
        "both": pytest.approx(9 / 14, abs=1e-4),
    }
    assert summary["ms"]["matmul"] == 2.0
    assert summary["span_ms"] == 2.6
    assert summary["idle_of_compute_stream_ms"] == pytest.approx(0.6)
    assert summary["idle_of_device_ms"] == 0
    assert summary["ms_by_stream"]["20"] == {"gather": 1.0}
    assert summary["longest"][0]["kind"] == "matmul"


def test_a_trace_gives_what_ran_on_the_device_and_no_annotation() -> None:
    ran = {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 3, "dur": 4, "args": {"stream": 7}}
    trace = {
        "traceEvents": [
            ran,
            ran | {"cat": "gpu_user_annotation", "name": "nccl:all_gather"},
            ran | {"cat": "cpu_op", "name": "aten::mm"},
            ran | {"ph": "i"},
            ran | {"cat": "gpu_memcpy", "name": "Memcpy PtoP", "args": {}},
        ]
    }
    assert activities(trace) == [Activity("gemm", 7, 3, 7), Activity("Memcpy PtoP", 0, 3, 7)]


def test_a_step_without_kernels_has_an_empty_summary() -> None:
    assert summarize([]) == {"kernels": 0}
