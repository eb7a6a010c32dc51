"""One MoE layer: this package's against DeepSpeed's of the same sizes, same weights, same input.

    python -m benchmarks.speed.layer --output benchmarks/results/layer_ep1.json             # EP 1
    python -m benchmarks.speed.layer --ep-size 2 --output benchmarks/results/layer_ep2.json # EP 2 on loopback
    python -m benchmarks.speed.layer --executor --output benchmarks/results/executor.json   # the executor, EP 1

Baselines are DeepSpeed's Residual MoE (for ScMoE) and its MoE (for StagedMoE). With `dispatch="padded"` both sides do
the same work, and the ratio is the price of the staged interface; with "exact" the padding is left out.

With --executor, a ScMoE Pos-2 pair without communication runs under the executor, and the same operators in the same
order are written out by hand: the difference is what schedules, streams and marks cost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from benchmarks.harness.measure import environment
from lab.distributed import run_distributed
from scmoe_ds import ScMoE
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.make_pairs import make_pair
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.planner.rounds import Spread, interleave

BASELINES = ("Residual MoE", "MoE")
Computation = Callable[[], tuple[Tensor, Tensor]]


def make_layers(settings: dict[str, Any], k: int, capacity_factor: float) -> dict[str, MoE]:
    """Both baselines twice (A/A), and this package's layers with either dispatch, with the baseline's weights."""
    hidden = settings["hidden_size"]

    def build(cls: type[MoE], **kwargs: object) -> MoE:
        torch.manual_seed(0)
        expert = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        layer = cls(
            hidden,
            expert,
            settings["num_experts"],
            settings["ep_size"],
            k,
            capacity_factor=capacity_factor,
            top2_2nd_expert_sampling=False,
            **kwargs,
        )
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
            ratio = Spread.of_ratios(times[name], times[baseline])
            row = {"k": k, "capacity_factor": factor, "mode": mode, "variant": name, "baseline": baseline}
            median = 1e3 * sorted(times[baseline])[len(times[baseline]) // 2]
            rows.append(row | {"ratio": vars(ratio), "baseline_ms": median})
            if dist.get_rank() == 0:
                print(f"k={k} cf={factor} {mode:7} {name:18} time / DeepSpeed {baseline}: {ratio}", flush=True)
    return rows


def build_pair(settings: dict[str, Any]) -> StagedPair:
    """A ScMoE Pos-2 pair with all experts on this rank; the experts' slot is before the second attention."""
    section = {"num_experts": settings["num_experts"], "overlap": {"expert_slot": 2, "num_chunks": 1}}
    config = ScMoEConfig.from_deepspeed({"scmoe": section})
    shape = GPTSettings(2, settings["hidden_size"], settings["hidden_size"] // 64, 64, settings["tokens"])
    torch.manual_seed(0)
    run = make_pair(shape, config, settings["num_experts"], config.position, settings["tokens"])
    run.blocks[-1].moe.set_deepspeed_parallelism()
    return run


def by_hand(run: StagedPair, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What `run(hidden)` computes at slot 2, straight on: output and load-balancing loss."""
    first, last = run.blocks
    assert run.shortcut_norm is not None
    attended = hidden + first.attention(first.attention_norm(hidden))
    routed = last.moe.begin(run.shortcut_norm(attended))
    hidden = attended + first.mlp(first.mlp_norm(attended))
    routed.run_experts()
    hidden = hidden + last.attention(last.attention_norm(hidden))
    moe_input = last.mlp_norm(hidden)
    shared = last.moe.shared(moe_input)
    output, l_aux, _ = last.moe.finish(routed, moe_input, shared)
    return hidden + output, l_aux


def measure_executor(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The executor over the same operators by hand, and that twice (A/A); one process.

    Microseconds come from a pair so small that Python is nearly all of its time: what is lost in the noise of the real
    one shows there.
    """
    torch.set_num_threads(1)
    rows = []
    small = settings | {"hidden_size": 64, "tokens": 32}
    for sizes, mode in itertools.product((settings, small), ("forward", "train")):
        run = build_pair(sizes)
        x = torch.randn(1, sizes["tokens"], sizes["hidden_size"], requires_grad=True)

        def under_executor(run: StagedPair = run, x: Tensor = x) -> tuple[Tensor, Tensor]:
            output = run(x)
            return output.hidden, output.l_aux

        plain = partial(by_hand, run, x)
        assert torch.equal(under_executor()[0], plain()[0])
        functions: dict[str, Computation] = {"executor": under_executor, "by hand": plain, "by hand again (A/A)": plain}
        units = {name: pair_step(run, function, mode == "train") for name, function in functions.items()}
        rounds = settings["rounds"] * (1 if sizes is settings else 20)
        times = interleave(units, rounds)
        for name in ("executor", "by hand again (A/A)"):
            ratio = Spread.of_ratios(times[name], times["by hand"])
            extra = Spread.of([1e6 * (a - b) for a, b in zip(times[name], times["by hand"], strict=True)])
            row = {key: sizes[key] for key in ("hidden_size", "tokens")} | {"mode": mode, "variant": name}
            row |= {"by_hand_ms": 1e3 * statistics.median(times["by hand"]), "over_by_hand": vars(ratio)}
            rows.append(row | {"extra_us": vars(extra), "rounds": rounds})
            print(
                f"{sizes['hidden_size']} wide, {sizes['tokens']} tokens, {mode:7} {name:20} time / by hand: {ratio}, "
                f"{extra.median:+.0f} µs of {row['by_hand_ms']:.2f} ms",
                flush=True,
            )
    return rows


def pair_step(run: StagedPair, function: Computation, train: bool) -> Callable[[], None]:
    """One forward pass, or one forward and backward pass, of a pair."""

    def step() -> None:
        with torch.set_grad_enabled(train):
            output, l_aux = function()
            if train:
                (output.mean() + l_aux).backward()
                run.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024, help="per rank")
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--ep-size", type=int, default=1, help="processes on loopback")
    parser.add_argument("--capacity-factors", type=float, nargs="+", default=[2.0, 1.0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--executor", action="store_true", help="measure the executor instead")
    parser.add_argument("--output", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    if args.executor and args.ep_size > 1:
        parser.error("--executor measures one process: nothing must be communicated")
    rows = run_distributed(measure_executor if args.executor else measure, args.ep_size, settings, timeout_s=3600)[0]
    if args.output:
        record = {"settings": settings, "environment": environment(), "rows": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
