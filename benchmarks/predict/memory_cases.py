"""Trainings whose memory is compared: the presets, and what a layout or a layer may change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CONFIGS = Path(__file__).parents[2] / "ds_configs"
_FILES = {
    "gpt2-moe-small": "gpt2_moe_small_8xA800",
    "gpt2-moe-medium": "gpt2_moe_medium_16xA800",
    "gpt3-moe-xl": "gpt3_moe_xl_16xA800",
    "llama2-moe": "llama2_moe_16xA800",
    "swinv2-moe-s": "swinv2_moe_s_8xA800",
    "swinv2-moe-b": "swinv2_moe_b_8xA800",
}
RECOMPUTE, TENSOR_PARALLEL, LAYERS = "recompute_granularity", "tensor_model_parallel_size", "num_layers"
_EP, _MICRO, _STAGE = "scmoe.expert_parallel_size", "train_micro_batch_size_per_gpu", "zero_optimization.stage"
_STEPS, _DISPATCH, _KIND, _BF16 = "gradient_accumulation_steps", "scmoe.dispatch", "scmoe.architecture", "bf16.enabled"


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        settings: keys of the DeepSpeed JSON that differ from the preset's file; dots go into objects.
        flags: of the training.
        card: kind of GPU. Three and more local experts are one product on an H100 here; on an A800 it needs Triton,
            which runs on a GPU alone.
    """

    preset: str
    world: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    card: str = "A800"

    @property
    def name(self) -> str:
        parts = [f"{key.rpartition('.')[2]} {value}" for key, value in {**self.settings, **self.flags}.items()]
        return ", ".join([f"{self.preset}, {self.world} {self.card}", *parts])

    def whole(self) -> dict[str, Any]:
        """The DeepSpeed JSON. It has two micro-batches in a step, if nothing else is said."""
        whole: dict[str, Any] = json.loads((_CONFIGS / f"{_FILES[self.preset]}.json").read_text("utf-8"))
        for key in ("train_batch_size", "tensorboard"):
            whole.pop(key, None)
        section = whole["scmoe"]
        section["expert_parallel_size"] = min(section["expert_parallel_size"], self.world)
        for path, value in {_STEPS: 2, **self.settings}.items():
            *parents, key = path.split(".")
            target = whole
            for parent in parents:
                target = target.setdefault(parent, {})
            target[key] = value
        return whole


def cases() -> Iterator[Case]:
    """All that are compared."""
    yield from _presets()
    yield from _layouts()
    yield from _layers()
    for preset in ("gpt3-moe-xl", "llama2-moe"):
        yield Case(preset, 16, {_STAGE: 2, _MICRO: 1}, {TENSOR_PARALLEL: 2, LAYERS: 8})
        yield Case(preset, 32, {_MICRO: 2}, {RECOMPUTE: "full", LAYERS: 8})


def _presets() -> Iterator[Case]:
    worlds = {
        "gpt2-moe-small": (8, 64),
        "gpt2-moe-medium": (16, 8),
        "gpt3-moe-xl": (8, 16),
        "llama2-moe": (8, 16),
        "swinv2-moe-s": (8,),
        "swinv2-moe-b": (8, 32),
    }
    for preset, sizes in worlds.items():
        yield from (Case(preset, world) for world in sizes)


def _small(settings: Mapping[str, Any], flags: Mapping[str, Any] | None = None) -> Case:
    return Case("gpt2-moe-small", 8, settings, flags or {})


def _layouts() -> Iterator[Case]:
    yield _small({_STAGE: 2})
    yield _small({_STAGE: 0, _BF16: False, "gradient_clipping": 0})
    yield _small({_STAGE: 1, _BF16: False})
    yield _small({_STEPS: 1})
    yield _small({_STEPS: 1, _MICRO: 1})
    yield _small({_MICRO: 1})
    yield _small({_MICRO: 1, _STAGE: 2})
    yield Case("gpt2-moe-small", 8, {_EP: 1}, card="H100")
    yield Case("gpt2-moe-small", 8, {_EP: 2, _MICRO: 2}, card="H100")
    yield _small({_EP: 4, "scmoe.num_experts": 8})
    yield _small({}, {RECOMPUTE: "full"})
    yield _small({}, {RECOMPUTE: "selective"})
    yield _small({_EP: 4}, {TENSOR_PARALLEL: 2})
    yield _small({_EP: 4, "scmoe.expert_tensor_parallelism": True}, {TENSOR_PARALLEL: 2})
    yield _small({_EP: 4, _KIND: "topk"}, {TENSOR_PARALLEL: 2})


def _layers() -> Iterator[Case]:
    yield _small({_DISPATCH: "padded"})
    yield _small({"scmoe.top_k": 2})
    yield _small({"scmoe.top_k": 2, _DISPATCH: "padded", "scmoe.capacity_factor": 1.25})
    for kind in ("topk", "shared_expert", "pipelined_topk", "overlapped_shared_expert"):
        yield _small({_KIND: kind})
    yield _small({"scmoe.merge": "cg2", "scmoe.post_norm": True})
    yield _small({"scmoe.merge": "add", "scmoe.join": "late"})
    yield _small({"scmoe.position": "pos1", "scmoe.shortcut_norm": "shared"})
    yield _small({"scmoe.position": "pos3", "scmoe.moe_every": 4})
