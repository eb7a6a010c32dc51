"""No gradient is a sum of bf16 rows in an order of chance, as an atomic scatter on a GPU would make it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.overlap.schedule import Schedule

SCATTERS = ("index_add", "scatter_add", "scatter_reduce", "index_put", "_unsafe_index_put", "index_reduce")


class Scatters(TorchDispatchMode):
    """Which operators add up rows of bf16 in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in SCATTERS and args[0].dtype == torch.bfloat16:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def test_the_mode_sees_torchs_own() -> None:
    table = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    for read in (lambda: table.index_select(0, torch.arange(2)), lambda: table[torch.arange(2)]):
        with Scatters() as scatters:
            read().sum().backward()
        assert scatters.found


@pytest.mark.parametrize("dispatch", ["exact", "padded"])
@pytest.mark.parametrize(
    ("section", "style"),
    [
        ({"top_k": 1, "merge": "cg2"}, {}),
        ({"top_k": 2}, {"swiglu": True, "normalization": "RMSNorm", "position_embedding": "rope"}),
        ({"top_k": 3, "merge": "add"}, {"num_key_value_heads": 1, "position_embedding": "rope"}),
        ({"architecture": "dgmoe"}, {}),
        ({"top_k": 2, "expert_partition": 2}, {"swiglu": True}),
        ({"architecture": "overlapped_shared_expert", "top_k": 2}, {}),
        ({"architecture": "pipelined_topk", "gate_softmax": "chosen", "top_k": 2}, {"norm_placement": "post"}),
    ],
)
def test_gradients_of_bf16_models(dispatch: str, section: dict[str, Any], style: dict[str, Any]) -> None:
    settings = GPTSettings(2, 16, 2, 64, 12, **style)
    section = {"num_experts": 4, "capacity_factor": 1.0, "dispatch": dispatch, **section}
    model = GPT(settings, ScMoEConfig.from_deepspeed({"scmoe": section})).bfloat16()
    for pair in model.modules():
        if isinstance(pair, StagedPair):
            pair.schedule = Schedule((1, 1), 2)
    tokens, used = torch.randint(64, (2, 12)), (torch.arange(24) % 5).view(2, 12)
    output = model(tokens, labels=tokens, used_token=used)
    with Scatters() as scatters:
        output.loss.backward()
    assert not scatters.found
