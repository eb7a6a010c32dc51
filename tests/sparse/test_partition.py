"""Parts of an expert add up to it."""

import pytest
import torch
from torch import nn

from scmoe_ds.errors import CheckpointError
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.sparse.partition import check_parts, input_part, output_bias, output_part, repeated


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_add_up_to_the_expert(swiglu: bool, parts: int) -> None:
    settings = GPTSettings(
        vocab_size=8, hidden_size=8, num_layers=2, num_attention_heads=2, max_position_embeddings=8, swiglu=swiglu
    )
    whole, x = MLP(settings, None, 16).double(), torch.randn(5, 8, dtype=torch.float64)
    nn.init.normal_(whole.output.bias)
    for factor in (1.0, float(parts)):
        total = torch.zeros_like(x)
        for part in range(parts):
            expert = MLP(settings, None, 16 // parts).double()
            projections = 1 + swiglu
            expert.input.weight.data = input_part(whole.input.weight.data, part, parts, projections)
            expert.input.bias.data = input_part(whole.input.bias.data, part, parts, projections)
            expert.output.weight.data = output_part(whole.output.weight.data, part, parts, factor)
            expert.output.bias.data = output_bias(whole.output.bias.data, parts, factor)
            total += expert(x) / factor
        torch.testing.assert_close(total, whole(x), rtol=1e-12, atol=1e-14)


def test_rows_of_a_gate_follow_each_other() -> None:
    assert repeated(torch.tensor([3.0, 5.0]), 2).tolist() == [3, 3, 5, 5]


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(CheckpointError, match="--parts 1: must be at least 2"):
        check_parts(1)
    with pytest.raises(CheckpointError, match="--parts 3: must divide the 16 neurons of an expert"):
        check_parts(3, 16)
