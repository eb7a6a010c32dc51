"""One MoE layer: this package's against DeepSpeed's of the same sizes, same weights, same input.

    python -m benchmarks.layer --output benchmarks/results/layer.json                 # EP 1
    python -m benchmarks.layer --ep-size 2 --output benchmarks/results/layer_ep2.json # EP 2 on loopback

Baselines are DeepSpeed's Residual MoE (for ScMoE) and its MoE (for StagedMoE). With `dispatch="padded"` both sides do
the same work, and the ratio is the price of the staged interface; with "exact" the padding is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from benchmarks.measure import Ratio, environment, interleave
from scmoe_ds import ScMoE
from scmoe_ds.moe.layer import StagedMoE
from tests.helpers.distributed import run_distributed

BASELINES = ("Residual MoE", "MoE")


def make_layers(settings: dict[str, Any], k: int, capacity_factor: float) -> dict[str, MoE]:
    """Both baselines twice (A/A), and this package's layers with either dispatch, with the baseline's weights."""
    hidden = settings["hidden_size"]

    def build(cls: type[MoE], **kwargs: object) -> MoE:
        torch.manual_seed(0)
        expert = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        layer = cls(hidden, expert, settings["num_experts"], settings["ep_size"], k, capacity_factor=capacity_factor,
                    top2_2nd_expert_sampling=False, **kwargs)  # fmt: skip
        layer.set_deepspeed_parallelism()
        return layer

    layers = {"Residual MoE": build(MoE, use_residual=True), "MoE": build(MoE)}
    layers |= {f"{name} again": layer for name, layer in layers.items()}
    for dispatch in ("padded", "exact"):
        for name, cls, kwargs in (("ScMoE", ScMoE, {"merge": "cg2"}), ("StagedMoE", StagedMoE, {})):
            layer = build(cls, dispatch=dispatch, **kwargs)
            layer.load_state_dict(layers["Residual MoE" if cls is ScMoE else "MoE"].state_dict())
            layers[f"{name} {dispatch}"] = layer
    return layers


def step(layer: MoE, x: Tensor, train: bool) -> Callable[[], None]:
    """One forward pass, or one forward and backward pass."""

    def run() -> None:
        with torch.set_grad_enabled(train):
            output, l_aux, _ = layer(x)
            if train:
                (output.mean() + l_aux).backward()
                layer.zero_grad(set_to_none=True)

    return run


def measure(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows; runs on every rank."""
    torch.set_num_threads(1)
    torch.manual_seed(dist.get_rank())
    x = torch.randn(1, settings["tokens"], settings["hidden_size"], requires_grad=True)
    rows = []
    for k, factor, mode in itertools.product((1, 2), settings["capacity_factors"], ("forward", "train")):
        layers = make_layers(settings, k, factor)
        units = {name: step(layer, x, mode == "train") for name, layer in layers.items()}
        times = interleave(units, settings["rounds"], before=dist.barrier)
        for name in [name for name in layers if name not in BASELINES]:
            baseline = "Residual MoE" if name.startswith(("Residual", "ScMoE")) else "MoE"
            ratio = Ratio.of(times[name], times[baseline])
            row = {"k": k, "capacity_factor": factor, "mode": mode, "variant": name, "baseline": baseline}
            median = 1e3 * sorted(times[baseline])[len(times[baseline]) // 2]
            rows.append(row | {"ratio": vars(ratio), "baseline_ms": median})
            if dist.get_rank() == 0:
                print(f"k={k} cf={factor} {mode:7} {name:18} time / DeepSpeed {baseline}: {ratio}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024, help="per rank")
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--ep-size", type=int, default=1, help="processes on loopback")
    parser.add_argument("--capacity-factors", type=float, nargs="+", default=[2.0, 1.0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    rows = run_distributed(measure, args.ep_size, settings, timeout_s=3600)[0]
    if args.output:
        record = {"settings": settings, "environment": environment(), "rows": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
