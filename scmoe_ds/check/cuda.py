"""`torch.cuda` without a driver: what programs ask of it, answered as a card of the given name would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from scmoe_ds.check.cards import Card
from scmoe_ds.comm.side_stream import side_stream


class Stream:
    """A stream on which nothing is ever under way."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.priority, self.cuda_stream = torch.device("cuda", 0), priority, 0

    def wait_event(self, event: Event) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Event:
    """An event that has happened."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None: ...

    def record(self, stream: Stream | None = None) -> None: ...

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0


MAIN = Stream()
_WITHOUT_RESULT = """
    set_device init synchronize empty_cache ipc_collect manual_seed manual_seed_all seed_all set_rng_state
    set_rng_state_all reset_peak_memory_stats reset_max_memory_allocated
    """.split()


@contextmanager
def standing_in(card: Card, devices: int, in_use: Callable[[], int], peak: Callable[[], int]) -> Iterator[None]:
    """Inside the block, `torch.cuda` answers for `devices` cards.

    Args:
        card: of which kind.
        devices: in this node.
        in_use, peak: allocated bytes now, and the most so far.
    """
    properties = SimpleNamespace(
        name=card.name,
        total_memory=card.memory_bytes,
        major=card.capability[0],
        minor=card.capability[1],
        multi_processor_count=100,
    )

    values: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_current_stream_capturing": False,
        "is_bf16_supported": card.capability >= (8, 0),
        "can_device_access_peer": True,
        "device_count": devices,
        "current_device": 0,
        "device": nullcontext(),
        "get_device_name": card.name,
        "get_device_capability": card.capability,
        "get_device_properties": properties,
        "current_stream": MAIN,
        "default_stream": MAIN,
        "initial_seed": 0,
        "memory_stats": {},
        **dict.fromkeys(_WITHOUT_RESULT),
    }
    functions: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: nullcontext(stream),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "mem_get_info": lambda *_: (card.memory_bytes - in_use(), card.memory_bytes),
        "memory_allocated": lambda *_: in_use(),
        "memory_reserved": lambda *_: in_use(),
        "max_memory_allocated": lambda *_: peak(),
        "max_memory_reserved": lambda *_: peak(),
        **{name: _answer(value) for name, value in values.items()},
    }
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(patch.object(torch.cuda, name, function, create=True))
        for name in ("range_push", "range_pop"):
            stack.enter_context(patch.object(torch.cuda.nvtx, name, _answer(0)))
        stack.callback(side_stream.cache_clear)
        yield


def _answer(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value
