"""`executor.run` taken apart: the same calls, in the same order, made one by one by the hooks of a `HookedPair`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from scmoe_ds.moe.routed import RoutedTokens
from scmoe_ds.overlap.executor import Activations, Interleaving, Operator, numbered
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.replace.calls import Call, marked_inputs, marked_output
from scmoe_ds.replace.late_join import LateJoin
from scmoe_ds.trace.recorder import SILENT, PairRecorder


class HookedPass:
    """A forward pass on its way from the tap to the layer.

    Args:
        value: what was tapped.
        region: the activation checkpoint around the tap.
        repeats: whether activation checkpointing repeats an earlier pass.

    Attributes:
        kinds: of the operators that have begun.
        routed: the tokens in flight; None: everything is left to the layer.
        shortcut: what the routed experts read, once `routed` is there.
    """

    shortcut: Tensor

    def __init__(
        self, value: Tensor, schedule: Schedule, recorder: PairRecorder, region: object = None, repeats: bool = False
    ) -> None:
        self.value, self.schedule, self.recorder = value, schedule, recorder
        self.region, self.repeats = region, repeats
        self.kinds: list[str] = []
        self.routed: RoutedTokens | None = None
        self._experts: Interleaving | None = None
        self._inside: nn.Module | None = None  # the operator that has begun and not ended

    def begin(self, layer: Any, norm: nn.Module | None, used_token: Tensor | None) -> None:
        """At the tap, or else in the layer: norm, gate, encode, dispatch in flight."""
        (value,) = self.recorder.open("shortcut norm", self.value)
        (shortcut,) = self.recorder.close("shortcut norm", value if norm is None else _normalised(norm, value))
        schedule, self.shortcut = self.schedule, shortcut
        self.routed = layer.begin(
            shortcut,
            used_token,
            blocking=not schedule.overlap,
            num_chunks=schedule.num_chunks,
            recorder=self.recorder,
        )
        self._experts = Interleaving(self.routed, schedule)

    def enter(self, kind: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Before an operator; returns its arguments as a recorder has marked them, None as they are."""
        # An operator that has not come back is tried once more: Megatron-DeepSpeed calls its attention with a
        # keyword first, and without it after a TypeError.
        if self._inside is not module:
            self._inside = module
            self.kinds.append(kind)
            if self._experts is not None:
                self._experts.before(len(self.kinds))
        if self._experts is None or self.recorder is SILENT:
            return None
        return marked_inputs(self.recorder, hooked_operators(self.kinds)[-1], args, kwargs)

    def leave(self, module: nn.Module, output: Any) -> Any:
        """After an operator; returns its output as a recorder has marked it, None as it is."""
        if self._inside is not module:  # the tap lies in the operator itself
            return None
        self._inside = None
        if self._experts is None:
            return None
        operator = hooked_operators(self.kinds)[-1]
        marked = None if self.recorder is SILENT else marked_output(self.recorder, operator, output)
        self._experts.after()
        return marked

    def throw_away(self) -> None:
        """Ends what is in flight, and drops the results."""
        assert self._experts is not None and self.routed is not None
        self._experts.rest()
        self.routed.collect()
        self.routed = self._experts = None

    def join(self, layer: Any, hidden_states: Tensor, late: LateJoin | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """In the layer: the shared expert as the last operator, if there is one; what the layer's `finish` returns.

        Args:
            late: takes the routed output; then the layer returns what is known without it.
        """
        assert self._experts is not None and self.routed is not None
        shared = None
        if layer.shared_module is not None:
            self._experts.before(len(self.kinds) + 1)
            (hidden_states,) = self.recorder.open("shared", hidden_states)
            (shared,) = self.recorder.close("shared", layer.shared(hidden_states))
        self._experts.rest()
        if late is None:
            return layer.finish(self.routed, hidden_states, shared)
        parts = layer.finish_in_parts(self.routed, hidden_states, shared)
        late.leave(parts.late)
        return parts.known, parts.l_aux, parts.exp_counts


def _normalised(norm: nn.Module, value: Tensor) -> Tensor:
    """The tapped value behind a norm, past its hooks: the backbone calls it too, and may not be seen to do so twice.

    But DeepSpeed's hooks make whole parameters of ZeRO-3's parts.
    """
    if any(hasattr(parameter, "ds_id") for parameter in norm.parameters()):
        return norm(value)
    return norm.forward(value)


def hooked_operators(kinds: Sequence[str]) -> list[Operator]:
    """Operators for reading: the model's own modules are what runs."""
    return numbered([(kind, _not_to_be_run) for kind in kinds], tap=0)


def _not_to_be_run(activations: Activations) -> Activations:
    raise RuntimeError("the operators of a replaced layer are the model's own modules")
