"""Does overlap pay on this machine? Times a model's first micro-batches, without training it, and says what they mean.

    deepspeed --module scmoe_ds.programs.report --deepspeed_config X.json --num-layers 4 …
    scmoe report --deepspeed_config X.json …          (one process, nothing to communicate)

The flags are those of pretrain_gpt_scmoe.py; tokens are random. Training logs the choice, and not the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

import scmoe_ds
from scmoe_ds.config.batch_sizes import batch_sizes
from scmoe_ds.config.loading import LoadedConfig
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.parallel.output import log
from scmoe_ds.parallel.process import device
from scmoe_ds.programs.flags.checks import require_same_flags
from scmoe_ds.programs.flags.gpt import gpt_settings, parse_arguments
from scmoe_ds.programs.run import run_program
from scmoe_ds.trace.recorder import Recorder
from scmoe_ds.trace.spans import gather_spans, hidden_share_of_ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the model of a training command, times it, and prints the report; returns the exit code."""
    return run_program("scmoe report", argv, _measure, parse_arguments)


def _measure(args: argparse.Namespace, loaded: LoadedConfig, rounds: int = 5) -> None:
    """Calibrates and prints the times, then looks at the chosen schedule at work."""
    whole, config = loaded.whole, loaded.section
    require_same_flags(args, whole)
    config.check_world(dist.get_world_size())
    micro_batch_size, _ = batch_sizes(whole, dist.get_world_size())
    overlap = config.overlap
    if not overlap.enabled or (overlap.expert_slot, overlap.num_chunks) != ("auto", "auto"):
        if dist.get_rank() == 0:
            print('the JSON fixes the schedule; this report plans as if slot and number of chunks were "auto"')
        overlap = OverlapConfig(calibration_file=overlap.calibration_file)
    steps = overlap.calibration_steps or OverlapConfig().calibration_steps
    free = {**overlap.model_dump(), "calibration_steps": steps}
    whole = {**whole, "scmoe": {**whole["scmoe"], "overlap": free}}
    shape = gpt_settings(args, padded_vocab_size=256)  # the vocabulary is no part of any pair
    model = GPT(shape, config, args.seq_length)
    initialize_parameters(model, args.seed, shape.init_method_std, shape.num_layers)
    engine, *_ = scmoe_ds.initialize(model=model, config=whole)

    def micro_batch() -> None:
        tokens = torch.randint(256, (micro_batch_size, args.seq_length), device=device())
        loss = engine.module(tokens, labels=tokens).loss
        # Not backward(): nothing is to be accumulated, reduced or stepped.
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)

    while engine.overlap.calibrating:
        micro_batch()
    log(*engine.overlap.report())
    recorder = Recorder(device())
    engine.overlap.record(recorder)
    for _ in range(rounds):
        micro_batch()
    ranks = gather_spans(recorder.spans())
    if ranks is None:
        return
    found = {phase: hidden_share_of_ranks(ranks, phase) for phase in ("forward", "backward")}
    if not any(each.communication_ms for each in found.values()):
        print(
            "nothing travels between ranks: there is no communication to hide (scmoe.expert_parallel_size is 1, or "
            "the architecture runs DeepSpeed's own layers)",
            flush=True,
        )
        return
    shares = ", ".join(
        f"{100 * each.share:.0f} % {phase} ({each.exposed_ms / rounds / len(ranks):.1f} of "
        f"{each.communication_ms / rounds / len(ranks):.1f} ms per micro-batch exposed)"
        for phase, each in found.items()
    )
    print(
        f"measured with the schedules in use, all layers, mean of {rounds} micro-batches: hidden {shares}", flush=True
    )


if __name__ == "__main__":
    sys.exit(main())
