"""Gate, encode, experts and decode against DeepSpeed's layer, AutoEP and what the card can do; whole layers at EP 1."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from benchmarks.gpu.ceilings import Ceilings, measure
from benchmarks.gpu.layers import AUTOEP, DEEPSPEED, OURS, expert_flops, make_all
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setting import LayerShape, Setting, layer_shapes, token_counts
from benchmarks.gpu.timing import ColdClock, text
from scmoe_ds.engine import connect
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.planner.rounds import Spread, interleave
from scmoe_ds.trace.recorder import Recorder

STAGES = ("gate", "encode", "experts", "decode")
INPUTS = 4
STEPS_PER_ROUND = 5
Times = dict[tuple[str, str], list[float]]
"""Milliseconds by stage and phase."""


def run(notes: Notes, setting: Setting) -> None:
    """The step: all shapes and numbers of tokens."""
    connect()
    torch.manual_seed(0)
    clock = ColdClock(setting.device)
    ceilings = measure(notes, setting, clock)
    worst: dict[str, list[float]] = defaultdict(list)
    for shape in layer_shapes(setting):
        layers, why_no_autoep = make_all(shape, setting.device)
        if why_no_autoep:
            notes.row("Left out", shape=shape.name, layer=AUTOEP, reason=why_no_autoep)
        for tokens in token_counts(setting):
            inputs = [_tokens(shape, tokens, setting) for _ in range(INPUTS)]
            times = our_times(layers[OURS], inputs, clock, setting.size(20, 2))
            shares = _our_rows(notes, ceilings, shape, tokens, times)
            _their_rows(notes, ceilings, shape, tokens, layers, inputs, clock, setting.size(20, 2))
            ratio = _whole_layers(notes, shape, tokens, layers, inputs, setting.size(15, 2))
            worst["layer: DeepSpeed's time over ours"].append(ratio)
            if tokens == token_counts(setting)[-1]:
                for name, value in shares.items():
                    worst[name].append(value)
            for name, values in worst.items():  # after each shape: a later one may fail
                notes.number(name, max(values) if "over the experts" in name else min(values))
        del layers


def _tokens(shape: LayerShape, tokens: int, setting: Setting) -> Tensor:
    hidden = torch.randn(1, tokens, shape.hidden_size, device=setting.device, dtype=torch.bfloat16)
    return hidden.requires_grad_()


def our_times(layer: StagedMoE, inputs: Sequence[Tensor], clock: ColdClock, repeats: int) -> Times:
    """Each stage where it stands in the layer, forward and backward, from the package's own recorder.

    The host waits for the row counts once. Behind that it gets ahead again, before the experts and before backward.
    Encode follows the gate as in training: part of its input may be in the last cache.
    """
    times: Times = defaultdict(list)
    for number in range(-2, repeats):
        hidden = inputs[number % len(inputs)]
        recorder = Recorder(clock.device)
        clock.get_cold()
        routed = layer.begin(hidden, recorder=recorder.pair(0))
        routed.send()
        clock.get_cold()
        routed.run_experts()
        clock.get_cold()
        output, l_aux, _ = layer.finish(routed, hidden)
        clock.get_cold()
        torch.autograd.backward([output, l_aux], [torch.randn_like(output), torch.ones_like(l_aux)])
        layer.zero_grad(set_to_none=True)
        hidden.grad = None
        for span in recorder.spans() if number >= 0 else []:
            times[span.name, span.phase].append(span.duration_ms)
    return times


def _our_rows(notes: Notes, ceilings: Ceilings, shape: LayerShape, tokens: int, times: Times) -> dict[str, float]:
    """Notes all stages; returns what the targets ask of the last number of tokens."""
    flops, moved = expert_flops(shape, tokens), _moved_bytes(shape, tokens)
    median = {key: statistics.median(values) for key, values in times.items()}
    for stage in STAGES:
        spreads = {phase: Spread.of(times[stage, phase]) for phase in ("forward", "backward")}
        _row(notes, ceilings, shape, tokens, OURS, stage, spreads["forward"], spreads["backward"])
    both = median["experts", "forward"] + median["experts", "backward"]
    around = median["gate", "forward"] + median["encode", "forward"]
    return {
        "experts: share of the dense peak": ceilings.flops_share(3 * flops, both),
        "encode: share of the copy bandwidth": ceilings.bytes_share(moved["encode"], median["encode", "forward"]),
        "gate and encode over the experts": around / median["experts", "forward"],
    }


def _moved_bytes(shape: LayerShape, tokens: int) -> dict[str, int]:
    """What a stage has to read and write at the least, top-1: the gate reads the tokens, the others also write rows."""
    rows = tokens * shape.hidden_size * 2  # bf16
    return {"gate": rows, "encode": 2 * rows, "decode": 2 * rows}


def _row(
    notes: Notes,
    ceilings: Ceilings,
    shape: LayerShape,
    tokens: int,
    who: str,
    stage: str,
    forward: Spread,
    backward: Spread | None = None,
    compared: bool = True,
) -> None:
    if stage == "experts":
        share = f"{ceilings.flops_share(expert_flops(shape, tokens), forward.median):.0%} of dense peak"
    else:
        share = f"{ceilings.bytes_share(_moved_bytes(shape, tokens).get(stage, 0), forward.median):.0%} of copies"
    notes.row(
        "Stages of one MoE layer, top-1",
        **{
            "shape": shape.name,
            "tokens": tokens,
            "layer": who,
            "stage": stage,
            "forward ms": text(forward),
            "backward ms": text(backward) if backward else "–",
            "forward's share": share if compared else "–",
        },
    )


def _their_rows(
    notes: Notes,
    ceilings: Ceilings,
    shape: LayerShape,
    tokens: int,
    layers: dict[str, nn.Module],
    inputs: Sequence[Tensor],
    clock: ColdClock,
    repeats: int,
) -> None:
    for stage, spread in deepspeeds_times(layers[DEEPSPEED], inputs, clock, repeats).items():
        compared = stage in ("gate", "experts")
        _row(notes, ceilings, shape, tokens, DEEPSPEED, stage, spread, None, compared)
    if AUTOEP in layers:
        with torch.no_grad():
            stages = [layers[AUTOEP].stages(hidden)[1] for hidden in inputs]
            for stage in STAGES:
                spread = clock.spread([each[stage] for each in stages], repeats)
                _row(notes, ceilings, shape, tokens, AUTOEP, stage, spread)


def deepspeeds_times(layer: MoE, inputs: Sequence[Tensor], clock: ColdClock, repeats: int) -> dict[str, Spread]:
    """Forward milliseconds of DeepSpeed's gate, of its experts and of the rest, which is encode and decode."""
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(-2, repeats):
        recorder = Recorder(clock.device)
        with _marked(layer, recorder), torch.no_grad():
            clock.get_cold()
            layer(inputs[number % len(inputs)])
        spans = {span.name: span.duration_ms for span in recorder.spans()}
        if number >= 0:
            found["gate"].append(spans["gate"])
            found["experts"].append(spans["experts"])
            found["encode and decode"].append(spans["layer"] - spans["gate"] - spans["experts"])
    return {name: Spread.of(values) for name, values in found.items()}


@contextmanager
def _marked(layer: MoE, recorder: Recorder) -> Iterator[None]:
    """Marks around the layer, its gate and its experts; nothing of them is changed."""
    pair, moe = recorder.pair(0), layer.deepspeed_moe
    hooks: list[Any] = []
    for name, module in {"layer": layer, "gate": moe.gate, "experts": moe.experts}.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: _mark(pair.open, name)))
        hooks.append(module.register_forward_hook(lambda *_, name=name: _mark(pair.close, name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mark(mark: Callable[..., object], name: str) -> None:
    mark(name)


def _whole_layers(
    notes: Notes, shape: LayerShape, tokens: int, layers: dict[str, nn.Module], inputs: Sequence[Tensor], rounds: int
) -> float:
    """Training steps of whole layers, several without a pause, interleaved; DeepSpeed's time over ours."""

    gradient = torch.randn_like(inputs[0])

    def steps(layer: nn.Module) -> Callable[[], None]:
        def unit() -> None:
            for number in range(STEPS_PER_ROUND):
                hidden = inputs[number % len(inputs)]
                output, l_aux, *_ = layer(hidden)
                results = [(output, gradient), (l_aux, torch.ones_like(l_aux))]
                torch.autograd.backward(*zip(*(pair for pair in results if pair[0].requires_grad), strict=True))
                layer.zero_grad(set_to_none=True)
                hidden.grad = None

        return unit

    times = interleave({name: steps(layer) for name, layer in layers.items()}, rounds)
    for name in layers:
        spread = Spread.of([1e3 * seconds / STEPS_PER_ROUND for seconds in times[name]])
        over = Spread.of_ratios(times[name], times[OURS])
        cells = {"shape": shape.name, "tokens": tokens, "layer": name, "step ms": text(spread)}
        notes.row("One MoE layer, forward and backward, EP 1", **cells, **{"time over ours": str(over)})
    return Spread.of_ratios(times[DEEPSPEED], times[OURS]).median
