"""What a rank computes and sends in one micro-batch: model, method and layout to work."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import groupby

from scmoe_ds.simulate.ground import Ground
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.model_flops import step_flops
from scmoe_ds.simulate.operators import Cost
from scmoe_ds.simulate.operators_dense import embedding, head_and_loss
from scmoe_ds.simulate.operators_swin import image_head, patch_embedding
from scmoe_ds.simulate.pair_work import Block, pair_of, trailing
from scmoe_ds.simulate.parameters import method_of, outside
from scmoe_ds.simulate.refusals import require
from scmoe_ds.simulate.work import PairWork, Parameters, StepWork, Work


def step_work(model: Model, method: Method, layout: Layout) -> StepWork:
    """The work of one rank.

    Raises:
        ModelError: a method or layout that the model cannot run with.
    """
    require(model, method, layout)
    return _work(model, method, for_one_rank(layout))


def for_one_rank(layout: Layout) -> Layout:
    """The layout without all that a rank's work does not depend on: layouts of a search share most of it."""
    ranks = layout.expert_parallel * layout.tensor_parallel
    return replace(layout, world=ranks, zero_stage=1, accumulation=1, hierarchical=False)


@functools.lru_cache(maxsize=4096)
def _work(model: Model, method: Method, layout: Layout) -> StepWork:
    grounds = [
        Ground(model, stage, method_of(model, number, method), layout) for number, stage in enumerate(model.stages)
    ]
    runs, rest = _runs(model, grounds)
    known: dict[object, PairWork] = {}
    pairs = []
    for number, run in enumerate(runs):
        following = runs[number + 1] if number + 1 < len(runs) else None
        key = tuple(block.key for block in run), following and tuple(block.key for block in following)
        if key not in known:
            known[key] = pair_of(run, following)
        pairs.append(known[key])
    merged = [replace(pair, count=len(list(like))) for pair, like in groupby(pairs)]
    behind, parameters = trailing(rest)
    last = behind + _head(grounds[-1])
    whole = Parameters(outside(grounds[0], grounds[-1]) + parameters)
    first = _first(grounds[0])
    return StepWork(
        pairs=tuple(merged),
        first=_named(first, "embedding", layout),
        last=_named(last, "head and loss", layout),
        outside=whole,
        tokens=float(layout.micro_batch * (1 if model.images else model.stages[0].tokens)),
        flops=step_flops(model, method, layout),
    )


def _runs(model: Model, grounds: list[Ground]) -> tuple[list[list[Block]], list[Block]]:
    """The model's blocks, cut behind each that has an MoE, and those behind the last cut."""
    runs: list[list[Block]] = []
    run: list[Block] = []
    for number, ground in enumerate(grounds):
        stage, places = ground.stage, set(ground.stage.moe_layers)
        windows = model.images and stage.tokens > stage.span
        for layer in range(stage.layers):
            before = grounds[number - 1] if model.images and number and layer == 0 else None
            run.append(
                Block(ground, model.stages.index(stage), layer in places, before, shifted=windows and layer % 2 == 1)
            )
            if layer in places:
                runs.append(run)
                run = []
    return runs, run


def _first(ground: Ground) -> Cost:
    return patch_embedding(ground) if ground.model.images else embedding(ground)


def _head(ground: Ground) -> Cost:
    return image_head(ground) if ground.model.images else head_and_loss(ground)


def _named(cost: Cost, name: str, layout: Layout) -> Work:
    return (cost if layout.training else cost.without_backward()).named(name)
