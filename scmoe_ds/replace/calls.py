"""What a hook sees of the call of a module that somebody else wrote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from scmoe_ds.trace.recorder import PairRecorder, What

Call = tuple[tuple[Any, ...], dict[str, Any]]


def first_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first floating-point tensor among a module's arguments, or in a tuple that comes first."""
    for value in (*args, *kwargs.values()):
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if isinstance(first, Tensor) and first.is_floating_point():
            return first
    return None


def marked_inputs(recorder: PairRecorder, what: What, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The arguments of a call, the first floating-point tensor among them marked as the start of a region."""
    values = [*args, *kwargs.values()]
    for index, value in enumerate(values):
        if isinstance(value, Tensor) and value.is_floating_point():
            (values[index],) = recorder.open(what, value)
            break
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def marked_output(recorder: PairRecorder, what: What, output: Any) -> Any:
    """The output of a call, marked as the end of a region: the first of a tuple, or the tensor that it is."""
    if not isinstance(output, tuple):
        return recorder.close(what, output)[0]
    return (*recorder.close(what, output[0]), *output[1:])


def operators_in(block: nn.Module, layer: nn.Module | None = None) -> list[tuple[str, nn.Module]]:
    """The parts of a block that have parameters, are no norms and do not hold the layer, by name."""
    return [
        (name, part)
        for name, part in _parts(block)
        if "norm" not in type(part).__name__.lower()
        and all(module is not layer for module in part.modules())
        and any(True for _ in part.parameters())
    ]


def _parts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Its children. Lists and dicts of modules are never called: their children stand for them."""
    for name, child in block.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{name}.{inner}", each) for inner, each in _parts(child))
        else:
            yield name, child
