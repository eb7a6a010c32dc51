"""Where the routed output of a hooked pair joins late: the next block's attention, or the end of the last block.

    the MoE layer's own forward      returns what is known without the routed experts
    hook behind the next attention   waits for the combine, and adds the routed output to what the attention returns

The block adds both to its residual stream, which the first pass checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.planner.times import LateWindow
from scmoe_ds.replace.calls import first_hidden, operators_in
from scmoe_ds.replace.recomputation import checkpoint_region
from scmoe_ds.replace.taps import POST_ATTENTION_NORMS, blocks_around, reads_raw_stream

_END = 'set scmoe.join to "end"'
_ROUNDINGS = 8
"""How many units in the last place a sum may differ."""


class LateJoin:
    """The place at which one layer's routed output joins, and the output on its way there.

    Args:
        name: the layer's path, for errors.
        place, module: whose output it is added to.
        block: around the module; None: the module is the last block itself.
        layer: says by `runs_converted` whether a pass of it joins late.

    Raises:
        ScMoEConfigError: a block without a norm that would show whether it adds the attention's output as it is.
    """

    def __init__(self, name: str, place: str, module: nn.Module, block: nn.Module | None, layer: Any) -> None:
        self.name, self.place, self.layer = name, place, layer
        self._late: Callable[[], Tensor] | None = None
        self._region: object = None  # the activation checkpoint around the layer
        self._entered: Tensor | None = None  # of the first pass, until it is checked
        self._joined: Tensor | None = None
        self._handles = [module.register_forward_hook(self._join)]
        self._checks: list[Any] = []
        if block is None:
            return
        norm = next((getattr(block, each) for each in POST_ATTENTION_NORMS if hasattr(block, each)), None)
        if norm is None or reads_raw_stream(block) is not None:
            raise self._refusal()
        self._checks = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            norm.register_forward_pre_hook(self._check, with_kwargs=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_late": None,
            "_entered": None,
            "_joined": None,
        }  # of a pass, which a copy has not had

    def leave(self, late: Callable[[], Tensor]) -> None:
        """The layer is over; `late` waits for the combine, and returns [..., D]."""
        self._late, self._region = late, checkpoint_region()

    def detach(self) -> None:
        """Removes all hooks."""
        for handle in (*self._handles, *self._checks):
            handle.remove()
        self._late = self._entered = self._joined = None

    def _join(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        late, self._late = self._late, None
        if not self.layer.runs_converted:  # what is on its way then is of a pass that has failed
            return output
        if late is None:
            raise RuntimeError(
                f"{self.place} ran, but not {self.name} before it, whose routed output joins there: activation "
                f"checkpointing repeats a part of the model. Turn it off, or {_END}"
            )
        if self._region is not checkpoint_region():
            raise ScMoEConfigError(
                f'scmoe.join = "late": an activation checkpoint around {self.name} ends before its combine, which is '
                f"waited for in {self.place}; turn activation checkpointing off, or {_END}"
            )
        value = first_hidden((output,), {})
        assert value is not None
        joined = value + late().view_as(value)
        if self._checks:
            self._joined = joined.detach()
        return (joined, *output[1:]) if isinstance(output, tuple) else joined

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = first_hidden(args, kwargs)
        self._entered = None if found is None else found.detach()

    def _check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In the first pass: whether the norm behind the attention reads the block's input plus what was joined."""
        found, entered, joined = first_hidden(args, kwargs), self._entered, self._joined
        if joined is None:  # the same norm, called for a shortcut
            return
        for handle in self._checks:
            handle.remove()
        self._checks, self._entered, self._joined = [], None, None
        if found is None or entered is None or found.shape != joined.shape:
            raise self._refusal()
        allowed = _ROUNDINGS * torch.finfo(found.dtype).eps * (entered.abs() + joined.abs() + found.abs())
        if not bool(((found - entered - joined).abs() <= allowed).all()):
            raise self._refusal()

    def _refusal(self) -> ScMoEConfigError:
        return ScMoEConfigError(
            f'scmoe.join = "late": the block around {self.place} does not add its attention\'s output as it is (a norm '
            f"or a scale comes first), so that {self.name} cannot join there; {_END}"
        )


def join_late(model: nn.Module, pairs: Sequence[Any]) -> None:
    """Has every `HookedPair` of a model join late. Called once all pairs have their hooks, which run before these.

    Raises:
        ScMoEConfigError: a block without an attention, or that is none of several.
    """
    for number, pair in enumerate(pairs):
        blocks = blocks_around(model, pair.name)
        place = next((each for each, name in enumerate(blocks) if f"{pair.name}.".startswith(f"{name}.")), None)
        if place is None:
            raise ScMoEConfigError(f'scmoe.join = "late": {pair.name} is among no blocks; {_END}')
        if place + 1 == len(blocks):
            pair.late = LateJoin(pair.name, blocks[-1], model.get_submodule(blocks[-1]), None, pair.layer)
        else:
            name, block = blocks[place + 1], model.get_submodule(blocks[place + 1])
            child, attention = _attention(name, block)
            pair.late = LateJoin(pair.name, f"{name}.{child}", attention, block, pair.layer)
            own, _ = _attention(blocks[place], model.get_submodule(blocks[place]))
            following = pairs[number + 1].tap if number + 1 < len(pairs) else None
            at_entrance = following is not None and following.module is block and following.side == "input"
            pair.late_window = LateWindow((own,), at_entrance)
        pair.check_anew()


def _attention(name: str, block: nn.Module) -> tuple[str, nn.Module]:
    for child, module in operators_in(block):  # no norm, and not the dropout behind it
        if "attn" in child or "attention" in child:
            return child, module
    raise ScMoEConfigError(f'scmoe.join = "late": {name} ({type(block).__name__}) has no attention; {_END}')
