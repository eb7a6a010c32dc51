"""What the hooks of a replaced model cost, against the same model written directly with this package's pairs.

    python -m benchmarks.speed.replace --output benchmarks/results/replace.json

One process, EP 1: nothing is communicated, so that the difference is Python. Both models have the same weights, the
same operators and the same slot; their outputs and gradients are compared before they are timed. A training step is
forward and backward pass, without the optimizer, which is the same for both. The directly written model is timed twice
(A/A). Microseconds per pair come from a model so small that Python is nearly all of its time.
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
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from benchmarks.harness.measure import environment
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.layers import MLP, Attention, GPTSettings, make_norm
from scmoe_ds.models.make_pairs import make_pair
from scmoe_ds.planner.rounds import Spread, interleave
from scmoe_ds.replace import replace_moe_layers
from scmoe_ds.replace.upcycle import MoEFeedForward

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
POSITIONS = ("pos1", "pos2", "pos3")
DIRECT, REPLACED, AGAIN = "written directly", "replaced", "written directly again (A/A)"


class Block(nn.Module):
    """As others write it, with LLaMA's names and this package's operators."""

    def __init__(self, shape: GPTSettings, feed_forward: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), feed_forward
        self.input_layernorm, self.post_attention_layernorm = make_norm(shape), make_norm(shape)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, D] → [B, S, D]."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Replaced(nn.Module):
    """Pairs of blocks, the second of which had DeepSpeed's Residual MoE."""

    def __init__(self, shape: GPTSettings, config: ScMoEConfig, num_experts: int) -> None:
        super().__init__()
        blocks = []
        for _ in range(shape.num_layers // 2):
            moe = MoE(
                shape.hidden_size,
                MLP(shape),
                num_experts,
                config.expert_parallel_size,
                capacity_factor=config.capacity_factor,
                min_capacity=config.min_capacity,
                use_residual=True,
                use_rts=False,
            )
            blocks += [Block(shape, MLP(shape)), Block(shape, MoEFeedForward(moe))]
        self.layers = nn.ModuleList(blocks)
        replace_moe_layers(self, config)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, D] → the same, and the load-balancing loss."""
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden, sum(each.l_aux for each in self.modules() if isinstance(each, MoEFeedForward))


class Direct(nn.Module):
    """The same pairs as this package's own runs.

    Args:
        same: a `Replaced`, or a model with the same modules, whose weights are copied.

    Attributes:
        names: of each parameter, what it is called in `same`.
    """

    def __init__(self, shape: GPTSettings, config: ScMoEConfig, num_experts: int, same: nn.Module) -> None:
        super().__init__()
        following = [config.position] * (shape.num_layers // 2 - 1) + [None]
        runs = [
            make_pair(shape, config, num_experts, config.position, shape.max_position_embeddings, following=each)
            for each in following
        ]
        self.runs = nn.ModuleList(runs)
        self.names = {name: replaced_name(name) for name, _ in self.named_parameters()}
        for name, parameter in self.named_parameters():
            parameter.data.copy_(same.get_parameter(self.names[name]))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As `Replaced`."""
        losses, late = [], []
        for run in self.runs:
            output = run(hidden, None, *late)
            hidden, late = output.hidden, [] if output.late is None else [output.late]
            losses.append(output.l_aux)
        return hidden, sum(losses)


def replaced_name(name: str) -> str:
    """A parameter of `Direct` in `Replaced`."""
    _, run, rest = name.split(".", 2)
    if rest.startswith("shortcut_norm"):
        return f"layers.{2 * int(run) + 1}.mlp.moe.{rest}"
    _, block, rest = rest.split(".", 2)
    part, rest = rest.split(".", 1)
    theirs = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention": "self_attn",
        "moe": "mlp.moe",
    }
    return f"layers.{2 * int(run) + int(block)}.{theirs.get(part, part)}.{rest}"


def results(model: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters by their names in `Replaced`, that of the input, output and loss."""
    names = model.names if isinstance(model, Direct) else {}
    hidden = hidden.detach().requires_grad_()
    output, l_aux = model(hidden)
    loss = output.square().mean() + l_aux
    loss.backward()
    found = {names.get(name, name): each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad(set_to_none=True)
    return {**found, "input": hidden.grad, "output": output.detach(), "loss": loss.detach()}


def require_same(direct: Direct, replaced: Replaced, hidden: Tensor) -> None:
    """The two compute the same, also after the first pass, which looks for operators.

    Raises:
        RuntimeError: they do not.
    """
    expected = results(direct, hidden)
    for _ in range(2):
        found = results(replaced, hidden)
        for name, value in expected.items():
            difference = float((found[name] - value).abs().max())
            if difference > 1e-5 * max(1.0, float(value.abs().max())):
                raise RuntimeError(f"{name} differs by {difference} between the models to be compared")


def step(model: nn.Module, hidden: Tensor, train: bool) -> Callable[[], None]:
    """One forward pass, or one forward and backward pass."""

    def run() -> None:
        with torch.set_grad_enabled(train):
            output, l_aux = model(hidden)
            if train:
                (output.mean() + l_aux).backward()
                model.zero_grad(set_to_none=True)

    return run


def measure(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per size, position, mode and model."""
    torch.set_num_threads(1)
    rows = []
    small = settings | {"hidden_size": 64, "tokens": 32}
    for sizes, position in itertools.product((settings, small), settings["positions"]):
        config = ScMoEConfig.from_deepspeed(
            {
                "scmoe": {
                    "position": position,
                    "merge": "cg2",
                    "num_experts": sizes["num_experts"],
                    "use_rts": False,
                    "overlap": {"expert_slot": 2, "num_chunks": 1},
                }
            }
        )
        width, tokens = sizes["hidden_size"], sizes["tokens"]
        shape = GPTSettings(2 * sizes["pairs"], width, max(width // 64, 1), 64, tokens)
        torch.manual_seed(0)
        replaced = Replaced(shape, config, sizes["num_experts"])
        direct = Direct(shape, config, sizes["num_experts"], replaced)
        hidden = torch.randn(1, tokens, width, requires_grad=True)
        require_same(direct, replaced, hidden)
        for train in (False, True):
            units = {
                DIRECT: step(direct, hidden, train),
                REPLACED: step(replaced, hidden, train),
                AGAIN: step(direct, hidden, train),
            }
            rounds = settings["rounds"] * (1 if sizes is settings else 20)
            times = interleave(units, rounds, clock=CLOCKS[settings["clock"]])
            row = {
                "hidden_size": width,
                "tokens": tokens,
                "position": position,
                "mode": "train" if train else "forward",
            }
            rows += [row | compare(name, times, sizes["pairs"]) for name in (REPLACED, AGAIN)]
            for found in rows[-2:]:
                print(
                    "{hidden_size} wide, {tokens} tokens, {position}, {mode:7} {variant:28} ".format(**found)
                    + found["text"],
                    flush=True,
                )
    return rows


def compare(name: str, times: dict[str, list[float]], pairs: int) -> dict[str, Any]:
    """Times of a model over those of the directly written one."""
    ratio = Spread.of_ratios(times[name], times[DIRECT])
    extra = Spread.of([1e6 * (a - b) / pairs for a, b in zip(times[name], times[DIRECT], strict=True)])
    direct_ms = 1e3 * statistics.median(times[DIRECT])
    text = f"time / written directly: {ratio}, {extra.median:+.0f} µs per pair; {direct_ms:.2f} ms"
    return {
        "variant": name,
        "direct_ms": direct_ms,
        "over_direct": vars(ratio),
        "extra_us_per_pair": vars(extra),
        "rounds": len(times[name]),
        "text": text,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--num-experts", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--positions", nargs="+", choices=POSITIONS, default=list(POSITIONS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for a machine with other work")
    parser.add_argument("--output", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    rows = measure(settings)
    if args.output:
        record = {"settings": settings, "environment": environment(), "rows": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
