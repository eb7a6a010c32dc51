"""Names that a page's Python takes for granted: the reader's model, batch, engine, imports."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

import scmoe_ds
from lab.longcat_parity import FAMILY, config
from lab.moe_families import batch, tiny
from scmoe_ds import checkpoint
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.gpt import GPT
from tests.helpers.settings import GPT2

WIDTH = 16


class WithMoE(nn.Module):
    """A model with DeepSpeed's MoE layers that returns its loss; blocks, attention and MLP have names of their own."""

    class Block(nn.Module):
        def __init__(self, has_moe: bool) -> None:
            super().__init__()
            self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.attention = nn.Linear(WIDTH, WIDTH)
            self.mlp = MoE(WIDTH, expert(), num_experts=2, use_residual=True) if has_moe else expert()

        def forward(self, value: Tensor) -> Tensor:
            value = value + self.attention(self.input_layernorm(value))
            output = self.mlp(self.post_attention_layernorm(value))
            return value + (output[0] if isinstance(output, tuple) else output)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Block(False), self.Block(True)])

    def forward(self, value: Tensor) -> Tensor:
        for layer in self.layers:
            value = layer(value)
        return value.square().mean()


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


def change_section(section: dict[str, Any]) -> dict[str, Any]:
    """Writes the page's ds.json with another section, for a run of ten steps that times nothing; returns it."""
    whole: dict[str, Any] = json.loads(Path("ds.json").read_text())
    whole["scheduler"]["params"]["total_num_steps"] = 10
    whole["scmoe"] = {**section, "overlap": {"calibration_steps": 0}}
    Path("ds.json").write_text(json.dumps(whole))
    return whole


def readme() -> dict[str, Any]:
    change_section({"num_experts": 8})
    return {}


def from_megatron() -> dict[str, Any]:
    change_section({"replace": True, "position": "pos2"})
    return {"args": Namespace(deepspeed_config="ds.json"), "model": [WithMoE()], "optimizer": None}


def from_hugging_face() -> dict[str, Any]:
    tokens = torch.randint(384, (2, 16))
    model = transformers.GPT2LMHeadModel.from_pretrained("models/gpt2")
    whole = {key: value for key, value in change_section({}).items() if key != "scmoe"}
    whole |= {"expert_parallel": {"enabled": True, "autoep_size": 1}, "scmoe": {"overlap": {"calibration_steps": 0}}}
    Path("ds_autoep.json").write_text(json.dumps(whole))
    tiny("qwen3_moe", vocab_size=384).save_pretrained("models/qwen3_moe")
    change_section({"num_experts": 4})
    batch = {"tokens": tokens, "labels": tokens, "mask": torch.ones_like(tokens)}
    return {"scmoe_ds": scmoe_ds, "torch": torch, "transformers": transformers, "model": model, **batch}


def longcat() -> dict[str, Any]:
    Path("longcat.json").write_text(json.dumps(config(1)))
    tiny(FAMILY).save_pretrained("models/longcat")
    return {"loader": [batch(step, 0) for step in range(2)]}


def analysis() -> dict[str, Any]:
    whole = change_section({"num_experts": 4})
    model = GPT(GPT2, ScMoEConfig.from_deepspeed(whole), 16)
    return {"engine": scmoe_ds.initialize(model=model, config=whole)[0]}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "docs/analysis.md": analysis,
    "docs/checkpoints.md": lambda: {"json": json, "Path": Path, "GPT": GPT, "checkpoint": checkpoint},
    "docs/from_hugging_face.md": from_hugging_face,
    "docs/from_megatron_deepspeed.md": from_megatron,
    "docs/longcat.md": longcat,
}
