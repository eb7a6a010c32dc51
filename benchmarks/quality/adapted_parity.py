"""Whether an adapted model computes in AutoEP's engine what its directory computes in transformers alone.

    python -m benchmarks.quality.adapted_parity --output benchmarks/results/adapted_parity --every 5

Families × positions × joins × merges × norms × layers, on two ranks that share the experts, in fp64: logits and the
gradients of all parameters of the engine (in one piece, overlapped, in two chunks) against hooks on transformers' own
modules in one process.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from benchmarks.harness.measure import environment, environment_text
from benchmarks.harness.tables import table
from lab.distributed import run_distributed
from lab.moe_families import FAMILIES
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.replace.hooked import HookedPair
from tests.replace.test_autoep_adapted import both, passed, tokens_of
from tests.replace.test_autoep_shortcuts import whole

SPARSE = ("mixtral", "qwen3_moe", "olmoe")
"""Families without a shared expert: one is added where the merge weighs one."""
DENSE_FIRST = ("deepseek_v2", "deepseek_v3", "glm4_moe")
EVERY_SECOND = ("qwen2_moe", "qwen3_moe")
LIMIT = 1e-5

Case = tuple[str, dict[str, Any], dict[str, Any]]


def cases() -> Iterator[Case]:
    """Family, what its config has more, and the section."""
    for family in FAMILIES:
        if family == "longcat_flash":
            continue
        for join, merge, norm, layers in itertools.product(
            ("end", "late"), ("add", "cg1", "cg2"), ("own", "shared"), (None, [0])
        ):
            shared = "mean" if family in SPARSE and merge != "add" else "none"
            section = {"join": join, "merge": merge, "shortcut_norm": norm}
            yield family, {}, {**section, "adapt": {"layers": layers, "shared_expert": shared}}
            for position in ("pos2", "pos3") if layers is None else ():
                given = {**section, "adapt": {"layers": layers, "shared_expert": shared}}
                if family in DENSE_FIRST:
                    more = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
                    yield family, more, {**given, "first_layer_position": position}
                if family in EVERY_SECOND:
                    more = {"num_hidden_layers": 4, "decoder_sparse_step": 2}
                    yield family, more, {**given, "position": position}


def worst_of(case: Case) -> dict[str, float]:
    """Largest differences of logits and gradients, relative to the largest value of the tensor."""
    family, more, section = case
    engine, eager = both(family, more, whole(**section))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    expected = [passed(eager, tokens_of(each)) for each in range(ranks)]
    worst = {"logits": 0.0, "gradients": 0.0}
    for schedule in (None, Schedule(2), Schedule((1, 2), 2)):
        for pair in engine.overlap.pairs:
            if schedule is not None and isinstance(pair, HookedPair):
                pair.schedule = schedule
        logits, found = passed(engine.module, tokens_of(rank))
        worst["logits"] = max(worst["logits"], _relative(logits, expected[rank][0]))
        for name, gradient in found.items():
            there = _in_one_process(name, gradient, expected)
            worst["gradients"] = max(worst["gradients"], _relative(gradient, there))
    return worst


def _in_one_process(name: str, gradient: Tensor, expected: list[tuple[Tensor, dict[str, Tensor]]]) -> Tensor:
    """The gradient of an engine's parameter. Experts' gradients are of all ranks' tokens."""
    rank = dist.get_rank()
    path, _, last = name.rpartition(".")
    if path.endswith(".experts") and last in ("w1", "w2", "w3"):
        fused = [each[1][f"{path}.{'down_proj' if last == 'w2' else 'gate_up_proj'}"] for each in expected]
        total = fused[0] + fused[1]
        total = total if last == "w2" else total.chunk(2, dim=1)[last == "w3"]
        return total[rank * len(gradient) :][: len(gradient)]
    own = expected[rank][1]
    there = name.replace("router.gate", "gate").replace("shared_experts_gate", "shared_expert_gate")
    return own[there] if there in own else own[there.replace("shared_experts.", "shared_expert.")]


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-3))


def measured(every: int) -> list[dict[str, Any]]:
    """On every rank, a row for each case."""
    logging.getLogger("scmoe_ds").setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []
    for family, more, section in list(cases())[::every]:
        worst = worst_of((family, more, section))
        rows.append({"family": family, "config": more, "scmoe": section, **worst})
        gc.collect()
    return rows


def page(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The record in words."""
    cells = []
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        positions = {row["scmoe"].get("position") or row["scmoe"].get("first_layer_position") or "pos1" for row in own}
        worst = [f"{max(row[name] for row in own):.1e}" for name in ("logits", "gradients")]
        cells.append([family, str(len(own)), ", ".join(sorted(positions)), *worst])
    above = sum(max(row["gradients"], row["logits"]) > LIMIT for row in rows)
    return "\n".join(
        [
            "# Adapted models: AutoEP's engine against transformers alone",
            "",
            environment_text(facts),
            "",
            "Two ranks that share the experts, fp64 (routers and some norms of transformers compute in fp32), three",
            "schedules each. Joins end and late, merges add, cg1 and cg2, norms own and shared, all layers or one,",
            "with an added shared expert where the family has none and the merge weighs one. Largest differences,",
            f"relative to the largest value of the tensor; {above} of {len(rows)} cases are above {LIMIT:.0e}.",
            "",
            *table(["family", "cases", "positions", "logits", "gradients"], cells),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="only one of so many cases")
    args = parser.parse_args()
    found, facts = run_distributed(measured, 2, args.every, timeout_s=2400), environment()
    rows = [
        {**one, **{name: max(one[name], other[name]) for name in ("logits", "gradients")}}
        for one, other in zip(*found, strict=True)
    ]
    args.output.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", "utf-8")
    args.output.with_suffix(".md").write_text(page(rows, facts), "utf-8")


if __name__ == "__main__":
    main()
