"""Checks in the first forward pass whether a tap that was found by its name reads the value of its position.

Pos-2 is the residual stream between attention and MLP (paper section 3): the block's input plus a branch, which is the
output of one of the block's modules, scaled or thinned out by dropout. The norm in front of the routed experts is the
one through which the backbone reads that very value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.replace.calls import first_hidden
from scmoe_ds.replace.taps import Tap

_ROUNDINGS = 8
"""How many units in the last place a sum may differ: the block has rounded in between."""
_ELEMENTS = 1 << 16
"""How many elements of a value are compared."""


@dataclass(frozen=True)
class _Seen:
    """Some elements of a value, at places that depend on its size alone."""

    shape: torch.Size
    elements: Tensor
    unit: float

    @classmethod
    def of(cls, value: Tensor) -> _Seen:
        flat = value.detach().flatten()
        step = max(1, flat.numel() // _ELEMENTS)
        return cls(value.shape, flat[::step].double(), _ROUNDINGS * torch.finfo(value.dtype).eps)


class TapCheck:
    """Watches the tapped block until the layer has run once.

    Args:
        layer_name: the MoE layer's path, for errors.
        tap: found by name; one that the user names in scmoe.tap is the user's own choice.
        layer: says by `runs_converted` whether a pass is to be watched.
    """

    def __init__(self, layer_name: str, tap: Tap, layer: Any) -> None:
        self.layer_name, self.tap, self.layer = layer_name, tap, layer
        self._entered: _Seen | None = None
        self._branches: list[tuple[bool, _Seen]] = []  # is it a norm's output
        self._normed: list[_Seen] = []
        self._tapped = False
        block_name, block = tap.blocks[0]
        self._is_inside = tap.module_name != block_name  # Pos-2; otherwise the tap is the block's own input
        self._handles = []
        if self._is_inside:
            self._handles.append(block.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
            self._handles += [child.register_forward_hook(self._branch) for child in block.children()]
        elif tap.norm is not None:
            self._handles.append(tap.norm.register_forward_pre_hook(self._norm, with_kwargs=True, prepend=True))

    def tapped(self) -> None:
        """The tap has run: what other modules return from now on is no branch of it."""
        self._tapped = True

    def remove(self) -> None:
        """Takes the hooks away and drops what they saw."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._entered, self._branches, self._normed = None, [], []

    def finish(self, value: Tensor) -> None:
        """Compares a whole pass with what the tap gave.

        Raises:
            ScMoEConfigError: the value is no residual stream; names it and the remedy.
        """
        seen = _Seen.of(value)
        if self._is_inside:
            right = self._is_residual_stream(seen)
            what = "is not the block's input plus its branches"
        else:
            right = not self._normed or any(torch.equal(each.elements, seen.elements) for each in self._normed)
            what = f"is not what {self.tap.norm_name} reads in the model"
        self.remove()
        if not right:
            raise ScMoEConfigError(
                f"{self.layer_name}: its tap, the {self.tap.side} of {self.tap.module_name}, {what}, so that it is not "
                "the residual stream that the position asks for; name a module whose input or output is this stream in "
                'scmoe.tap, e.g. "{previous}.mlp:input"'
            )

    def _is_residual_stream(self, value: _Seen) -> bool:
        if self._entered is None or self._entered.shape != value.shape:
            return False
        entered = self._entered.elements
        rest = value.elements - entered
        allowed = value.unit * (value.elements.abs() + entered.abs())
        branches = [(norm, each.elements) for norm, each in self._branches if each.shape.numel() == value.shape.numel()]
        others = [each for norm, each in branches if not norm]
        return any(
            _is_combination(rest, allowed, each, value.unit) for each in ([], *([each] for _, each in branches), others)
        )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = first_hidden(args, kwargs) if self.layer.runs_converted else None
        self._entered, self._branches, self._tapped = None if found is None else _Seen.of(found), [], False

    def _branch(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = first_hidden((output,), {})
        if found is not None and self._entered is not None and not self._tapped:
            self._branches.append(("norm" in type(module).__name__.lower(), _Seen.of(found)))

    def _norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = first_hidden(args, kwargs)
        if found is not None and self.layer.runs_converted:
            self._normed.append(_Seen.of(found))


def _is_combination(rest: Tensor, allowed: Tensor, branches: list[Tensor], unit: float) -> bool:
    """Whether rest = Σ s · branch for some numbers s, where it is not 0 (dropout takes elements away)."""
    kept = rest.abs() > allowed
    if not branches or not kept.any():
        return not kept.any()
    columns = torch.stack([branch[kept] for branch in branches], dim=1)
    weight = 1 / allowed[kept].clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1)  # how exactly each is known
    weight = weight / weight.max()
    scales = torch.linalg.lstsq(
        (columns * weight).cpu(), rest[kept].unsqueeze(1).cpu() * weight.cpu(), driver="gelsd"
    ).solution.to(rest)
    differs = (columns @ scales).squeeze(1) - rest[kept]
    return bool((differs.abs() <= allowed[kept] + unit * (columns.abs() @ scales.abs()).squeeze(1)).all())
