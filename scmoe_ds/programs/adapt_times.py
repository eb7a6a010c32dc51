"""Times the pairs of an adapted GPT on the ranks that the program was started on. Nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scmoe_ds.analysis.feasibility import Times
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.pairs import describe_pair
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.identity import identity
from scmoe_ds.parallel.agreement import from_rank_zero
from scmoe_ds.parallel.groups import Layout, nodes_of_ranks
from scmoe_ds.planner.auto import choose_all_to_all
from scmoe_ds.planner.calibrator import Calibrator


def time_pairs(model: GPT, config: ScMoEConfig, layout: Layout, shape: Sequence[int]) -> Times:
    """Forward and backward of micro-batches of random tokens with all layers converted, as training times its first
    ones. Collective over the world. Afterwards the model is as before.

    Args:
        model: with base pairs, in evaluation mode.
        config: its section.
        layout: of the ranks.
        shape: sequences of a micro-batch on each rank, and tokens of each.
    """
    device, before = model.embedding.weight.device, model.conversion.converted
    model.conversion.only(model.conversion.numbers)
    model.train().requires_grad_(True)
    pairs, nodes = list(model.scheduled_pairs()), len(set(nodes_of_ranks()))
    choose_all_to_all(model, config.all_to_all, layout, shape[0] * shape[1])
    own = [describe_pair(pair, config, shape[0], shape[1], nodes) for pair in pairs]
    calibrator = Calibrator(
        pairs, OverlapConfig(), device, "train", from_rank_zero(lambda: own), identity=identity(model)
    )
    tokens = torch.randint(model.settings.vocab_size, tuple(shape), device=device)
    with torch.enable_grad():
        while calibrator.calibrating:
            calibrator.begin()
            loss = model(tokens, labels=tokens).loss
            assert loss is not None
            loss.backward()
            model.zero_grad(set_to_none=True)
    model.eval().requires_grad_(False)
    model.conversion.only(before)
    known = [(kind.description, kind.times) for kind in calibrator.kinds if kind.times is not None]
    return Times(calibrator.identity, known)
