"""scmoe adapt --measure of Hugging Face models: losses against the written model in transformers alone, similarity
against scmoe analyze."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import ByteLevelBPETokenizer

from lab.moe_families import tiny
from scmoe_ds.checkpoint.adapted import student
from scmoe_ds.checkpoint.adapted.source import SourceDirectory
from scmoe_ds.engine import connect
from scmoe_ds.programs import adapt, analyze
from tests.analysis.test_feasibility import entry

TEXT = "def similarity(a, b):\n    return a @ b / (norm(a) * norm(b))\n" * 2
END, LENGTH = "<|endoftext|>", 16
BEHIND_DENSE = {"num_hidden_layers": 3, "first_k_dense_replace": 1}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    (directory / "text.txt").write_text(TEXT)
    own = ByteLevelBPETokenizer()
    own.train_from_iterator([TEXT], vocab_size=300, special_tokens=[END], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own._tokenizer, eos_token=END)
    for family, settings in (("qwen3_moe", {}), ("deepseek_v2", BEHIND_DENSE), ("qwen2_moe", {})):
        torch.manual_seed(1)
        model = tiny(family, vocab_size=300, **settings)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.normal_(std=0.2)
        model.save_pretrained(directory / family)
        tokenizer.save_pretrained(directory / family)
    identity = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = entry("attention", top_k=3)
    made["times"]["backbone"][0]["name"] = "self_attn"  # as hooks on modules have timed it
    made["description"]["operators"] = ["Qwen3MoeDecoderLayer", "from the input of Qwen3MoeRMSNorm"]
    (directory / "times.json").write_text(json.dumps([{**made, "identity": identity}]))
    return directory


def measured(model: Path, files: Path, out: Path, *flags: object) -> dict[str, Any]:
    words = [model, "--measure", files / "text.txt", "--seq-length", LENGTH, "--output-prefix", out / "costs", *flags]
    assert adapt.main(list(map(str, words))) == 0
    found: dict[str, Any] = json.loads((out / "costs.json").read_text())
    return found


@torch.no_grad()
def loss_of(directory: Path, files: Path) -> float:
    """Of every token of the text, from the up to 16 before it in its window; the first one from the end of a text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = [tokenizer.eos_token_id, *tokenizer((files / "text.txt").read_text(), add_special_tokens=False)["input_ids"]]
    nats = 0.0
    for first in range(0, len(ids) - 1, LENGTH):
        stop = min(first + LENGTH, len(ids) - 1)
        begin = max(stop - LENGTH, 0)  # the last window is whole, and scores what is left
        logits = model(torch.tensor([ids[begin:stop]])).logits[0, first - begin :].double()
        nats += float(F.cross_entropy(logits, torch.tensor(ids[first + 1 : stop + 1]), reduction="sum"))
    return nats / (len(ids) - 1)


def written(model: Path, out: Path, *flags: object) -> Path:
    assert adapt.main(list(map(str, [model, "--output", out, *flags]))) == 0
    return out


@pytest.mark.parametrize(
    ("family", "flags", "layers"),
    [
        ("qwen3_moe", ["--join", "late", "--shared-expert", "mean", "--merge", "cg2", "--top-k", 2], [0]),
        ("qwen2_moe", ["--join", "end", "--merge", "cg1"], [1]),
        ("deepseek_v2", ["--first-layer-position", "pos2", "--join", "late"], [0]),
    ],
    ids=["an added shared expert", "its own shared expert", "behind a dense block"],
)
def test_losses_are_the_written_models(
    family: str, flags: list[object], layers: list[int], files: Path, tmp_path: Path
) -> None:
    found = measured(files / family, files, tmp_path, *flags)
    assert found["loss"] == pytest.approx(loss_of(files / family, files), abs=1e-6)
    way = found["ways"][-1]
    alone = next(each for each in way["layers"] if [each["layer"]] == layers)
    flags = [*flags, "--position", way["position"], "--join", way["join"]]
    target = written(files / family, tmp_path / "alone", *flags, "--layers", *layers)
    assert alone["loss"] == pytest.approx(loss_of(target, files), abs=1e-6)
    assert abs(alone["increase"]) > 1e-4
    target = written(files / family, tmp_path / "all", *flags)
    assert way["all"]["loss"] == pytest.approx(loss_of(target, files), abs=1e-6)


def test_similarity_and_choice(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MoE in every block has Pos-1 alone. The choice is written at once. All ways have the source opened once."""
    opened: list[Path] = []

    class Noted(SourceDirectory):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(student, "SourceDirectory", Noted)
    source, target = files / "qwen3_moe", tmp_path / "chosen"
    flags = ["--calibration", files / "times.json", "--max-loss-increase", "100%", "--output", target]
    found = measured(source, files, tmp_path, *flags)
    assert opened == [source]
    assert [(way["position"], way["join"]) for way in found["ways"]] == [("pos1", "end"), ("pos1", "late")]
    assert found["choice"]["loss"] == pytest.approx(loss_of(target, files), abs=1e-6)
    # The source blocks: gate 2, attention 16, experts 9, transfers 20. One transfer of each pass runs beside attention.
    times = [(each["before_ms"], each["after_ms"]) for each in found["ways"][0]["layers"]]
    assert times == [(47, 37)] * 2
    out = tmp_path / "similarity.json"
    words = ["similarity", "--hf-model", source, "--text-file", files / "text.txt", "--seq-length", LENGTH]
    assert analyze.main(list(map(str, [*words, "--output", out]))) == 0
    layers = json.loads(out.read_text())["verdict"]["positions"]["pos1"]["layers"]
    assert [each["cosine"] for each in found["ways"][0]["layers"]] == pytest.approx([each["cosine"] for each in layers])


def test_what_a_model_cannot_have(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(files / "qwen3_moe"), "--measure", str(files / "text.txt"), "--seq-length", "16"]
    for more, rule in (
        (["--position", "pos2"], "is the first block, nothing precedes it"),
        (["--shared-expert", "busiest"], "--shared-expert busiest: is measured on text"),
        (["--merge", "cg1"], 'merge "cg1"'),
        (["--seq-length", "65"], "exceeds the model's context of 64 tokens"),
    ):
        assert adapt.main([*words, *more]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(errors) == 1 and rule in errors[0], errors
