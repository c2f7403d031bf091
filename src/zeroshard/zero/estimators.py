"""Bytes that model state takes on each GPU and host, before anything is built.

With P parameters on G GPUs, n of them on each of N hosts, in mixed precision with Adam: 2P for the
weights computed in, 2P for their gradients, and 4P each for fp32 gradients, master weights and two
moments, 20P in all. ``L`` is the largest layer, which is full while it runs (weights and gradients,
4L). ``a``, the factor for buffers on the host, is 1.5 unless told otherwise.

==========================================  ==============  ======================================
sharded, and what is on the host            on each GPU     on each host
==========================================  ==============  ======================================
optimizer; nothing                          4P + 16P/G      4Pna
optimizer; optimizer                        4P              Pa max(4G, 16)
optimizer, gradients; nothing               2P + 18P/G      4Pna
optimizer, gradients; optimizer             2P              Pa max(4G, 16)
all three; nothing                          4L + 18P/G      4Lna, or 4Pna
all three; optimizer                        4L + 2P/G       16Pa/N, or Pa max(4n, 16/N)
all three; optimizer, parameters            4L              18Pa/N, or Pa max(4n, 18/N)
==========================================  ==============  ======================================

Of two figures the first is for models built inside ``zero.Init``. Activations, communication
buffers and fragmentation are not in them. ``zeroshard`` averages gradients in fp32, unit by unit,
and keeps no second copy of them, so where nothing is on the host it takes somewhat less. What is on
the host takes 12P for the optimizer and 2P for parameters there, without a factor. Gradients that
are averaged stay on the GPUs until the step, 4P/G beside the figures of the last rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from zeroshard.core.slots import slot_of

__all__ = [
    "estimate_zero1_model_states_mem_needs",
    "estimate_zero1_model_states_mem_needs_all_cold",
    "estimate_zero1_model_states_mem_needs_all_live",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
]

_GIB = 2**30


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Parameters of a model, and those that its largest layer holds itself; freed ones too."""
    largest = max(
        (sum(map(_numel, module.parameters(recurse=False))) for module in model.modules()),
        default=0,
    )
    return sum(map(_numel, model.parameters())), largest


def _numel(param: nn.Parameter) -> int:
    slot = slot_of(param)
    return param.numel() if slot is None else math.prod(slot.unit.shapes[slot.index])


def _host(total_params: int, per_node: int, num_gpus: int, offload: bool, factor: float) -> int:
    """Bytes on each host where full parameters stay on the GPUs."""
    per_param = max(4 * num_gpus, 16) if offload else 4 * per_node
    return int(total_params * per_param * factor)


@dataclass(frozen=True, slots=True)
class _Row:
    """One way to train, and what it takes."""

    options: str
    host_bytes: int
    gpu_bytes: int


def _print(model: str, num_gpus_per_node: int, num_nodes: int, rows: Iterable[_Row]) -> None:
    nodes, gpus = _count(num_nodes, "node"), _count(num_gpus_per_node, "GPU")
    print(
        "Memory for parameters, gradients and optimizer state\n"
        f"of a model with {model},\n"
        f"on {nodes} with {gpus} each:\n"
        "   per host |    per GPU | options"
    )
    for row in rows:
        host, gpu = (f"{size / _GIB:7.2f}GiB" for size in (row.host_bytes, row.gpu_bytes))
        print(f" {host} | {gpu} | {row.options}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _millions(numel: int, what: str) -> str:
    return f"{numel / 1e6:.0f}M {what}"


# Optimizer state, and gradients


def estimate_zero1_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """Bytes on each host and on each GPU where optimizer state is sharded."""
    num_gpus = num_nodes * num_gpus_per_node
    gpu = total_params * (4 if cpu_offload else 4 + 16 / num_gpus)
    factor = additional_buffer_factor
    return _host(total_params, num_gpus_per_node, num_gpus, cpu_offload, factor), int(gpu)


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """Bytes on each host and on each GPU where optimizer state and gradients are sharded."""
    num_gpus = num_nodes * num_gpus_per_node
    gpu = total_params * (2 if cpu_offload else 2 + 18 / num_gpus)
    factor = additional_buffer_factor
    return _host(total_params, num_gpus_per_node, num_gpus, cpu_offload, factor), int(gpu)


def _print_cold(
    needs: Callable[..., tuple[int, int]],
    total_params: int,
    num_gpus_per_node: int,
    num_nodes: int,
    factor: float,
) -> None:
    rows = [
        _Row(
            f"offload_optimizer={'cpu' if offload else 'none'}",
            *needs(total_params, num_gpus_per_node, num_nodes, offload, factor),
        )
        for offload in (True, False)
    ]
    _print(_millions(total_params, "parameters"), num_gpus_per_node, num_nodes, rows)


def estimate_zero1_model_states_mem_needs_all_cold(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the first two rows of the table for a number of parameters."""
    needs = estimate_zero1_model_states_mem_needs
    _print_cold(needs, total_params, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero1_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the first two rows of the table for a model."""
    needs = estimate_zero1_model_states_mem_needs
    _print_cold(needs, _sizes(model)[0], num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the middle two rows of the table for a number of parameters."""
    needs = estimate_zero2_model_states_mem_needs
    _print_cold(needs, total_params, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the middle two rows of the table for a model."""
    needs = estimate_zero2_model_states_mem_needs
    _print_cold(needs, _sizes(model)[0], num_gpus_per_node, num_nodes, additional_buffer_factor)


# Parameters, too


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """Bytes on each host, on each GPU, and of the largest layer on a GPU; all three are sharded."""
    num_gpus = num_nodes * num_gpus_per_node
    layer = 4 * largest_layer_params
    if cpu_offload:
        on_host = (18 if cpu_offload_params else 16) / num_nodes
        gpu = layer + (0 if cpu_offload_params else 2 * total_params / num_gpus)
        host = total_params * (on_host if zero_init else max(4 * num_gpus_per_node, on_host))
    else:
        gpu = layer + 18 * total_params / num_gpus
        host = 4 * num_gpus_per_node * (largest_layer_params if zero_init else total_params)
    return int(host * additional_buffer_factor), int(gpu), layer


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the last three rows of the table for numbers of parameters."""
    rows: list[_Row] = []
    for optimizer, params in ((True, True), (True, False), (False, False)):
        for zero_init in (True, False):
            host, gpu, _ = estimate_zero3_model_states_mem_needs(
                total_params,
                largest_layer_params,
                num_gpus_per_node,
                num_nodes,
                optimizer,
                params,
                zero_init,
                additional_buffer_factor,
            )
            options = (
                f"offload_param={'cpu' if params else 'none':4}, "
                f"offload_optimizer={'cpu' if optimizer else 'none':4}, "
                f"zero_init={int(zero_init)}"
            )
            rows.append(_Row(options, host, gpu))
    sizes = _millions(total_params, "parameters"), _millions(largest_layer_params, "in the largest")
    _print(f"{sizes[0]}, {sizes[1]} layer", num_gpus_per_node, num_nodes, rows)


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the last three rows of the table for a model."""
    total, largest = _sizes(model)
    estimate_zero3_model_states_mem_needs_all_cold(
        total, largest, num_gpus_per_node, num_nodes, additional_buffer_factor
    )
