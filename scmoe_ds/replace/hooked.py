"""The executor's loop taken apart into hooks, for models whose forward pass is somebody else's.

    hook at the tap                  begin: gate, encode, dispatch in flight
    hook before every operator       the experts' chunks whose slot it is
    the MoE layer's own forward      what is left of the chunks, shared expert, finish

Which operators run between tap and layer is seen in the first forward pass, which does everything in the layer, without
overlap. Operators are the children of the blocks between the two that have parameters and are no norms.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scmoe_ds.config.section import OverlapConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.routed import RoutedTokens
from scmoe_ds.overlap.executor import Activations, Operator, numbered
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.plan import slot_that_halves
from scmoe_ds.replace.calls import checkpoint_region, first_hidden, marked_inputs, parts, recomputes
from scmoe_ds.replace.tap_check import TapCheck
from scmoe_ds.trace.recorder import SILENT, PairRecorder

if TYPE_CHECKING:
    from scmoe_ds.replace.convert import HookedScMoE
    from scmoe_ds.replace.taps import Tap
    from scmoe_ds.replace.token_mask import TokenMask

logger = logging.getLogger("scmoe_ds")


@dataclass
class _Flight:
    """One forward pass between tap and layer."""

    value: Tensor
    boundary: object
    schedule: Schedule
    recorder: PairRecorder
    routed: RoutedTokens | None = None
    chunks_run: int = 0
    operators: list[str] = field(default_factory=list)
    entered: nn.Module | None = None

    def run_experts(self, chunks: int) -> None:
        if self.routed is not None:
            for _ in range(chunks):
                self.routed.run_experts()
            self.chunks_run += chunks


@dataclass(frozen=True)
class _Seen:
    """What the first forward pass of a mode (with or without gradients) has shown.

    Attributes:
        operators: names of those between tap and layer, in order.
        is_cut: an activation checkpoint begins between the two, or the layer itself is told which tokens are padding:
            everything is done in the layer.
    """

    operators: tuple[str, ...]
    is_cut: bool


class HookedPair:
    """Feeds one MoE layer from its tap; a pair for planner, calibration and trace like the executor's.

    Args:
        name: the layer's path.
        layer: the layer, which calls `join`.
        tap: where its shortcut comes from.
        norm: what the tapped value goes through; None: nothing.
        overlap: the section's "overlap".

    Attributes:
        schedule, forward_schedule, recorder: as those of models.blocks.ScheduledRun.
        token_mask: knows which tokens are padding; None: there is no padding.
    """

    tap = 0  # all of `operators` is backbone
    token_mask: TokenMask | None = None

    def __init__(self, name: str, layer: HookedScMoE, tap: Tap, norm: nn.Module | None, overlap: OverlapConfig) -> None:
        self.name, self.layer, self.place, self.norm, self.overlap = name, layer, tap, norm, overlap
        slot, chunks = overlap.expert_slot, overlap.num_chunks
        slots = tuple(slot) if isinstance(slot, list) else 1 if isinstance(slot, str) else slot
        if isinstance(chunks, str):
            chunks = len(slots) if isinstance(slots, tuple) else 1
        self.schedule = Schedule(slots, chunks, overlap.enabled)
        self.forward_schedule: Schedule | None = None
        self.recorder: PairRecorder = SILENT
        self._seen: dict[bool, _Seen] = {}  # by whether gradients are wanted
        self._flight: _Flight | None = None
        # For recomputation when a checkpoint boundary cuts the pair: the tapped value, and part of the layer's input.
        self._kept: tuple[Tensor, Tensor] | None = None
        self._apart = False  # whether the last forward pass ran in pieces, not all of it in the layer
        self._sizes: dict[str, int] = {}
        self._handles: list[Any] = []
        self._check = None if tap.is_users else TapCheck(name, tap)  # until the first pass is over
        self._attach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_flight": None, "_kept": None}  # of a pass, which a copy has not had

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks between which rows travel."""
        return self.layer.transport.group

    def operators(self) -> list[Operator]:
        """The backbone's operators, once a forward pass has shown them; for reading, not to be run."""
        seen = self._seen.get(True) or self._seen.get(False)
        kinds = [*(seen.operators if seen else ()), "shared"]
        return numbered([(kind, _not_to_be_run) for kind in kinds], self.tap)

    def facts(self) -> dict[str, Any]:
        """What this pair's times depend on, beside its layer; JSON values."""
        blocks = [type(block).__name__ for _, block in self.place.blocks]
        parameters = sum(self._sizes.values()) + sum(each.numel() for each in self.layer.parameters())
        origin = f"from the {self.place.side} of {type(self.place.module).__name__}"
        return {"operators": [*blocks, origin], "parameters": parameters}

    def detach(self) -> None:
        """Removes all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._check is not None:
            self._check.remove()
        self._flight = self._kept = None

    def _attach(self) -> None:
        if self.place.side == "input":
            handle = self.place.module.register_forward_pre_hook(self._before_tap, with_kwargs=True)
        else:
            handle = self.place.module.register_forward_hook(self._after_tap)
        self._handles.append(handle)
        for name, module in self._candidates():
            self._sizes[name] = sum(parameter.numel() for parameter in module.parameters())
            # No closure, which would lead a copy of the model back to this pair.
            self._handles.append(module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after))

    def _candidates(self) -> list[tuple[str, nn.Module]]:
        found = []
        for _, block in self.place.blocks:
            for name, child in parts(block):
                is_norm = "norm" in type(child).__name__.lower()
                holds_layer = any(module is self.layer for module in child.modules())
                if not is_norm and not holds_layer and any(True for _ in child.parameters()):
                    found.append((name, child))
        return found

    def _before_tap(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._take(first_hidden(args, kwargs))

    def _after_tap(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._take(first_hidden((output,), {}))

    def _take(self, value: Tensor | None) -> None:
        if value is None:
            raise RuntimeError(
                f"{self.place.module_name}: no floating-point tensor to tap for {self.name}; set scmoe.tap"
            )
        training = torch.is_grad_enabled()
        schedule = self.schedule if training or self.forward_schedule is None else self.forward_schedule
        region = checkpoint_region()
        if recomputes(region) and not self._apart and self._kept is not None:
            return  # the tap's own block is repeated; the layer's was before, with the value that is kept
        self._flight = _Flight(value, _RECOMPUTED if recomputes(region) else region, schedule, self.recorder)
        if not recomputes(region):  # which has to do what the first pass did
            seen = self._seen.get(training)
            self._apart = seen is not None and not seen.is_cut
        if self._check is not None:
            self._check.tapped()
        if self._apart:
            self._flight.routed = self._begin(self._flight)

    def _begin(self, flight: _Flight, used_token: Tensor | None = None) -> RoutedTokens:
        if used_token is None and self.token_mask is not None:
            used_token = self.token_mask.of(flight.value)
        (value,) = flight.recorder.open("shortcut norm", flight.value)
        # Past the module's hooks: the backbone calls it as well, and may not be seen to do so twice.
        shortcut = value if self.norm is None else self.norm.forward(value)
        (shortcut,) = flight.recorder.close("shortcut norm", shortcut)
        return self.layer.begin(
            shortcut,
            used_token,
            blocking=not flight.schedule.overlap,
            num_chunks=flight.schedule.num_chunks,
            recorder=flight.recorder,
        )

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flight = self._flight
        if flight is None:
            return None
        # An operator that has not come back is tried once more: Megatron-DeepSpeed calls its attention with a
        # keyword first, and without it after a TypeError.
        if flight.entered is not module:
            flight.operators.append(name)
            flight.run_experts(flight.schedule.chunks_at(len(flight.operators)))
        flight.entered = module
        if flight.routed is None or flight.recorder is SILENT:
            return None
        return marked_inputs(flight.recorder, self._distinct(flight), args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        flight = self._flight
        if flight is None or flight.entered is not module:  # the tap lies in the operator itself
            return None
        flight.entered = None
        if flight.routed is None:
            return None
        marked = None
        if flight.recorder is not SILENT:
            first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            (first,) = flight.recorder.close(self._distinct(flight), first)
            marked = first if rest is None else (first, *rest)
        flight.routed.send()
        return marked

    @staticmethod
    def _distinct(flight: _Flight) -> str:
        name = flight.operators[-1]
        number = flight.operators.count(name)
        return name if number == 1 else f"{name} {number}"

    def join(self, hidden_states: Tensor, used_token: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's forward: what has not run yet, shared expert, finish.

        Raises:
            RuntimeError: the tap has not run, or taps something of another shape.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            flight = self._recomputed(hidden_states)
        if flight.value.shape != hidden_states.shape:
            raise RuntimeError(
                f"{self.name} reads {tuple(hidden_states.shape)}, but its tap {self.place.module_name} "
                f"{tuple(flight.value.shape)}: a stage boundary lies between them. Choose another position for this "
                "layer (scmoe.first_layer_position for the first one), or set scmoe.tap"
            )
        if flight.routed is not None and used_token is not None:
            self._take_back(flight)
        if flight.routed is None:
            self._look_back(flight, hidden_states, used_token is not None)
            flight.schedule = replace(flight.schedule, expert_slot=1, num_chunks=1)
            flight.routed = self._begin(flight, used_token)
        shared_slot = len(flight.operators) + 1
        flight.run_experts(self._due(flight, shared_slot))
        (entering,) = flight.recorder.open("shared", hidden_states)
        (shared,) = flight.recorder.close("shared", self.layer.shared(entering))
        flight.run_experts(flight.schedule.num_chunks - flight.chunks_run)
        return self.layer.finish(flight.routed, entering, shared)

    def _take_back(self, flight: _Flight) -> None:
        """The layer is told of padding when its tokens have left the tap: their results are thrown away.

        Raises:
            RuntimeError: other ranks, which may have been told nothing, would have to do the same.
        """
        assert flight.routed is not None
        where = f"{self.name}: used_token is not known at the tap {self.place.module_name}"
        if self.layer.transport.size > 1:
            raise RuntimeError(
                f"{where}. Hand the mask to the model as attention_mask [batch, sequence], or give "
                "used_token in every forward pass from the first one on, with ones where there is no "
                "padding"
            )
        flight.run_experts(flight.schedule.num_chunks - flight.chunks_run)
        flight.routed.collect()
        flight.routed, flight.chunks_run = None, 0
        self._seen = {mode: replace(seen, is_cut=True) for mode, seen in self._seen.items()}
        logger.warning(
            "%s: the layer runs without overlap from now on. Hand the mask to the model as attention_mask "
            "[batch, sequence]",
            where,
        )

    @staticmethod
    def _due(flight: _Flight, slot: int) -> int:
        """Chunks up to a slot that have not run: more than that slot's own where operators were left out."""
        return sum(flight.schedule.chunks_at(each) for each in range(1, slot + 1)) - flight.chunks_run

    def _recomputed(self, hidden_states: Tensor) -> _Flight:
        """A block is computed again in the backward pass, and its tap, in another block, is not."""
        if self._kept is not None:
            tapped, read = self._kept
            if not torch.equal(read, _sample(hidden_states)):
                raise RuntimeError(
                    f"{self.name}: several forward passes before a backward pass, while an activation checkpoint cuts "
                    f"it from its tap {self.place.module_name}, which is known of the last pass alone. Run each "
                    "backward pass after its forward pass, or checkpoint runs of blocks that hold both"
                )
            value = tapped.detach().requires_grad_(tapped.requires_grad)
            return _Flight(value, _RECOMPUTED, self.schedule, SILENT)
        if torch.is_grad_enabled() and self._seen.keys() == {False}:
            raise RuntimeError(
                f"{self.name} is computed again, but not its tap {self.place.module_name}: reentrant activation "
                "checkpointing (DeepSpeed's, or torch's with use_reentrant=True) cuts them apart. Let one checkpoint "
                "hold both blocks (Megatron-DeepSpeed: --checkpoint-num-layers 2), or set scmoe.tap to a module inside "
                'the layer\'s own block, e.g. "{block}.input_layernorm:input", which is Pos-1'
            )
        raise RuntimeError(
            f"{self.name} ran, but not its tap {self.place.module_name} before it; set scmoe.tap to a module that "
            "does. Blocks that share one MoE cannot be replaced: give each its own"
        )

    def _look_back(self, flight: _Flight, hidden_states: Tensor, is_masked: bool) -> None:
        """Notes what the first forward pass of this mode has shown; with a mask, the layer goes on to wait for it."""
        training = torch.is_grad_enabled()
        if flight.boundary is _RECOMPUTED:
            return
        if self._check is not None:
            self._check.finish(flight.value)
            self._check = None
        is_cut = flight.boundary is not checkpoint_region()
        self._kept = (flight.value, _sample(hidden_states)) if is_cut else None
        if training in self._seen:
            return
        self._seen[training] = _Seen(tuple(flight.operators), is_cut or is_masked)
        if is_cut:
            logger.warning(
                "%s: an activation checkpoint begins between it and its tap %s; it runs without overlap. "
                "Checkpoint runs of blocks that hold both",
                self.name,
                self.place.module_name,
            )
        sizes = [self._sizes[name] for name in flight.operators]
        sizes.append(sum(parameter.numel() for parameter in self.layer.mlp.parameters()))
        if isinstance(self.overlap.expert_slot, str):
            self.schedule = replace(self.schedule, expert_slot=slot_that_halves(sizes))
        elif self.schedule.slots[-1] > len(sizes) + 1:
            names = ", ".join([*flight.operators, "shared"])
            raise ScMoEConfigError(
                f"scmoe.overlap.expert_slot = {self.overlap.expert_slot}: the backbone of {self.name} has {len(sizes)} "
                f"operators ({names}); use 1 … {len(sizes) + 1}"
            )


_RECOMPUTED = object()


def _sample(hidden_states: Tensor) -> Tensor:
    """Enough of a value to tell it from that of another forward pass."""
    return hidden_states.detach().flatten()[:256].clone()


def _not_to_be_run(activations: Activations) -> Activations:
    raise RuntimeError("the operators of a replaced layer are the model's own modules")
