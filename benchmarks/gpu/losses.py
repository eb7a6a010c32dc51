"""Does it compute right: fp32 losses of a small GPT against the CPU, and a bf16 curve beside an fp32 one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import scmoe_ds
from benchmarks.gpu import stand_in
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setting import Setting
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.overlap.schedule import Schedule

SECTION = {"num_experts": 8, "drop_tokens": False, "overlap": {"calibration_steps": 0}}
"""Without drops: which tokens are dropped is drawn on the device."""


def model(setting: Setting, group: dist.ProcessGroup | None = None, **section: Any) -> GPT:
    """A small GPT over bytes, with the same weights each time, on the CPU.

    Args:
        group: the tensor-parallel ranks.
    """
    hidden, sequence = setting.size((256, 256), (32, 16))
    settings = GPTSettings(4, hidden, 4, 256, sequence)
    gpt = GPT(settings, ScMoEConfig.from_deepspeed({"scmoe": SECTION | section}), group=group)
    initialize_parameters(gpt, 1, settings.init_method_std, settings.num_layers)
    return gpt


def batches(setting: Setting, seed: int = 0) -> Iterator[Tensor]:
    """Pieces of a text that every Python has: the source of argparse. [B, S + 1] bytes; the same for the same seed."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    batch, length = setting.size((16, 257), (2, 17))
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (batch,), generator=generator).tolist()
        yield torch.stack([text[start : start + length] for start in starts])


def against_the_cpu(notes: Notes, setting: Setting) -> None:
    """The step: the same training in fp32 on both devices, on the GPU with transfers that overlap."""
    connect()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    steps = setting.size(10, 2)
    on_cpu = train(model(setting), torch.device("cpu"), setting, steps)
    gpt = model(setting)
    stand_in.use([pair.layer for pair in gpt.scheduled_pairs()])
    for pair in gpt.scheduled_pairs():
        pair.schedule = Schedule((1, 2), 2)
    found = train(gpt.to(setting.device), setting.device, setting, steps)
    for number, (here, there) in enumerate(zip(on_cpu, found, strict=True), start=1):
        notes.row("fp32 losses", step=number, CPU=f"{here:.7f}", GPU=f"{there:.7f}", difference=f"{there - here:+.1e}")
    notes.number("fp32: largest difference from the CPU", max(abs(a - b) for a, b in zip(on_cpu, found, strict=True)))


def train(gpt: GPT, device: torch.device, setting: Setting, steps: int) -> list[float]:
    """The losses of so many steps with torch alone; the same text whatever the rank."""
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3)
    losses = []
    for _, batch in zip(range(steps), batches(setting), strict=False):
        tokens = batch.to(device)
        loss = gpt(tokens[:, :-1], tokens[:, 1:]).loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def bf16_curve(notes: Notes, setting: Setting) -> None:
    """The step: DeepSpeed engines in fp32 and bf16 (ZeRO-1), the same weights and batches."""
    connect()
    steps = setting.size(100, 4)
    curves = {name: engine_losses(setting, steps, name == "bf16") for name in ("fp32", "bf16")}
    for number in sorted({0, *range(setting.size(9, 1), steps, setting.size(10, 1)), steps - 1}):
        cells = {name: f"{curve[number]:.4f}" for name, curve in curves.items()}
        notes.row("bf16 beside fp32, nats per byte", step=number + 1, **cells)
    last = {name: sum(curve[-5:]) / len(curve[-5:]) for name, curve in curves.items()}
    notes.number("bf16: last losses over those of fp32", last["bf16"] / last["fp32"])
    notes.number("bf16: last losses over the first", last["bf16"] / curves["bf16"][0])


def engine_losses(setting: Setting, steps: int, bf16: bool = False, zero_stage: int = 1, **section: Any) -> list[float]:
    """The losses of so many steps of an engine on this rank, which has a text of its own."""
    whole = {
        "train_micro_batch_size_per_gpu": setting.size(16, 2),
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": zero_stage},
        "steps_per_print": 10**9,
        "scmoe": SECTION | section,
    }
    engine, *_ = scmoe_ds.initialize(model=model(setting, **section), config=whole)
    losses = []
    for _, batch in zip(range(steps), batches(setting, dist.get_rank()), strict=False):
        tokens = batch.to(engine.device)
        loss = engine(tokens[:, :-1], tokens[:, 1:]).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses
