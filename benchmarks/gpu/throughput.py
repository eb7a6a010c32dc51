"""Whole models on one card: training of gpt2_moe_small (tokens/s, MFU), and generation (tokens/s)."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

import scmoe_ds
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.process import ROOT
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import text
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.inference.generate import Request, TextGenerator
from scmoe_ds.inference.model import serving_config
from scmoe_ds.inference.sampling import Sampling
from scmoe_ds.models.flops import forward_flops
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.parallel.process import device
from scmoe_ds.planner.rounds import Spread
from scmoe_ds.training.utilization import Utilization, memory_there_gib, peak_memory_gib

CONFIG = "ds_configs/gpt2_moe_small_8xA800.json"
VOCABULARY = 50304
STEPS_PER_ROUND = 3


def train_small(notes: Notes, setting: Setting) -> None:
    """The step: DeepSpeed's engine with the JSON of gpt2_moe_small, all experts on this card."""
    connect()
    settings = setting.size(GPTSettings(12, 768, 12, VOCABULARY, 1024), GPTSettings(2, 32, 4, 64, 16))
    micro_batch = setting.size(32 if memory_there_gib() > 60 else 8, 2)
    whole = small_config(micro_batch)
    gpt = GPT(settings, ScMoEConfig.from_deepspeed(whole))
    initialize_parameters(gpt, 1, settings.init_method_std, settings.num_layers)
    sequence, vocabulary = settings.max_position_embeddings, settings.vocab_size
    flops = 3 * forward_flops(gpt) * micro_batch * sequence
    engine, *_ = scmoe_ds.initialize(model=gpt, config=whole)
    utilization = Utilization(engine, flops)

    def round_s() -> float:
        tokens = [torch.randint(vocabulary, (micro_batch, sequence + 1), device=device()) for _ in range(3)]
        _finish()
        started = time.perf_counter()
        for batch in tokens:
            engine.backward(engine(batch[:, :-1], batch[:, 1:]).loss)
            engine.step()
        _finish()
        return (time.perf_counter() - started) / len(tokens)

    for _ in range(setting.size(3, 1)):
        round_s()
    seconds = Spread.of([round_s() for _ in range(setting.size(10, 2))])
    found = utilization.of_steps(seconds.median)
    notes.number("gpt2_moe_small: tokens/s", micro_batch * sequence / seconds.median)
    if found["mfu"] is not None:
        notes.number("gpt2_moe_small: MFU", found["mfu"])
    cells: dict[str, Any] = {"micro-batch": f"{micro_batch} × {sequence}"}
    cells |= {"step ms": text(Spread(*(1e3 * value for value in (seconds.median, seconds.p10, seconds.p90))), 1)}
    cells |= {"tokens/s": f"{micro_batch * sequence / seconds.median:.0f}", "TFLOP/s": f"{found['tflops']:.1f}"}
    cells |= {"MFU": "–" if found["mfu"] is None else f"{found['mfu']:.1%}", "peak GiB": f"{peak_memory_gib():.1f}"}
    notes.row("Training steps of gpt2_moe_small, bf16, ZeRO-1, EP 1", **cells)


def small_config(micro_batch: int) -> dict[str, Any]:
    """The JSON of the repository for one card: its own batch, no monitor, all experts here."""
    whole = json.loads((ROOT / CONFIG).read_text("utf-8"))
    del whole["train_batch_size"], whole["tensorboard"], whole["scheduler"]
    whole |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": 1}
    whole["scmoe"] |= {"expert_parallel_size": 1}
    if device().type == "cpu":
        del whole["optimizer"]["params"]["fused"]
    return dict(whole)


def generate(notes: Notes, setting: Setting) -> None:
    """The step: a GPT2-MoE-Medium of random weights in bf16 completes prompts in batches of several sizes."""
    connect()
    settings = setting.size(GPTSettings(24, 1024, 16, VOCABULARY, 512), GPTSettings(2, 32, 4, 64, 32))
    trained = ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": setting.size(16, 4)}})
    with torch.device(setting.device):
        model = GPT(settings, serving_config(trained)).to(torch.bfloat16).eval().requires_grad_(False)
    for pair in model.scheduled_pairs():
        pair.layer.set_deepspeed_parallelism()
    length, new = setting.size((128, 64), (8, 4))
    for batch in setting.size((1, 16, 64), (1, 2)):
        prompts = torch.randint(settings.vocab_size, (batch, length)).tolist()
        request = Request(new, Sampling(1.0, seed=1))
        TextGenerator(model, batch_size=batch).generate(prompts, request)  # kernels are chosen at their first use
        generator = TextGenerator(model, batch_size=batch)
        generator.generate(prompts, request)
        times = generator.times
        rates = times.prefill_tokens / times.prefill_s, times.decode_tokens / times.decode_s
        notes.number(f"generation, batch {batch}: tokens/s", rates[1])
        cells = {"batch": batch, "prompt": length, "new tokens": new, "prefill tokens/s": f"{rates[0]:.0f}"}
        cells |= {"tokens/s": f"{rates[1]:.0f}", "ms per step": f"{1e3 * times.decode_s / times.decode_steps:.2f}"}
        notes.row("Generation with GPT2-MoE-Medium, bf16", **cells)


def _finish() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
