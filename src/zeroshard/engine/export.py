"""The full weights of a model as one state dict, in files and back, one unit at a time.

The dict grows in host memory on rank 0; no device ever holds more than one unit of it at once.
"""

# What a module does to load itself has no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zeroshard.core.access import gathered
from zeroshard.core.collectives import broadcast_
from zeroshard.core.mesh import Mesh
from zeroshard.core.slots import slot_of
from zeroshard.core.unit import Unit, plain
from zeroshard.errors import DistributedError, UsageError, compose

__all__ = ["load_weights", "save_weights", "weights_of"]


def weights_of(
    model: nn.Module, units: Sequence[Unit], *, is_writer: bool, with_frozen: bool = True
) -> dict[str, Any] | None:
    """The model's state dict with copies of full parameters in host memory; a collective.

    Names are those of ``model.state_dict()``, and tied parameters share one copy.

    Returns:
        The dict on the rank that ``is_writer``, None on the others.
    """
    copies: dict[Tensor, Tensor] = {}
    left_out: set[Tensor] = set()
    for unit in units:
        params = [member.param for member in unit.members]
        if not with_frozen:
            left_out.update(param for param in params if not param.requires_grad)
            left_out.update(*unit.companions)
            if left_out.issuperset(params):
                continue
        with gathered(params):
            if is_writer:
                copies |= {param: _on_host(param) for param in params}
                copies |= {shown: _on_host(full) for shown, full in unit.companions}
    if not is_writer:
        return None
    state = model.state_dict(keep_vars=True)  # the parameters themselves, freed or not
    gone = {name for name, value in state.items() if _is_tensor(value) and value in left_out}
    return {
        name: _copy(value, copies)
        for name, value in state.items()
        # "weight.quant_map" belongs to "weight".
        if name not in gone and not any(name[:at] in gone for at in _dots(name))
    }


def _dots(name: str) -> Iterator[int]:
    return (at for at, letter in enumerate(name) if letter == ".")


def _copy(value: Any, copies: Mapping[Tensor, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return copies[value] if value in copies else _on_host(value)


def _on_host(tensor: Tensor) -> Tensor:
    return plain(tensor).to("cpu", copy=True)


@contextmanager
def _together(mesh: Mesh, what: str) -> Iterator[None]:
    """Do on rank 0 what may fail there, and have the other ranks hear of it; a collective."""
    failed = torch.zeros(1, device=mesh.device)
    try:
        yield
    except Exception:
        failed += 1
        raise
    finally:
        if mesh.rank == 0:
            broadcast_(failed, mesh)
    if mesh.rank != 0 and broadcast_(failed, mesh).item():
        raise DistributedError(
            compose(f"rank 0 could not {what}.", hint="see the error of rank 0.")
        )


def save_weights(state: Mapping[str, Any] | None, path: Path, mesh: Mesh) -> None:
    """Write a state dict that rank 0 has to a file that appears complete or not at all.

    A name that ends in ``.safetensors`` chooses that format; tensors that share memory are written
    out twice there. A collective.
    """
    with _together(mesh, f"write {path}"):
        if state is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(path.name + ".unfinished")
            if path.suffix == ".safetensors":
                tensors = {name: value for name, value in state.items() if _is_tensor(value)}
                save_file(_unshared(tensors), unfinished, metadata={"format": "pt"})
            else:
                torch.save(dict(state), unfinished)
            unfinished.replace(path)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    unshared: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        unshared[name] = tensor.clone() if shared else tensor.contiguous()
        seen.add(tensor.untyped_storage().data_ptr())
    return unshared


def load_weights(
    model: nn.Module,
    state: Mapping[str, Any] | None,
    mesh: Mesh,
    *,
    strict: bool = True,
    custom_load: Callable[..., object] | None = None,
) -> None:
    """Load the state dict of rank 0 into the model of all ranks; a collective.

    Each module loads its own entries while its parameters are full, so its own way of loading them
    is respected. ``custom_load(src=state, dst=model)`` replaces all that, on a model that is full.

    Raises:
        UsageError: on rank 0, the names or shapes do not fit; the others raise DistributedError.
    """
    problems: list[str] = []
    with _together(mesh, "load the weights"):
        if custom_load is not None:
            with gathered(model, modifier_rank=0):
                if mesh.rank == 0:
                    custom_load(src=state, dst=model)
        else:
            for prefix, module in _with_full_parameters(model):
                if mesh.rank == 0:
                    problems += _load_own(module, dict(state or {}), prefix, strict)
        if problems:
            raise UsageError(
                compose(
                    f"the state dict does not fit the {type(model).__name__}: "
                    + "; ".join(dict.fromkeys(problems)),
                    hint="pass the state dict of such a model; strict=False accepts names that "
                    "are missing or unknown.",
                )
            )
    for buffer in model.buffers():
        broadcast_(buffer.data, mesh)


def _with_full_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module of a model with the prefix of its names, while its own parameters are full."""
    with ExitStack() as gathering:
        held: set[int] = set()
        for name, module in model.named_modules(remove_duplicate=False):
            own = list(module.parameters(recurse=False))
            slots = (slot_of(param) for param in own)
            units = {id(slot.unit) for slot in slots if slot is not None}
            if not units <= held:
                gathering.close()
                gathering.enter_context(gathered(own, modifier_rank=0))
                held = units
            yield f"{name}." if name else "", module


def _load_own(module: nn.Module, state: dict[str, Any], prefix: str, strict: bool) -> list[str]:
    """Load the entries of a module itself; say what is wrong with them."""
    missing: list[str] = []
    unknown: list[str] = []
    errors: list[str] = []
    try:
        module._load_from_state_dict(state, prefix, {}, strict, missing, unknown, errors)
    except Exception as error:  # the other ranks expect this one in the next gather
        errors.append(f"{prefix}: {error}")
    return [*errors, *(f"no {key}" for key in missing), *(f"unknown {key}" for key in unknown)]
