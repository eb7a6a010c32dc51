"""One MoE layer at EP=1: ScMoE against DeepSpeed's Residual MoE of the same sizes, same weights, same input.

    python -m benchmarks.layer --output benchmarks/results/layer.json

With `dispatch="padded"` both do the same work, and the ratio is the price of the staged interface; with "exact" ScMoE
leaves the padding out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from benchmarks.measure import Ratio, environment, interleave
from scmoe_ds import ScMoE


def make_layers(args: argparse.Namespace, k: int) -> dict[str, MoE]:
    """The baseline twice (A/A), and ScMoE with either dispatch; all with the baseline's weights."""
    hidden = args.hidden_size

    def build(cls: type[MoE], **kwargs: object) -> MoE:
        expert = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        return cls(hidden, expert, args.num_experts, k=k, capacity_factor=args.capacity_factor,
                   top2_2nd_expert_sampling=False, **kwargs)  # fmt: skip

    layers = {"Residual MoE": build(MoE, use_residual=True)}
    layers["Residual MoE again"] = layers["Residual MoE"]
    for dispatch in ("padded", "exact"):
        layers[f"ScMoE {dispatch}"] = build(ScMoE, merge="cg2", dispatch=dispatch)
        layers[f"ScMoE {dispatch}"].load_state_dict(layers["Residual MoE"].state_dict())
    return layers


def step(layer: MoE, x: Tensor, train: bool) -> Callable[[], None]:
    """One forward pass, or one forward and backward pass, over a copy of the input."""

    def run() -> None:
        with torch.set_grad_enabled(train):
            output, l_aux, _ = layer(x)
            if train:
                (output.mean() + l_aux).backward()
                layer.zero_grad(set_to_none=True)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--capacity-factor", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x = torch.randn(1, args.tokens, args.hidden_size, requires_grad=True)
    rows = []
    for k in (1, 2):
        layers = make_layers(args, k)
        for mode in ("forward", "forward + backward"):
            times = interleave({name: step(layer, x, mode != "forward") for name, layer in layers.items()}, args.rounds)
            base = times["Residual MoE"]
            for name in list(layers)[1:]:
                ratio = Ratio.of(times[name], base)
                rows.append({"k": k, "mode": mode, "variant": name, "ratio": vars(ratio),
                             "baseline_ms": 1e3 * sorted(base)[len(base) // 2]})  # fmt: skip
                print(f"k={k} {mode:19} {name:20} time / Residual MoE: {ratio}", flush=True)
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        args.output.write_text(json.dumps({"settings": settings, "environment": environment(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
