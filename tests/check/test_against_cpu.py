"""The peak of a fake step beside that of the same step with real tensors, on CPU.

Both are counted by the same dispatch mode. The resident set of a process is no measure: glibc keeps freed pieces.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds.check.cards import card_of
from scmoe_ds.check.step import Place, Subject, check_step, train_step
from scmoe_ds.check.storages import Storages
from scmoe_ds.compat import forget_process_groups
from scmoe_ds.config.loading import load
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.swin import SwinMoE, initialize_swin
from scmoe_ds.models.swin_settings import SWIN_PRESETS, SwinSettings
from scmoe_ds.training.images import ImageTrainer
from scmoe_ds.training.loop import Trainer

SEQUENCE = 128
SHAPE = GPTSettings(2, 128, 4, 512, SEQUENCE)
ADAM = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
ZERO = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
PADDED = {"dispatch": "padded"}
EXACT = {"drop_tokens": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "exact": (EXACT, {}, None),
    "padded": (PADDED, {}, None),
    "top-2": ({"top_k": 2, **EXACT}, {}, None),
    "dgmoe": ({"architecture": "dgmoe", "pairs_per_moe": 1, **EXACT}, {}, None),
    "late join": ({"moe_every": 1, "position": "pos1", "join": "late", **EXACT}, {}, None),
    "standard": ({"architecture": "topk"}, {}, None),
    "recompute": (EXACT, {}, "full"),
    "ZeRO 0": (EXACT, {"zero_optimization": {"stage": 0}, "gradient_clipping": 0}, None),
    "ZeRO 2, accumulated": (EXACT, {"zero_optimization": {"stage": 2, **ZERO}, "gradient_accumulation_steps": 2}, None),
    "bf16": (EXACT, {"bf16": {"enabled": True}}, None),
}


def whole_of(section: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed JSON with its section."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "optimizer": ADAM,
        "zero_optimization": {"stage": 1, **ZERO},
        "scmoe": {"num_experts": 4, "overlap": {"calibration_steps": 0}, **section},
        **changes,
    }


def gpt(whole: dict[str, Any], recompute: str | None = None) -> Subject:
    """A small GPT."""
    section = load(whole).section

    def build() -> GPT:
        model = GPT(SHAPE, section, recompute=recompute)  # type: ignore[arg-type]
        initialize_parameters(model, 1, 0.02, SHAPE.num_layers)
        return model

    tokens = ((SEQUENCE,), torch.int64)
    sample = {"tokens": tokens, "labels": tokens, "loss_mask": ((SEQUENCE,), torch.float32)}
    return Subject(build, Trainer, sample, SEQUENCE)


def peaks(subject: Subject, whole: dict[str, Any], ranks: int = 1, rank: int = 0) -> tuple[int, int]:
    """Bytes of the fake and of the real step. The process has no process group before."""
    place = Place(rank, ranks, 8, 1, card_of("A800"), "cpu")
    fake = check_step(subject, load(whole), place)
    scmoe_ds.connect()
    storages = Storages("cpu")
    with storages:
        real = train_step(subject, load(whole), place, storages)
    dist.destroy_process_group()
    forget_process_groups()
    return fake.peak, real.peak


@pytest.fixture
def alone() -> Any:
    """No other rank, and no memory of a former process group."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("case", CASES)
def test_a_gpt_on_one_rank(case: str, alone: None) -> None:
    section, changes, recompute = CASES[case]
    whole = whole_of(section, changes)
    fake, real = peaks(gpt(whole, recompute), whole)
    print(f"{case}: fake {fake} real {real} {100 * (fake / real - 1):+.2f} %")
    assert fake == pytest.approx(real, rel=0.05)


def test_digits(alone: None) -> None:
    whole = whole_of({"num_experts": 8, **PADDED}, {"train_micro_batch_size_per_gpu": 16})
    names = vars(SwinSettings)["__dataclass_fields__"]
    flags = {**SWIN_PRESETS["swin-digits"], "image_size": 16, "patch_size": 1}
    shape = SwinSettings(**{name: value for name, value in flags.items() if name in names})

    def build() -> SwinMoE:
        model = SwinMoE(shape, load(whole).section)
        initialize_swin(model, 1)
        return model

    subject = Subject(build, ImageTrainer, {"images": ((1, 16, 16), torch.float32), "labels": ((), torch.int64)}, 1)
    fake, real = peaks(subject, whole)
    print(f"digits: fake {fake} real {real} {100 * (fake / real - 1):+.2f} %")
    assert fake == pytest.approx(real, rel=0.05)


def peaks_of_rank() -> list[tuple[int, int]]:
    """On two ranks that exchange tokens."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    forget_process_groups()
    found = []
    for section in (EXACT, PADDED):
        whole = whole_of({**section, "expert_parallel_size": 2}, {})
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        found.append(peaks(gpt(whole), whole, 2, rank))
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    scmoe_ds.connect()
    return found


def test_two_ranks_that_exchange_tokens() -> None:
    exact, padded = run_distributed(peaks_of_rank, 2)[0]
    # Of the exact rows of an untrained gate, a rank gets more than half, or less.
    for (fake, real), tolerance in ((exact, 0.1), (padded, 0.05)):
        print(f"two ranks: fake {fake} real {real} {100 * (fake / real - 1):+.2f} %")
        assert fake == pytest.approx(real, rel=tolerance)
