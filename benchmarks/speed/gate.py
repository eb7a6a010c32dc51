"""Gate and encode, forward and backward: this package's against DeepSpeed's, and what of it nobody can save.

    python -m benchmarks.speed.gate --output benchmarks/results/gate.json

Both get the same tokens and gate, and choose and drop the same tokens. DeepSpeed's encode fills padded buffers; ours
does so too, or makes exact rows. The rows below the line are parts: the gate without encode, the gate's matrix product
alone, and one copy of the rows forward and one backward, the least that an encode has to do. Times are of the
processor: others may use the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.moe import sharded_moe
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor

from benchmarks.harness.measure import environment
from scmoe_ds.moe.gate import route
from scmoe_ds.moe.layout import ExactLayout, PaddedLayout
from scmoe_ds.moe.slices import TokenSlices
from scmoe_ds.planner.rounds import Spread, interleave

Outputs = list[Tensor]
BASELINE = "DeepSpeed"


def variants(gate: TopKGate, tokens: Tensor) -> dict[str, Callable[[], Outputs]]:
    """Functions from the tokens to all that has a gradient: loss, weights, rows."""

    def deepspeeds_gate() -> Outputs:
        l_aux, rows, _, expert, location, weight, _ = gate(tokens, None, True)
        return [l_aux, weight, expert, location, rows]

    def deepspeed() -> Outputs:
        l_aux, weight, expert, location, rows = deepspeeds_gate()
        experts, capacity = gate.wg.out_features, int(rows)
        slots = sharded_moe._route_slots(expert, location, experts, capacity)
        return [l_aux, weight, sharded_moe._sparse_encode(tokens, slots, experts, capacity)]

    def ours(layout: type[ExactLayout] | type[PaddedLayout]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            routing = route(gate, tokens)
            return [routing.l_aux, routing.weight_KT, layout.of(routing, TokenSlices()).encode(tokens)]

        return run

    def gate_alone() -> Outputs:
        routing = route(gate, tokens)
        return [routing.l_aux, routing.weight_KT]

    def product() -> Outputs:
        return [F.linear(tokens.float(), gate.wg.weight.float())]

    order = torch.randperm(len(tokens)).repeat(gate.k)
    return {
        BASELINE: deepspeed,
        "DeepSpeed again (A/A)": deepspeed,
        "ours, padded": ours(PaddedLayout),
        "ours, exact": ours(ExactLayout),
        "DeepSpeed's gate alone": deepspeeds_gate,
        "our gate alone": gate_alone,
        "the product alone": product,
        "rows copied, once each way": lambda: [_Copies.apply(tokens, order)],
    }


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order[: len(tokens)])
        return tokens.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, *ctx.saved_tensors), None


def train(run: Callable[[], Outputs], gate: TopKGate, tokens: Tensor, grads: dict[torch.Size, Tensor]) -> None:
    """One forward and backward pass; gradients of the outputs are made once for each shape."""
    outputs = [output for output in run() if output.requires_grad]
    for output in outputs:
        if output.shape not in grads:
            grads[output.shape] = torch.randn(output.shape).to(output.dtype)
    torch.autograd.backward(outputs, [grads[output.shape] for output in outputs])
    tokens.grad = gate.wg.weight.grad = None


def measure(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows, and a line for each."""
    torch.set_num_threads(1)
    rows = []
    for hidden, k in itertools.product(settings["hidden_sizes"], settings["top_k"]):
        torch.manual_seed(0)
        dtype, factor = getattr(torch, settings["dtype"]), settings["capacity_factor"]
        gate = TopKGate(hidden, settings["num_experts"], k, factor, top2_2nd_expert_sampling=False).to(dtype)
        tokens = torch.randn(settings["tokens"], hidden).to(dtype).requires_grad_()
        grads: dict[torch.Size, Tensor] = {}
        units = {
            name: lambda run=run, gate=gate, tokens=tokens, grads=grads: train(run, gate, tokens, grads)
            for name, run in variants(gate, tokens).items()
        }
        times = interleave(units, settings["rounds"], clock=time.process_time)
        for name, seconds in times.items():
            ratio = Spread.of_ratios(seconds, times[BASELINE])
            milliseconds = 1e3 * statistics.median(seconds)
            rows.append({"hidden_size": hidden, "k": k, "variant": name, "ms": milliseconds, "ratio": vars(ratio)})
            print(f"{hidden} wide, k={k} {name:28} {milliseconds:8.2f} ms, time / {BASELINE}: {ratio}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--num-experts", type=int, default=16)
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[1024, 512])
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--capacity-factor", type=float, default=1.25)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    rows = measure(settings)
    if args.output:
        record = {"settings": settings, "environment": environment(), "rows": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
