"""Experts that live in files: the same bits as resident ones, what moves when, and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lab.distributed import environment_of_one
from scmoe_ds.checkpoint.extents import extents_of
from scmoe_ds.engine import connect
from scmoe_ds.errors import CheckpointError
from scmoe_ds.inference.generate import Request, TextGenerator
from scmoe_ds.inference.load import load_trained
from scmoe_ds.inference.model import TrainedModel, load_model, serving_config
from scmoe_ds.inference.offload import Offloading, expert_places, offload_experts
from scmoe_ds.inference.pregate import guess_experts
from scmoe_ds.inference.sampling import Sampling
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.offload.files import ExpertFileError
from scmoe_ds.offload.pages import PAGE_BYTES
from scmoe_ds.offload.readers import BufferedReader
from scmoe_ds.offload.sources import PIECE_BYTES
from scmoe_ds.offload.store import ExpertKey, ExpertStore
from scmoe_ds.programs import generate as generate_program
from tests.helpers.exports import sign, whole_model, write_export

CPU, FP32 = torch.device("cpu"), torch.float32
SETTINGS = GPTSettings(4, 32, 4, 384, 48)
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12], [4, 4]]


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


def serve(path: Path, mode: str, places: int = 0) -> tuple[GPT, ExpertStore | None]:
    trained = TrainedModel.open(path)
    stores: list[ExpertStore] = []

    def offload(model: GPT) -> None:
        stores.append(offload_experts(model, trained, mode, places, FP32, CPU))

    model = load_model(trained, serving_config(trained.config), FP32, CPU, None if mode == "resident" else offload)
    return model, stores[0] if stores else None


def generated(model: GPT, batch_size: int = 3) -> list[list[int]]:
    completions = TextGenerator(model, batch_size=batch_size).generate(PROMPTS, Request(10, Sampling(1.0)))
    return [completion.tokens for completion in completions]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["scmoe", "topk", "shared_expert", "dgmoe", "dgmoe, shared"])
def test_offloaded_equals_resident(architecture: str, tmp_path: Path) -> None:
    """Bitwise, for every mode and number of places, in small shards; an expert is never computed before it is there."""
    architecture, shared = architecture.removesuffix(", shared"), architecture.endswith("shared")
    section = {"architecture": architecture, "num_experts": 4, "pairs_per_moe": 2 if shared else 1}
    path = write_export(tmp_path / "export", whole_model(SETTINGS, section), shard_bytes=30_000)
    tokens = torch.randint(384, (3, 20), generator=torch.Generator().manual_seed(2))
    model, _ = serve(path, "resident")
    text, expected = generated(model), model(tokens).logits
    for mode, places in (("offload", 1), ("offload", 3), ("offload-async", 2), ("offload-async", 5), ("offload", 8)):
        model, store = serve(path, mode, places)
        assert store is not None
        assert generated(model) == text, (mode, places)
        assert torch.equal(model(tokens).logits, expected)
        assert store.counts.used == store.counts.hits + store.counts.migrations or places < 3
        if places == 8:
            assert store.counts.migrations == (4 if shared else 8)  # each once: all fit


def test_a_cache_that_nobody_named_holds_twice_the_parts_of_a_token(tmp_path: Path) -> None:
    model = whole_model(SETTINGS, {"num_experts": 4, "top_k": 2, "expert_partition": 2})
    path = write_export(tmp_path / "export", model)
    part = model.scheduled_pairs()[0].layer.deepspeed_moe.experts.deepspeed_experts[0]
    store = load_trained(path, offloading=Offloading("offload")).store
    assert store is not None and store.nbytes == 2 * 2 * 2 * sum(each.nbytes for each in part.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_straight_read_is_a_buffered_read(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights go straight to their place, and nothing through a buffer. Files of safetensors' own writer, in which
    they begin anywhere, give the same bits."""
    settings = GPTSettings(2, 64, 4, 384, 16)
    path = write_export(tmp_path / "export", whole_model(settings, {"num_experts": 4}), dtype, shard_bytes=500_000)
    tokens = torch.randint(384, (2, 9), generator=torch.Generator().manual_seed(2))
    expected, buffered = serve(path, "resident")[0](tokens).logits, BufferedReader.read
    model, _ = serve(path, "offload-async", 2)
    with monkeypatch.context() as patched:
        patched.delattr(BufferedReader, "read")
        assert torch.equal(model(tokens).logits, expected)
    pieces = []
    monkeypatch.setattr(BufferedReader, "read", lambda *args: pieces.append(args) or buffered(*args))
    model, store = serve(by_safetensors(path), "offload-async", 2)
    pieces.clear()
    assert torch.equal(model(tokens).logits, expected)
    assert store is not None and len(pieces) >= 2 * store.counts.migrations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_file_of_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_export(tmp_path / "export", whole_model(SETTINGS, {"num_experts": 4}), dtype)
    assert generated(serve(path, "offload-async", 2)[0]) == generated(serve(path, "resident")[0])


def by_safetensors(path: Path) -> Path:
    """An export with files of safetensors' own writer: tensors begin where the one before ends."""
    for file in path.glob("*.safetensors"):
        save_file(load_file(file), file)
    return sign(path)


def test_experts_larger_than_a_piece(tmp_path: Path) -> None:
    """Pieces that begin in the middle of a page and threads that read them at the same time."""
    settings = GPTSettings(2, 520, 4, 384, 16)
    path = write_export(tmp_path / "export", whole_model(settings, {"num_experts": 2}, std=0.05))
    assert PIECE_BYTES < 520 * 4 * 520 * 4
    tokens = torch.randint(384, (2, 9), generator=torch.Generator().manual_seed(2))
    expected = serve(path, "resident")[0](tokens).logits
    assert torch.equal(serve(by_safetensors(path), "offload-async", 2)[0](tokens).logits, expected)


@pytest.mark.parametrize("moe_every", [1, 2])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_guessed_experts(placement: str, moe_every: int, tmp_path: Path) -> None:
    """Guesses change no bit, and most are right where the tapped and the current representation are alike."""
    section = {"architecture": "topk", "num_experts": 4, "moe_every": moe_every, "position": "pos1"}
    settings, layers = replace(SETTINGS, norm_placement=placement), 4 // moe_every
    path = write_export(tmp_path / "export", whole_model(settings, section, std=0.02))
    text = generated(serve(path, "resident")[0], 1)
    model, store = serve(path, "offload-async", 4 * layers)
    assert store is not None and len(guess_experts(model)) == layers
    assert generated(model, 1) == text
    assert store.counts.predicted == store.counts.confirmed == store.counts.migrations == 4 * layers
    with pytest.raises(ValueError, match="nothing to guess"):
        model, _ = serve(write_export(tmp_path / "scmoe", whole_model(SETTINGS, {"num_experts": 4})), "offload", 1)
        guess_experts(model)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return write_export(tmp_path / "export", whole_model(SETTINGS, {"num_experts": 4}), shard_bytes=60_000)


def expert_file(path: Path) -> Path:
    """A shard that has an expert."""
    trained = TrainedModel.open(path)
    shards = trained.weights._shards  # type: ignore[attr-defined]
    return path / next(shards[name] for name in sorted(shards) if ".deepspeed_experts." in name)


@pytest.mark.parametrize(("size", "places"), [("300MB", 8), ("2TB", 8), ("9" * 20, 8), ("8", 8), ("3", 3)])
def test_the_cache_has_places_for_what_exists(
    export: Path, size: str, places: int, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Two layers of four experts: more room than for these is not taken, and a line says so."""
    taken = []
    original = ExpertStore.__init__

    def note(self: ExpertStore, source: Any, names: Any, slots: Any, num_layers: int) -> None:
        taken.append(len(slots))
        original(self, source, names, slots, num_layers)

    monkeypatch.setattr(ExpertStore, "__init__", note)
    flags = ["--load", str(export), "--prompt", "ab", "--max-new-tokens", "2", "--experts", "offload-async"]
    with caplog.at_level("INFO", logger="scmoe_ds"):
        assert generate_program.main([*flags, "--expert-cache", size]) == 0
    assert taken == [places]
    assert ("this rank has 8: all of them stay" in caplog.text) == (size not in ("8", "3"))


def test_missing_and_short_files(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = TrainedModel.open(export)
    names = [name for name in trained.weights.names() if ".deepspeed_experts." in name]
    file = expert_file(export)
    whole = file.read_bytes()
    store = serve(export, "offload", 1)[1]
    os.truncate(file, len(whole) - 5000)  # while it is in use
    assert store is not None
    with pytest.raises(ExpertFileError, match=rf"{file.name} ends at byte \d+, .* Export the checkpoint again"):
        for layer, expert in ((layer, expert) for layer in range(2) for expert in range(4)):
            store.fetch([ExpertKey(layer, expert)])
            store.take(ExpertKey(layer, expert))
            store.release(ExpertKey(layer, expert))
    with pytest.raises(ExpertFileError, match="is no readable safetensors file"):
        extents_of(export, names)
    file.unlink()
    with pytest.raises(ExpertFileError, match=r"Export the checkpoint again, into another dir"):
        extents_of(export, names)
    flags = ["--load", str(export), "--prompt", "a", "--experts", "offload-async"]
    assert generate_program.main(flags) == 2
    assert f"{file.name} is missing" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"has no x\.weight"):
        extents_of(export, ["x.weight"])


def test_file_systems_without_direct_reads(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that refuse to open so, and those that refuse to read so: the same experts."""
    tokens = torch.randint(384, (3, 20), generator=torch.Generator().manual_seed(2))
    expected, original_open, original_read = serve(export, "resident")[0](tokens).logits, os.open, os.preadv
    refused: list[str] = []
    direct: set[int] = set()

    def refuse_to_open(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            refused.append("open")
            raise OSError(22, "Invalid argument")
        return original_open(path, flags, *rest)

    def note(path: Path, flags: int, *rest: int) -> int:
        descriptor = original_open(path, flags, *rest)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def refuse_to_read(descriptor: int, *rest: Any) -> int:
        if descriptor in direct:
            refused.append("read")
            raise OSError(22, "Invalid argument")
        return original_read(descriptor, *rest)

    monkeypatch.setattr(os, "open", refuse_to_open)
    assert torch.equal(serve(export, "offload", 2)[0](tokens).logits, expected)
    monkeypatch.setattr(os, "open", note)
    monkeypatch.setattr(os, "preadv", refuse_to_read)
    assert torch.equal(serve(export, "offload-async", 2)[0](tokens).logits, expected)
    assert {"open", "read"} == set(refused)


def test_checkpoint_that_is_no_export(export: Path) -> None:
    with pytest.raises(CheckpointError, match=r"scmoe convert export"):
        extents_of(export.parent, [])


def test_trace_of_a_pass(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every byte of every expert that migrates in it, reader by reader, before its computation."""
    flags = (
        f"--load {export} --prompt ab --max-new-tokens 3 --experts offload-async --scmoe-trace-dir {tmp_path}".split()
    )
    assert generate_program.main([*flags, "--scmoe-trace", "1"]) == 0
    written = capsys.readouterr().err
    assert f"wrote {tmp_path / 'scmoe_trace_iteration_1.json'} and " in written
    events = json.loads((tmp_path / "scmoe_trace_iteration_1.json").read_text())["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [(threads[event["tid"]], event) for event in events if event["ph"] == "X"]
    moved: Counter[tuple[str, int, int]] = Counter()
    for name, event in spans:
        if name.startswith("reader"):
            facts = event["args"]
            assert name[:10] in ("reader 1: ", "reader 2: ") and facts["tier"] == "disk"
            assert event["name"] == f"expert {facts['expert']}" and 0 <= facts["queued_ms"] <= event["ts"] / 1000
            moved[name[10:], facts["layer"], facts["expert"]] += facts["nbytes"]
            own = [e for _, e in spans if e["name"] == "experts" and e["args"]["layer"] == facts["layer"]]
            assert event["ts"] + event["dur"] <= own[0]["ts"] + own[0]["dur"]
    read, copied = ({key[1:]: size for key, size in moved.items() if key[0] == kind} for kind in ("read", "copy"))
    assert read.keys() == copied.keys() and {layer for layer, _ in read} == {0, 1}
    sizes = [4 * parameter.numel() for parameter in MLP(SETTINGS).parameters()]
    assert set(read.values()) == {sum(size for size in sizes if size % PAGE_BYTES == 0)}, "weights, read to their place"
    assert set(copied.values()) == {sum(size for size in sizes if size % PAGE_BYTES)}, "biases"
    assert {"compute", "communication", "reader 1: copy", "reader 2: read"} <= set(threads.values())

    assert generate_program.main([*flags, "--scmoe-trace", "9"]) == 0
    assert "--scmoe-trace 9: not written, the run ended before that iteration" in capsys.readouterr().err


def test_sizes_of_the_cache() -> None:
    assert expert_places("3", 10) == 3
    assert expert_places("2GB", 5 * 10**8) == 4 and expert_places("1.5GiB", 2**29) == 3
    assert expert_places("64mb", 32 * 10**6) == 2


LIMITED = """
    import resource, sys
    from scmoe_ds.programs import generate as generate_program
    used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
    limit = used + int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sys.exit(generate_program.main(sys.argv[2:]))
"""


def test_model_larger_than_the_memory(tmp_path: Path) -> None:
    """450 MB of experts where the process may take 300 MB: resident it does not start, offloaded it writes."""
    settings = GPTSettings(4, 384, 4, 384, 32)
    whole = whole_model(settings, {"num_experts": 48}, std=0.02)
    path = write_export(tmp_path / "export", whole, shard_bytes=20 * 10**6)  # safetensors maps one as private memory
    assert sum(file.stat().st_size for file in path.iterdir()) > 450e6

    def generate(mode: str) -> subprocess.CompletedProcess[str]:
        flags = f"--load {path} --prompt ab --max-new-tokens 8 --experts {mode} --temperature 0".split()
        root = str(Path(generate_program.__file__).parents[2])
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(LIMITED), str(300 << 20), *flags],
            capture_output=True,
            text=True,
            check=False,
            env={**environment_of_one(), "PYTHONPATH": root},
        )

    refused, written = generate("resident"), generate("offload-async")
    assert refused.returncode != 0 and "memory" in refused.stderr
    assert written.returncode == 0 and written.stdout.splitlines()[-1].startswith("ab"), written.stderr
    assert "experts: " in written.stderr and "migrated" in written.stderr
