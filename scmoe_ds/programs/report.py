"""Is a step faster with ScMoE on this machine, and why? Times whole training steps, and says what they mean.

    deepspeed --module scmoe_ds.programs.report --deepspeed_config X.json --num-layers 4 …
    scmoe report --deepspeed_config X.json …          # one process, nothing to communicate

The flags are those of pretrain_gpt_scmoe.py; tokens are random. Three variants take turns: the model of the JSON, the
same without overlap, and the same model with DeepSpeed's own top-k layer, as DeepSpeed runs it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

import scmoe_ds
from scmoe_ds.config.batch_sizes import batch_sizes
from scmoe_ds.config.deepspeed_settings import check_accelerator
from scmoe_ds.config.loading import LoadedConfig
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.tokenizer import pad_vocab_size
from scmoe_ds.errors import ArgumentError
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.parallel import tensor
from scmoe_ds.parallel.process import device
from scmoe_ds.planner.rounds import interleave, over_ranks
from scmoe_ds.programs.flags.checks import require_same_flags
from scmoe_ds.programs.flags.gpt import gpt_settings
from scmoe_ds.programs.flags.report import parse_arguments
from scmoe_ds.programs.flags.tokenizer import tokenizer_of
from scmoe_ds.programs.pretrain_gpt import build_model
from scmoe_ds.programs.report_text import DEEPSPEED, OURS, SERIAL, Measured, details, reasons, sentence
from scmoe_ds.programs.run import run_program
from scmoe_ds.trace.recorder import PHASES, Recorder
from scmoe_ds.trace.spans import HiddenShare, gather_spans, hidden_share_of_ranks

ROUNDS = (7, 20)
"""Fewest and most; so many between them as last about SECONDS. Of seven, the spread leaves out the fastest and the
slowest."""
SECONDS = 20.0
RECORDED = 4
"""Micro-batches in which communication is watched."""
_OF_DEEPSPEED = """
    moe_every num_experts expert_parallel_size expert_tensor_parallelism aux_loss_coefficient capacity_factor
    eval_capacity_factor min_capacity drop_tokens use_rts top2_2nd_expert_sampling
    """.split()
"""Fields of the section that DeepSpeed's own layer has, too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the model of a training command, times it, and prints the report; returns the exit code."""
    return run_program("scmoe report", argv, report, parse_arguments)


def report(args: argparse.Namespace, loaded: LoadedConfig) -> None:
    """Measures, and prints the sentence first, then its reasons, then what --details asks for."""
    require_same_flags(args, loaded.whole)
    check_accelerator(loaded.whole)
    loaded = loaded.in_world(dist.get_world_size(), args.tensor_model_parallel_size)
    tensor.start_tensor_parallel(args.tensor_model_parallel_size)
    with _kept_log() as log:
        try:
            found = _measure(args, loaded)
        except torch.cuda.OutOfMemoryError:
            raise ArgumentError(
                f"--num-layers {args.num_layers}: the report holds this model twice, once with DeepSpeed's layers, and "
                "the device's memory is too small for it; give fewer layers, which are all alike"
            ) from None
    if dist.get_rank() > 0:
        return
    print(sentence(found), *(f"  {line}" for line in reasons(found)), sep="\n")
    if (file := loaded.section.overlap.calibration_file) and not found.times:
        print(f"  {file} was not written: no rank exchanges tokens with another, so there are no times to keep")
    if args.details:
        print(_setting(args, loaded), *details(found), *log(), *found.tables, sep="\n")
    else:
        print("  --details has the times of all parts, and what every slot costs")
    sys.stdout.flush()


class _Trained:
    """One engine that trains on the same random tokens in every step.

    Args:
        whole: DeepSpeed's JSON.
    """

    def __init__(self, args: argparse.Namespace, whole: Mapping[str, Any]) -> None:
        config = ScMoEConfig.from_deepspeed(whole)
        vocab_size = tokenizer_of(args).vocab_size
        shape = gpt_settings(args, pad_vocab_size(vocab_size, args.make_vocab_size_divisible_by))
        self.engine: Any = scmoe_ds.initialize(model=build_model(shape, config, args), config=whole)[0]
        sequences = self.engine.train_micro_batch_size_per_gpu()
        generator = torch.Generator().manual_seed(
            args.seed + tensor.data_parallel_rank()
        )  # one for tensor-parallel ranks
        self.tokens = torch.randint(vocab_size, (sequences, args.seq_length), generator=generator).to(device())
        self.accumulation: int = self.engine.gradient_accumulation_steps()

    def micro_batch(self) -> None:
        """Forward and backward; the last one of a step also reduces gradients and steps the optimizer."""
        self.engine.backward(self.engine(self.tokens, labels=self.tokens).loss)
        self.engine.step()

    def step(self) -> None:
        """One step of the optimizer, with all of its micro-batches."""
        for _ in range(self.accumulation):
            self.micro_batch()

    def under(self, schedules: Sequence[Schedule]) -> Callable[[], None]:
        """A step under other schedules than the engine's."""

        def step() -> None:
            for pair, schedule in zip(self.engine.overlap.pairs, schedules, strict=True):
                pair.schedule = schedule
            self.step()

        return step


def _measure(args: argparse.Namespace, loaded: LoadedConfig) -> Measured:
    whole, config = _to_measure(loaded)
    ours = _Trained(args, whole)
    overlap = ours.engine.overlap
    while overlap.calibrating:
        ours.step()
    overlap.settle()  # the rounds below compare
    variants: dict[str, Callable[[], None]] = {OURS: ours.under(overlap.schedules)}
    if overlap.times:
        variants[SERIAL] = ours.under(overlap.without_overlap)
    section = baseline_section(config)
    if config.architecture != "topk":
        variants[DEEPSPEED] = _Trained(args, {**whole, "scmoe": section}).step
    seconds = _take_turns(variants)
    return Measured(
        config=config,
        ranks=dist.get_world_size(),
        baseline=f"DeepSpeed's top-{section['top_k']}",
        seconds=seconds,
        hidden=_watch(ours) if SERIAL in variants else {},
        times=[(kind.times, len(kind.layers)) for kind in overlap.kinds if kind.times is not None],
        accumulation=ours.accumulation,
        tables=overlap.report(),
    )


def _to_measure(loaded: LoadedConfig) -> tuple[dict[str, Any], ScMoEConfig]:
    """The JSON with slot and number of chunks free, and with a loss scale under which no step is skipped."""
    whole, overlap = {**loaded.whole, "steps_per_print": 10**9}, loaded.section.overlap
    if whole.get("fp16", {}).get("enabled"):
        whole["fp16"] = {**whole["fp16"], "loss_scale": 1.0}
    if loaded.section.is_scheduled and (
        not overlap.enabled or (overlap.expert_slot, overlap.num_chunks) != ("auto", "auto")
    ):
        if dist.get_rank() == 0:
            logging.getLogger("scmoe_ds").warning(
                'the JSON fixes the schedule; this report plans as if slot and number of chunks were "auto"'
            )
        overlap = OverlapConfig(calibration_file=overlap.calibration_file, calibration_steps=overlap.calibration_steps)
    steps = overlap.calibration_steps or OverlapConfig().calibration_steps
    free = {**overlap.model_dump(), "calibration_steps": steps}
    whole["scmoe"] = {**whole["scmoe"], "overlap": free}
    return whole, ScMoEConfig.from_deepspeed(whole)


def baseline_section(config: ScMoEConfig) -> dict[str, Any]:
    """The section of DeepSpeed's own layer with as many experts per token, the shared one counted."""
    is_topk = config.architecture in ("topk", "pipelined_topk")
    fewest = min(config.num_experts) if isinstance(config.num_experts, list) else config.num_experts
    top_k = min(config.top_k + (not is_topk), fewest)
    noise = config.noisy_gate_policy if top_k == 1 or config.noisy_gate_policy != "RSample" else None
    fields = {name: getattr(config, name) for name in _OF_DEEPSPEED if name in config.written}
    return {**fields, "architecture": "topk", "top_k": top_k, "noisy_gate_policy": noise}


def _take_turns(variants: Mapping[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of the slowest rank for each variant's step in every round. Collective."""
    first = interleave(variants, rounds=1, warm_up=1, before=dist.barrier)
    (round_s,) = over_ranks([sum(each[0] for each in first.values())])
    rounds = min(max(round(SECONDS / round_s), ROUNDS[0]), ROUNDS[1])
    with tqdm(total=rounds * len(variants), desc="steps", disable=dist.get_rank() > 0 or None, leave=False) as bar:
        counted = {name: lambda step=step: (step(), bar.update())[0] for name, step in variants.items()}
        times = interleave(counted, rounds, warm_up=0, before=dist.barrier)
    return {name: over_ranks(seconds) for name, seconds in times.items()}


def _watch(ours: _Trained) -> dict[Any, HiddenShare]:
    """What of a step's communication the chosen schedules hide, by phase, mean over ranks; empty on ranks but 0."""
    overlap, recorder = ours.engine.overlap, Recorder(device())
    for pair, schedule in zip(overlap.pairs, overlap.schedules, strict=True):
        pair.schedule = schedule
    overlap.record(recorder)
    for _ in range(RECORDED):
        ours.micro_batch()
    overlap.record(None)
    ranks = gather_spans(recorder.spans())
    if ranks is None:
        return {}
    of_all = {phase: hidden_share_of_ranks(ranks, phase) for phase in PHASES}
    per_step = ours.accumulation / (RECORDED * len(ranks))
    return {
        phase: HiddenShare(each.communication_ms * per_step, each.exposed_ms * per_step)
        for phase, each in of_all.items()
    }


def _setting(args: argparse.Namespace, loaded: LoadedConfig) -> str:
    """What was measured, in one line."""
    sequences, accumulation = batch_sizes(loaded.whole, tensor.data_parallel_size())
    return (
        f"{dist.get_world_size()} ranks, {args.num_layers} layers {args.hidden_size} wide, vocabulary of "
        f"{args.tokenizer_type}, {sequences} × {args.seq_length} tokens per rank and micro-batch; micro-batches per "
        f"step: {accumulation}"
    )


@contextmanager
def _kept_log() -> Iterator[Callable[[], list[str]]]:
    """Keeps the package's log for later, so that the sentence comes first; warnings appear at once, on stderr."""
    logger, kept, urgent = logging.getLogger("scmoe_ds"), BufferingHandler(100_000), logging.StreamHandler(sys.stderr)
    urgent.setLevel(logging.WARNING)
    before, logger.handlers = logger.handlers, [kept, urgent]
    try:
        yield lambda: [each.getMessage() for each in kept.buffer if each.levelno < logging.WARNING]
    finally:
        logger.handlers = before


if __name__ == "__main__":
    sys.exit(main())
