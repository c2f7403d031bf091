"""What an optimizer will keep is known before it keeps it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zeroshard.optim import Lamb, Lion, Muon, UncorrectedAdam
from zeroshard.optim.named import NAMED
from zeroshard.optim.sizes import bytes_of_averages

OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    *((kind, {}) for kind in (torch.optim.ASGD, torch.optim.Adadelta, torch.optim.Adagrad)),
    *((kind, {}) for kind in (torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam)),
    *((kind, {}) for kind in (torch.optim.Rprop, Lamb, Lion, UncorrectedAdam, *NAMED)),
    *((torch.optim.AdamW, {"amsgrad": amsgrad}) for amsgrad in (False, True)),
    *((torch.optim.SGD, {"momentum": momentum}) for momentum in (0.0, 0.9)),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (Muon, {}),
]


def test_what_is_foretold_is_what_the_first_step_makes() -> None:
    for kind, options in OPTIMIZERS:
        params = [nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(8, 4))]
        groups: Any = params[:1]
        if kind is Muon:
            groups = [
                {"params": [param], "use_muon": muon}
                for param, muon in zip(params, (1, 0), strict=True)
            ]
        optimizer = kind(groups, lr=0.1, **options)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()
        for group in optimizer.param_groups:
            made = sum(
                value.nbytes
                for param in group["params"]
                for value in optimizer.state[param].values()
                if isinstance(value, torch.Tensor) and value.numel() == param.numel()
            )
            foretold = bytes_of_averages(optimizer, group, itemsize=4)
            assert foretold == made / 32, f"{kind.__name__} {options}"


def test_nothing_is_foretold_of_an_unknown_optimizer() -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

    optimizer = Own([nn.Parameter(torch.ones(2))])
    assert bytes_of_averages(optimizer, optimizer.param_groups[0], 4) is None


def test_quantised_state_is_about_a_byte_for_an_element_and_average() -> None:
    for name, bytes_each in (("Adam8bit", 2), ("Lion8bit", 1), ("PagedAdamW32bit", 8)):
        kind = type(name, (torch.optim.Optimizer,), {})  # packages that have them load slowly
        optimizer = kind([nn.Parameter(torch.ones(2))], {})
        foretold = bytes_of_averages(optimizer, optimizer.param_groups[0], 4)
        assert foretold == pytest.approx(bytes_each, rel=0.03)
