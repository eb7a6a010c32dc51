"""Experts that migrate to a GPU: the same bits as on a CPU, beside its kernels, without a race, and the host waits for
none. What must be there for that is taken out, one thing after another, and each time it is noticed."""

from __future__ import annotations

import gc
import inspect
import json
import random
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.gpu_budgets import HOST_WAITS_FORWARD
from scmoe_ds.engine import connect
from scmoe_ds.inference.generate import Request, TextGenerator
from scmoe_ds.inference.model import TrainedModel, load_model, serving_config
from scmoe_ds.inference.offload import offload_experts
from scmoe_ds.inference.sampling import Sampling
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.offload.readers import BufferedReader, Copied, Reader
from scmoe_ds.offload.sources import DiskExperts
from scmoe_ds.offload.store import ExpertKey, ExpertStore
from tests.helpers.exports import whole_model, write_export
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu
from tests.simulated_gpu.gpu import Gpu
from tests.simulated_gpu.places import place

pytestmark = NEEDS_SIMULATION
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LAYERS, EXPERTS, HIDDEN, NEW_TOKENS = 2, 4, 16, 3
PROMPTS = [[1, 2, 3], [7, 8, 9, 10, 11, 12]]
TOKENS = torch.randint(384, (3, 20), generator=torch.Generator().manual_seed(2))
MIGRATING = [(mode, tier) for mode in ("offload", "offload-async") for tier in ("host", "disk")]
READERS_OWN = "event.synchronize at scmoe_ds/offload/readers.py"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    connect()
    model = whole_model(GPTSettings(2 * LAYERS, HIDDEN, 2, 384, 24), {"num_experts": EXPERTS})
    return write_export(tmp_path_factory.mktemp("models") / "export", model, shard_bytes=10_000)


def serve(
    path: Path, device: torch.device, mode: str = "resident", tier: Any = None, places: int = 3
) -> tuple[GPT, ExpertStore | None]:
    trained, stores = TrainedModel.open(path), []

    def offload(model: GPT) -> None:
        stores.append(offload_experts(model, trained, mode, places, torch.float32, device, tier))

    config = serving_config(trained.config)
    model = load_model(trained, config, torch.float32, device, None if mode == "resident" else offload)
    return model, stores[0] if stores else None


def generated(model: GPT) -> list[list[int]]:
    request = Request(NEW_TOKENS, Sampling(0.9, top_p=0.9))
    return [completion.tokens for completion in TextGenerator(model).generate(PROMPTS, request)]


@pytest.fixture(scope="module")
def expected(export: Path) -> tuple[list[list[int]], Tensor]:
    """Of a CPU: a text, and logits."""
    model, _ = serve(export, CPU)
    with torch.inference_mode():
        return generated(model), model(TOKENS).logits


def waits_of_the_computation(gpu: Gpu) -> int:
    return sum(count for wait, count in gpu.host_waits.items() if not wait.startswith(READERS_OWN))


@pytest.mark.parametrize(("mode", "tier"), [("resident", None), *MIGRATING])
def test_the_papers_three_modes(
    mode: str, tier: str | None, export: Path, expected: tuple[list[list[int]], Tensor]
) -> None:
    """The host waits once per MoE layer for the row counts, and once per token for the token."""
    text, logits = expected
    with simulated_gpu() as gpu:
        model, store = serve(export, CUDA, mode, tier)
        gpu.reset()
        with torch.inference_mode(), Beside(gpu) as beside:
            found = model(TOKENS.pin_memory().to(CUDA, non_blocking=True)).logits
        assert torch.equal(gpu.peek(found), logits)
        assert waits_of_the_computation(gpu) == LAYERS * HOST_WAITS_FORWARD
        gpu.reset()
        assert generated(model) == text
        assert waits_of_the_computation(gpu) == NEW_TOKENS * (LAYERS * HOST_WAITS_FORWARD + 1)
        del model, store
    assert not gpu.findings
    assert not beside.on_the_main_stream and bool(beside.copies) == (mode != "resident")
    if mode == "offload-async":  # how many of MLP, attention and shared expert depends on when the readers get to it
        assert max(beside.kernels.values()) > 1
    else:
        assert not +beside.kernels, "a migration that blocks is waited for at once"


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_recorded_pass_waits_for_nothing_more(tier: str, export: Path, tmp_path: Path) -> None:
    """A barrier and a synchronisation before it; copies and kernels are timed by events that are read at the end."""
    with simulated_gpu() as gpu:
        model, _ = serve(export, CUDA, "offload-async", tier)
        generator = TextGenerator(model, trace=2, trace_dir=str(tmp_path))
        gpu.reset()
        generator.generate(PROMPTS, Request(NEW_TOKENS))
        assert waits_of_the_computation(gpu) == NEW_TOKENS * (LAYERS * HOST_WAITS_FORWARD + 1) + 2
        generator.passes.trace.close()
        assert not gpu.findings
    events = json.loads((tmp_path / "scmoe_trace_iteration_2.json").read_text())["traceEvents"]
    threads = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "reader 1: copy"} <= threads and ("reader 1: read" in threads) == (tier == "disk")


class Beside:
    """Counts the kernels that may run while an expert is copied: those launched before the main stream waits for it."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.kernels, self.on_the_main_stream = gpu, Counter[int](), False
        self._copies: list[tuple[int, int]] = []  # number and stream

    @property
    def copies(self) -> int:
        return len(self._copies)

    def __enter__(self) -> Beside:
        self._launch, self.gpu.kernel = self.gpu.kernel, self._kernel  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del self.gpu.kernel  # the method is back

    def _kernel(self, operator: str, *args: Any) -> None:
        stream = args[2]
        self._launch(operator, *args)
        if operator == "copy to the device" and any(file.endswith("readers.py") for file, _ in place()):
            self._copies.append((self.gpu._number, stream))
            self.on_the_main_stream |= stream == 0
        elif stream == 0:
            for number, other in self._copies:
                self.kernels[number] += not self.gpu.clocks.is_ordered_after(0, number, other)


def symptoms(path: Path, tier: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fetches, guesses and computes experts in an order that no model has. Outputs are a CPU's; returns what is wrong."""
    resident, _ = serve(path, CPU)
    experts = [list(pair.layer.deepspeed_moe.experts.deepspeed_experts) for pair in resident.scheduled_pairs()]
    rows, choice = torch.randn(3, HIDDEN), random.Random(5)
    keys = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    wrong = False
    # An expert has four tensors: with two readers, a tensor of each expert would come by the same one.
    monkeypatch.setattr(DiskExperts.__init__, "__defaults__", (3,))
    with simulated_gpu() as gpu, torch.inference_mode(), Beside(gpu) as beside:
        model, store = serve(path, CUDA, "offload-async", tier)
        assert store is not None
        gpu.reset()
        on_device = gpu.move(rows)
        for _ in range(25):
            store.guess(choice.sample(keys, choice.randrange(3)))
            needed = choice.sample(keys, choice.randrange(1, 5))
            store.fetch(needed)
            on_device = on_device * 1
            for key in choice.sample(needed, len(needed)):
                output = store.take(key)(on_device)
                store.release(key)
                wrong |= not torch.equal(gpu.peek(output), experts[key.layer][key.expert](rows))
        waits = waits_of_the_computation(gpu)
        store.fetch([key for key in keys if key not in store._held])
        if isinstance(store._source, DiskExperts):
            store._source._pool.shutdown()
        del model, store  # while the last ones are still coming
        gc.collect()
    others = {"wrong values": wrong, "waits": waits, "on the main stream": beside.on_the_main_stream}
    return [*gpu.findings, *(name for name, seen in others.items() if seen)]


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_experts_in_any_order(tier: str, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert symptoms(export, tier, monkeypatch) == []


BOTH = ("host", "disk")
MUTANTS = {
    "computation does not wait for a copy": (
        (Copied, "wait", "torch.cuda.current_stream().wait_event(self.event)", "pass"),
        BOTH,
        "race: ",
    ),
    "a copy does not wait for the computation": (
        (Reader, "copy", "after.wait()", "pass"),
        BOTH,
        "race: copy to the device",
    ),
    "a use is not noted": ((ExpertStore, "release", "self._held[key].used()", "pass"), BOTH, "race: "),
    "an expert that still comes is written over": (
        (ExpertStore, "_start", "slot.coming = slot.occupied =", "slot.coming ="),
        ("disk",),
        "race: copy to the device",
    ),
    "a pinned buffer is filled too early": (
        (BufferedReader, "read", "copied.event.synchronize()", "pass"),
        ("disk",),
        "too early: the host",
    ),
    "memory is given away while a copy comes": (
        (Reader, "copy", "into.record_stream(self._stream)", "pass"),
        BOTH,
        "use after free",
    ),
    "a copy blocks": ((Reader, "copy", "non_blocking=True", "non_blocking=False"), BOTH, "waits"),
    "a copy from pageable memory": (
        (BufferedReader, "read", "value = fill(buffer)", "value = fill(buffer).clone()"),
        ("disk",),
        "waits",
    ),
    "a copy on the stream of the computation": (
        (Reader, "copy", "self._current()", "torch.cuda.stream(None)"),
        ("host",),
        "on the main stream",
    ),
}
"""What is put in whose place, on which tiers, and how it is noticed."""


@pytest.mark.parametrize(("name", "tier"), [(name, tier) for name, case in MUTANTS.items() for tier in case[1]])
def test_what_is_missing_is_noticed(name: str, tier: str, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (owner, method, old, new), _, symptom = MUTANTS[name]
    monkeypatch.setattr(owner, method, mutated(getattr(owner, method), old, new))
    found = symptoms(export, tier, monkeypatch)
    assert any(each.startswith(symptom) for each in found), found


def mutated(function: Any, old: str, new: str) -> Any:
    """A method with other source text."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old} is no longer in {function.__qualname__}"
    text, names = f"from __future__ import annotations\n{source.replace(old, new)}", dict(function.__globals__)
    exec(compile(text, function.__code__.co_filename, "exec"), names)
    return names[function.__name__]
