"""Models built in shards, before there is an engine."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from unit.engine.small import (
    Net,
    assert_equal_weights,
    config_of,
    make,
    on_ranks,
    train,
    weights_of,
)
from zeroshard import zero
from zeroshard.zero.estimators import _sizes


class Reader(Net):
    """Declares in its constructor what it reads in its forward."""

    def __init__(self) -> None:
        super().__init__()
        zero.register_external_parameter(self, self.blocks[0].up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.blocks[0].up.weight.sum()


@pytest.mark.parametrize("build", [Net, Reader])
@on_ranks(2)
def test_a_model_built_in_shards_is_measured_edited_and_trained(build: type[Net]) -> None:
    with zero.Init(config_dict_or_path=config_of(3)):
        model = build()
    assert _sizes(model) == _sizes(Net())
    with zero.GatheredParameters(model.parameters(), modifier_rank=0):
        if dist.get_rank() == 0:
            with zero.GatheredParameters(list(model.head.parameters()), modifier_rank=0):
                model.load_state_dict(build().state_dict())
            with torch.no_grad():
                model.head.bias.fill_(2.0)
    engine, other = make(3, model), make(0, build())
    with zero.GatheredParameters(other.module.head.bias, modifier_rank=1), torch.no_grad():
        other.module.head.bias.fill_(2.0)
    assert_equal_weights(weights_of(engine), weights_of(other))
    train(engine)
    train(other)
    assert_equal_weights(weights_of(engine), weights_of(other))
