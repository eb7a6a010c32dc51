"""A pair in a model whose forward pass is somebody else's: hooks make the calls that the executor's loop makes.

    hook at the tap                  begin: gate, encode, dispatch in flight
    hook before every operator       Interleaving.before: the chunks of the experts whose slot it is
    hook after every operator        Interleaving.after: the first one sends the tokens
    the MoE layer's own forward      the shared expert, Interleaving.rest, finish

In a pass that the layer runs as its source has it, the hooks do nothing.

Operators are the children of the blocks between tap and layer that have parameters and are no norms. Which of them run,
and in which order, shows in the first forward pass. That pass runs in one piece: everything is done in the layer,
without overlap.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.config.messages import counted
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.overlap.executor import Operator
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.auto import first_schedule
from scmoe_ds.planner.plan import slot_that_halves
from scmoe_ds.planner.times import LateWindow
from scmoe_ds.replace.calls import Call, first_hidden, operators_in
from scmoe_ds.replace.converted import ConvertedLayer
from scmoe_ds.replace.first_pass import FirstPass
from scmoe_ds.replace.hooked_pass import HookedPass, hooked_operators
from scmoe_ds.replace.late_join import LateJoin
from scmoe_ds.replace.recomputation import Recomputation, checkpoint_region, is_repeated
from scmoe_ds.replace.tap_check import TapCheck
from scmoe_ds.replace.taps import Tap
from scmoe_ds.replace.token_mask import TokenMask
from scmoe_ds.trace.recorder import SILENT, PairRecorder

logger = logging.getLogger("scmoe_ds")


@dataclass(frozen=True)
class _Seen:
    """What the first pass with gradients, or without, has shown.

    Attributes:
        kinds: of the operators between tap and layer, in order.
        in_pieces: whether later passes can run in pieces. They cannot if an activation checkpoint begins between tap
            and layer, or if the layer itself is told which tokens are padding.
    """

    kinds: tuple[str, ...]
    in_pieces: bool


class HookedPair:
    """Feeds one MoE layer from its tap; a pair for planner, calibration and trace like those of models/pairs.py.

    Args:
        name: the layer's path.
        layer: calls `join`, or has `arrive` called; a HookedScMoE or a `replace.converted.ConvertedLayer`.
        tap: where its shortcut comes from.
        norm: what the tapped value goes through; None: nothing.
        overlap: the section's "overlap".

    Attributes:
        schedule, forward_schedule, recorder: as those of models.pairs.StagedPair.
        late, late_window: where the routed output joins late, and beside what its combine goes on; None: at the end.
        token_mask: knows which tokens are padding; None: there is no padding.
        first_pass: says what the first pass has shown; None: nobody does.
    """

    late: LateJoin | None = None
    late_window: LateWindow | None = None
    token_mask: TokenMask | None = None
    first_pass: FirstPass | None = None

    def __init__(self, name: str, layer: Any, tap: Tap, norm: nn.Module | None, overlap: OverlapConfig) -> None:
        self.name, self.layer, self.tap, self.norm, self.overlap = name, layer, tap, norm, overlap
        self.schedule = first_schedule(overlap, [])
        self.forward_schedule: Schedule | None = None
        self.recorder: PairRecorder = SILENT
        self._pass: HookedPass | None = None
        self._begins = False
        self._seen: dict[bool, _Seen] = {}  # by whether there are gradients
        self._recomputation = Recomputation(name, tap)
        self._check = None if tap.is_users else self._new_check()  # until the first pass is over
        self._sizes = {kind: _size(module) for kind, module in self._modules()}
        self._handles = self._attach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pass": None}  # which a copy has not had

    def operators(self) -> list[Operator]:
        """The backbone's operators, once a forward pass has shown them; for reading, not to be run."""
        seen = self._seen.get(True) or self._seen.get(False)
        return hooked_operators([*(seen.kinds if seen else ()), *self._last])

    @property
    def _last(self) -> list[str]:
        """The operator that the layer itself runs."""
        return [] if self.layer.shared_module is None else ["shared"]

    def facts(self) -> dict[str, Any]:
        """What this pair's times depend on, beside its layer; JSON values."""
        blocks = [type(block).__name__ for _, block in self.tap.blocks]
        origin = f"from the {self.tap.side} of {type(self.tap.module).__name__}"
        facts = {"operators": [*blocks, origin], "parameters": sum(self._sizes.values()) + _size(self.layer)}
        return facts if self.late_window is None else {**facts, "late_join": self.late_window.facts()}

    def detach(self) -> None:
        """Removes all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._check is not None:
            self._check.remove()
        if self.late is not None:
            self.late.detach()
        self._pass = None
        self._recomputation.forget()

    def check_anew(self) -> None:
        """Puts the check of the tap behind hooks that were registered since."""
        if self._check is not None:
            self._check.remove()
            self._check = self._new_check()

    def _new_check(self) -> TapCheck:
        return TapCheck(self.name, self.tap, self.layer)

    def _modules(self) -> list[tuple[str, nn.Module]]:
        module = self.layer.layer if isinstance(self.layer, ConvertedLayer) else self.layer
        return [each for _, block in self.tap.blocks for each in operators_in(block, module)]

    def _attach(self) -> list[Any]:
        module = self.tap.module
        if self.tap.side == "input":
            handles = [module.register_forward_pre_hook(self._before_tap, with_kwargs=True)]
        else:
            handles = [module.register_forward_hook(self._after_tap)]
        for kind, module in self._modules():
            # No closure, which would lead a copy of the model back to this pair.
            handles.append(module.register_forward_pre_hook(partial(self._before, kind), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after))
        return handles

    def _before_tap(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._take(first_hidden(args, kwargs))

    def _after_tap(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._take(first_hidden((output,), {}))

    def _take(self, value: Tensor | None) -> None:
        if self._begins:  # the tapped norm is called for the shortcut
            return
        if not self.layer.runs_converted:
            self._pass = None  # of a pass that has failed
            return
        if value is None:
            raise RuntimeError(
                f"{self.tap.module_name}: no floating-point tensor to tap for {self.name}; set scmoe.tap"
            )
        recomputation, training, repeats = self._recomputation, torch.is_grad_enabled(), is_repeated()
        if recomputation.is_of_the_tap_alone():
            return
        schedule = self.schedule if training or self.forward_schedule is None else self.forward_schedule
        self._pass = HookedPass(value, schedule, self.recorder, checkpoint_region(), repeats)
        if not repeats:  # otherwise it does what the first pass did
            seen = self._seen.get(training)
            recomputation.in_pieces = seen is not None and seen.in_pieces
        if self._check is not None:
            self._check.tapped()
        if recomputation.in_pieces:
            self._begin(self._pass, self._used_token(value))

    def _begin(self, current: HookedPass, used_token: Tensor | None) -> None:
        self._begins = True
        try:
            current.begin(self.layer, self.norm, used_token)
        finally:
            self._begins = False

    def _used_token(self, value: Tensor) -> Tensor | None:
        return None if self.token_mask is None else self.token_mask.of(value)

    def _before(self, kind: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        return None if self._pass is None else self._pass.enter(kind, module, args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return None if self._pass is None else self._pass.leave(module, output)

    def join(self, hidden_states: Tensor, used_token: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's forward: what has not run yet, shared expert, finish. Raises as `arrive`."""
        return self.arrive(hidden_states, used_token).join(self.layer, hidden_states, self.late)

    def arrive(self, hidden_states: Tensor, used_token: Tensor | None = None) -> HookedPass:
        """The pass that reaches the layer now, begun at the latest here.

        Raises:
            RuntimeError: the tap has not run, or taps something of another shape.
        """
        current, self._pass = self._pass, None
        if current is None:
            value = self._recomputation.tapped(hidden_states, self._seen.keys() == {False})
            current = HookedPass(value, self.schedule, SILENT, repeats=True)
        if current.value.shape != hidden_states.shape:
            raise RuntimeError(
                f"{self.name} reads {tuple(hidden_states.shape)}, but its tap {self.tap.module_name} "
                f"{tuple(current.value.shape)}: a stage boundary lies between them. Choose another position for this "
                "layer (scmoe.first_layer_position for the first one), or set scmoe.tap"
            )
        if current.routed is not None and used_token is not None:
            self._take_back(current)
        if current.routed is None:
            if not current.repeats:
                self._look_back(current, hidden_states, used_token is not None)
            current.schedule = replace(current.schedule, expert_slot=1, num_chunks=1)
            used_token = self._used_token(current.value) if used_token is None else used_token
            self._begin(current, used_token)
        return current

    def _take_back(self, current: HookedPass) -> None:
        """The layer is told of padding when its tokens have left the tap: drops their results, and begins anew.

        Raises:
            RuntimeError: other ranks, which may have been told nothing, would have to do the same.
        """
        where = f"{self.name}: used_token is not known at the tap {self.tap.module_name}"
        if self.layer.transport.size > 1:
            raise RuntimeError(
                f"{where}. Hand the mask to the model as attention_mask [batch, sequence], or give "
                "used_token in every forward pass from the first one on, with ones where there is no "
                "padding"
            )
        current.throw_away()
        self._seen = {mode: replace(seen, in_pieces=False) for mode, seen in self._seen.items()}
        logger.warning(
            "%s: the layer runs without overlap from now on. Hand the mask to the model as attention_mask "
            "[batch, sequence]",
            where,
        )

    def _look_back(self, current: HookedPass, hidden_states: Tensor, is_masked: bool) -> None:
        """Notes what the first pass of this mode has shown; with a mask, the layer goes on to wait for it."""
        if self._check is not None:
            self._check.finish(current.value)
            self._check = None
        is_cut = current.region is not checkpoint_region()
        if is_cut:
            self._recomputation.keep(current.value, hidden_states)
        else:
            self._recomputation.forget()
        training = torch.is_grad_enabled()
        if training in self._seen:
            return
        self._seen[training] = _Seen(tuple(current.kinds), not is_cut and not is_masked)
        sizes = [self._sizes[kind] for kind in current.kinds]
        sizes += [] if self.layer.shared_module is None else [_size(self.layer.shared_module)]
        if isinstance(self.overlap.expert_slot, str):
            late = () if self.late_window is None else self.late_window.operators
            beside = sum(self._sizes.get(kind, 0) for kind in late)
            self.schedule = replace(self.schedule, expert_slot=slot_that_halves(sizes, beside))
        elif self.schedule.slots[-1] > len(sizes) + 1:
            names = ", ".join([*current.kinds, *self._last])
            raise ScMoEConfigError(
                f"scmoe.overlap.expert_slot = {self.overlap.expert_slot}: the backbone of {self.name} has "
                f"{counted(len(sizes), 'operator')} ({names}); use 1 … {len(sizes) + 1}"
            )
        if self.first_pass is not None:
            self.first_pass.of(self, training, is_cut)


def _size(module: nn.Module) -> int:
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())
