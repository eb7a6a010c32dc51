"""scmoe evaluate against loops over tokens: one whole forward pass for each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scmoe_ds.checkpoint.description import describe_model
from scmoe_ds.checkpoint.safetensors_files import write_weights
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.data.tokenizer import ByteTokenizer, Tokenizer
from scmoe_ds.engine import connect
from scmoe_ds.evaluation.documents import IndexedDocuments, TextDocument
from scmoe_ds.evaluation.scoring import Scorer
from scmoe_ds.evaluation.windows import Row, SlidingWindow
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.programs import evaluate as evaluate_program

CONTEXT, EOD = 32, 256
TEXT = "Les œufs, the eggs: twelve of them\n\nA second line – and more words than one window holds. Ça suffit. "
DOCUMENTS = [list(b"one window, and then some more of it: " * 2), [7], list(b"short"), [*range(40, 72), EOD], [9] * 81]


@cache
def model() -> GPT:
    """Without drops, so that it is the same function with any batch."""
    config = ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 4, "drop_tokens": False, "min_capacity": 0}})
    settings = GPTSettings(
        num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=384, max_position_embeddings=CONTEXT
    )
    built = GPT(settings, config).eval()
    initialize_parameters(built, 1, 0.2, 4)
    return built


def write_export(directory: Path) -> str:
    weights = sorted((name, lambda p=p: p.detach()) for name, p in model().named_parameters())
    config = describe_model(model().settings, model().config)
    write_weights(directory / "export", weights, config, torch.float32, 10**9)
    return str(directory / "export")


@torch.no_grad()
def log_likelihoods(tokens: Sequence[int]) -> torch.Tensor:
    """[V] of the token after these."""
    logits = model()(torch.tensor([list(tokens)])).logits
    assert logits is not None
    return logits[0, -1].double().log_softmax(0)


def plain_nats(document: Sequence[int], length: int, stride: int) -> float:
    """The window rule, one token at a time: token t of a document is read behind s[begin : t + 1], where s is the
    document with end-of-document in front."""
    whole, nats = [EOD, *document], 0.0
    for t, token in enumerate(document):
        begin = 0
        if t >= length:
            later = (t - length) // stride + 1  # the window after the first that scores it
            begin = min(length + later * stride, len(document)) - length
        nats -= float(log_likelihoods(whole[begin : t + 1])[token])
    return nats


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    """One process group for all cases; `main` leaves a group alone that it did not make."""
    connect()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_export(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_indexed_dataset(str(tmp_path_factory.mktemp("data") / "set"), DOCUMENTS, 257).prefix


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.tokens"
    path.write_bytes(TEXT.encode())
    return str(path)


def evaluate(directory: Path, *flags: object) -> dict[str, Any]:
    out = directory / "record.json"
    assert evaluate_program.main([*map(str, flags), "--output", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("length", "stride", "batch"), [(32, None, 3), (32, 32, 1), (32, 5, 3), (7, 7, 3), (1, 1, 8)])
def test_a_dataset_is_the_plain_computation(
    length: int, stride: int | None, batch: int, export: str, dataset: str, tmp_path: Path
) -> None:
    flags = ["--load", export, "--data-path", dataset, "--seq-length", length, "--batch-size", batch]
    record = evaluate(tmp_path, *flags, *(["--stride", stride] if stride else []))
    results = record["results"]
    expected = sum(plain_nats(document, length, stride or length // 2) for document in DOCUMENTS)
    tokens = sum(map(len, DOCUMENTS))
    assert results["tokens"] == tokens
    assert results["loss"] == pytest.approx(expected / tokens, abs=1e-6)
    assert results["perplexity"] == pytest.approx(math.exp(expected / tokens), rel=1e-6)
    assert results["bytes"] == tokens - 1  # end-of-document is no text
    assert results["bits_per_byte"] == pytest.approx(expected / math.log(2) / (tokens - 1), rel=1e-6)
    assert "word_perplexity" not in results
    assert record["flags"]["stride"] == stride or length // 2
    assert record["checkpoint"] == export


def test_batches_do_not_change_a_loss(export: str, dataset: str, tmp_path: Path) -> None:
    alone, together = (
        evaluate(tmp_path, "--load", export, "--data-path", dataset, "--batch-size", size)["results"] for size in (1, 3)
    )
    assert alone["loss"] == pytest.approx(together["loss"], abs=1e-6)
    assert {key: alone[key] for key in ("tokens", "windows", "bytes")} == {
        key: together[key] for key in ("tokens", "windows", "bytes")
    }


def test_a_text_file(export: str, text_file: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    results = evaluate(tmp_path, "--load", export, "--text-file", text_file)["results"]
    octets = list(TEXT.encode())
    expected = plain_nats(octets, CONTEXT, CONTEXT // 2)
    words = len(re.findall(r"\S+", TEXT))
    assert words == 20
    assert (results["tokens"], results["bytes"], results["words"]) == (len(octets), len(octets), words)
    assert results["loss"] == pytest.approx(expected / len(octets), abs=1e-6)
    assert results["byte_perplexity"] == pytest.approx(math.exp(expected / len(octets)), rel=1e-6)
    assert results["word_perplexity"] == pytest.approx(math.exp(expected / words), rel=1e-5)
    assert re.search(rf"loss, nats per token +{expected / len(octets):.3f}", capfd.readouterr().out)


def test_words_and_bytes_across_pieces(text_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that end within words, characters and runs of blanks."""
    for size in (1, 2, 3, 10):
        monkeypatch.setattr("scmoe_ds.data.text_file._PIECE_BYTES", size)
        document = TextDocument(text_file, ByteTokenizer())
        assert document.num_words == len(TEXT.split())
        assert document.tokens(0).tobytes() == TEXT.encode()


class WordTokenizer(Tokenizer):
    """Words and what is between them; unlike bytes, of several bytes each."""

    name, eod = "words", 0

    def __init__(self, text: str) -> None:
        self.parts = ["<eod>", *sorted(set(re.findall(r"\s+|\S+", text)))]
        self.vocab_size = len(self.parts)

    def tokenize(self, text: str) -> list[int]:
        return [self.parts.index(part) for part in re.findall(r"\s+|\S+", text)]

    def detokenize(self, ids: Sequence[int]) -> str:
        return "".join(self.parts[i] for i in ids)


def test_bytes_of_tokens_that_are_words(text_file: str, tmp_path: Path) -> None:
    tokenizer = WordTokenizer(TEXT)
    ids = tokenizer.tokenize(TEXT)
    document = TextDocument(text_file, tokenizer)
    assert document.tokens(0).tolist() == ids
    assert (document.num_bytes(0), document.num_words) == (len(TEXT.encode()), 20)
    prefix = write_indexed_dataset(str(tmp_path / "set"), [[*ids, 0], ids[:3]], tokenizer.vocab_size).prefix
    documents = IndexedDocuments(prefix, None, tokenizer)
    assert [documents.num_bytes(0), documents.num_bytes(1)] == [len(TEXT.encode()), len("Les œufs,".encode())]
    assert documents.tokens(1).tolist() == ids[:3]


def test_the_padding_of_the_vocabulary_is_never_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, padding = model().logits, 100.0 * (torch.arange(384) > EOD)
    monkeypatch.setattr(model(), "logits", lambda hidden: logits(hidden) + padding)
    row = Row(np.array([EOD, 5]), np.array([int(log_likelihoods([EOD, 5])[: EOD + 1].argmax())]))
    assert Scorer(model(), vocab_size=257).score([row])[0, 1] == 1
    assert Scorer(model()).score([row])[0, 1] == 0


def test_the_validation_documents_of_a_split(export: str, dataset: str, tmp_path: Path) -> None:
    results = evaluate(tmp_path, "--load", export, "--data-path", dataset, "--split", "40,40,20")["results"]
    chosen = DOCUMENTS[2:4]
    expected = sum(plain_nats(document, CONTEXT, CONTEXT // 2) for document in chosen)
    assert results["tokens"] == sum(map(len, chosen))
    assert results["loss"] == pytest.approx(expected / results["tokens"], abs=1e-6)


QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "a town", "x"], "answer": 0},
    {"question": "Two and two are, by all that is known to us,", "choices": ["five", "four"], "answer": 1},
    {"question": "Q", "choices": ["r", "s", "longer than the others"], "answer": 2},
]
PAGES = [{"page": "A page of some length, longer than a window of the model."}, {"page": "Short page."}]
PROMPTS = [{"prompt": "once upon a time there was a very long story"}, {"prompt": "a"}]
NEW_TOKENS = 12
ALL_TASKS = "tiny_choice,tiny_pages,tiny_story"


def write_tasks(directory: Path) -> str:
    """A task of each kind of request, as files that lm_eval reads without a network."""
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    definitions: dict[str, tuple[list[dict], dict]] = {
        "tiny_choice": (
            QUESTIONS,
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_target": "{{answer}}",
                "doc_to_choice": "{{choices}}",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            },
        ),
        "tiny_pages": (
            PAGES,
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{page}}",
                "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
            },
        ),
        "tiny_story": (
            [{**prompt, "story": greedy_text(prompt["prompt"])} for prompt in PROMPTS],
            {
                "output_type": "generate_until",
                "doc_to_text": "{{prompt}}",
                "doc_to_target": "{{story}}",
                "generation_kwargs": {"until": [stop_text()], "max_gen_toks": NEW_TOKENS, "do_sample": False},
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            },
        ),
    }
    folder = directory / "tasks"
    folder.mkdir()
    for name, (documents, definition) in definitions.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
        files = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(directory / "cache")}
        whole = {"task": name, **common, "dataset_kwargs": files, **definition}
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    return str(folder)


def greedy_tokens(prompt: str) -> list[int]:
    """The most likely tokens, the prompt cut on the left to leave room for them; padding is never chosen."""
    tokens = list(prompt.encode())[-(CONTEXT - NEW_TOKENS) :]
    new: list[int] = []
    for _ in range(NEW_TOKENS):
        new.append(int(log_likelihoods([*tokens, *new])[: EOD + 1].argmax()))
        if new[-1] == EOD:
            break
    return new


def greedy_text(prompt: str) -> str:
    octets = bytes(token for token in greedy_tokens(prompt) if token != EOD)
    return octets.decode(errors="replace").split(stop_text())[0]


@cache
def stop_text() -> str:
    """A character that greedy decoding gives in the midst of the first story, so that stopping is tried."""
    text = bytes(greedy_tokens(PROMPTS[0]["prompt"])).decode(errors="replace")
    return next(character for character in text[2:] if character != "\ufffd")


def continuation_nats(context: Sequence[int], continuation: Sequence[int], length: int = CONTEXT) -> float:
    """As lm_eval asks for it: all of the continuation, the context cut on the left."""
    whole = [*context, *continuation][-(length + 1) :]
    start = len(whole) - len(continuation)
    return -sum(float(log_likelihoods(whole[:t])[whole[t]]) for t in range(start, len(whole)))


def expected_accuracies() -> tuple[float, float]:
    right = right_by_length = 0
    for each in QUESTIONS:
        nats = [continuation_nats(each["question"].encode(), f" {choice}".encode()) for choice in each["choices"]]
        per_byte = [value / len(choice) for value, choice in zip(nats, each["choices"], strict=True)]
        right += nats.index(min(nats)) == each["answer"]
        right_by_length += per_byte.index(min(per_byte)) == each["answer"]
    return right / len(QUESTIONS), right_by_length / len(QUESTIONS)


def check_tasks(record: dict[str, Any]) -> None:
    """What lm_eval found on `write_tasks`, against whole forward passes."""
    found = record["results"]["results"]
    accuracy, accuracy_by_length = expected_accuracies()
    assert found["tiny_choice"]["acc,none"] == pytest.approx(accuracy)
    assert found["tiny_choice"]["acc_norm,none"] == pytest.approx(accuracy_by_length)
    texts = [list(page["page"].encode()) for page in PAGES]
    nats, octets = sum(plain_nats(text, CONTEXT, CONTEXT) for text in texts), sum(map(len, texts))
    assert found["tiny_pages"]["bits_per_byte,none"] == pytest.approx(nats / octets / math.log(2), rel=1e-6)
    assert found["tiny_pages"]["byte_perplexity,none"] == pytest.approx(math.exp(nats / octets), rel=1e-5)
    assert found["tiny_story"]["exact_match,none"] == 1
    assert record["results"]["truncated"] == truncated_requests()


def truncated_requests() -> int:
    """Choices that do not fit a window with their question, and the first prompt."""
    choices = [(each["question"], choice) for each in QUESTIONS for choice in each["choices"]]
    return sum(len(f"{question} {choice}") > CONTEXT + 1 for question, choice in choices) + 1


@pytest.mark.slow
def test_tasks_of_lm_eval(export: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    first, rest = ALL_TASKS.split(",", 1)  # by spaces and by commas
    flags = ["--tasks", first, rest, "--include-path", write_tasks(tmp_path), "--batch-size", 2]
    check_tasks(evaluate(tmp_path, "--load", export, *flags))
    output = capfd.readouterr()
    assert "|tiny_choice|" in output.out
    assert truncated_requests() == 3
    assert "3 requests were longer than the model's context" in output.err


def test_rolling_windows_agree_with_the_text_file(export: str, tmp_path: Path) -> None:
    """The same numbers from both ways in, at lm_eval's stride."""
    path = tmp_path / "page"
    path.write_text(PAGES[0]["page"])
    folder = write_tasks(tmp_path)
    direct = evaluate(tmp_path, "--load", export, "--text-file", path, "--stride", CONTEXT)["results"]
    flags = ["--tasks", "tiny_pages", "--include-path", folder, "--limit", 1]
    task = evaluate(tmp_path, "--load", export, *flags)["results"]["results"]["tiny_pages"]
    assert task["bits_per_byte,none"] == pytest.approx(direct["bits_per_byte"], rel=1e-9)
    assert task["byte_perplexity,none"] == pytest.approx(direct["byte_perplexity"], rel=1e-9)


def test_log_likelihoods_and_generation_of_the_adapter(export: str) -> None:
    """Numbers that lm_eval's own metrics only show in sums, and its empty contexts."""
    from lm_eval.api.instance import Instance

    from scmoe_ds.evaluation.harness import ScMoELM

    adapter = ScMoELM(Scorer(model(), 2, 257), ByteTokenizer(), SlidingWindow(CONTEXT, CONTEXT))

    def requests(kind: str, *arguments: tuple) -> list[Instance]:
        return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]

    context = next(each for each in "abcdefghijklmnopqrstuvwxyz" if greedy_tokens(each)[0] < 128)  # a character follows
    greedy = chr(greedy_tokens(context)[0])
    pairs = [("", "start"), (context, greedy), ("x" * 50, "yz"), ("space ", "moves over")]
    found = adapter.loglikelihood(requests("loglikelihood", *pairs))
    contexts = [[EOD], context.encode(), b"x" * 50, b"space"]
    continuations = [b"start", greedy.encode(), b"yz", b" moves over"]
    for (value, _), context, continuation in zip(found, contexts, continuations, strict=True):
        assert -value == pytest.approx(continuation_nats(list(context), list(continuation)), abs=2e-5)
    assert [is_greedy for _, is_greedy in found] == [False, True, False, False]
    assert adapter.truncated == 1
    (rolling,) = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", (TEXT,)))
    assert -rolling == pytest.approx(plain_nats(list(TEXT.encode()), CONTEXT, CONTEXT), rel=1e-6)
    settings = {"until": stop_text(), "max_gen_toks": NEW_TOKENS}
    prompts = [prompt["prompt"] for prompt in PROMPTS]
    answers = adapter.generate_until(requests("generate_until", *((prompt, settings) for prompt in prompts)))
    assert answers == [greedy_text(prompt) for prompt in prompts]
    assert 0 < len(answers[0]) < NEW_TOKENS


BAD: dict[str, tuple[list[str], str]] = {
    "nothing to evaluate on": (["--load", "EXPORT"], r"--data-path --text-file --tasks is missing"),
    "two texts": (
        ["--load", "EXPORT", "--data-path", "DATA", "--text-file", "TEXT"],
        r"--text-file and --data-path: give one of them",
    ),
    "model missing": (["--load", "absent", "--text-file", "TEXT"], r"absent is neither a checkpoint"),
    "data missing": (["--load", "EXPORT", "--data-path", "absent"], r"absent\.(bin|idx).* not found"),
    "text missing": (["--load", "EXPORT", "--text-file", "absent"], r"--text-file absent cannot be read"),
    "text empty": (["--load", "EXPORT", "--text-file", "EMPTY"], r"--text-file .*has 0 token\(s\).* longer text"),
    "text not UTF-8": (["--load", "EXPORT", "--text-file", "LATIN"], r"--text-file .* cannot be read as UTF-8"),
    "data of one token": (["--load", "EXPORT", "--data-path", "SINGLE"], r"--data-path .* with 1 tokens; at least 2"),
    "data of other tokens": (["--load", "EXPORT", "--data-path", "WIDE"], r"holds token id 300"),
    "empty split": (["--load", "EXPORT", "--data-path", "DATA", "--split", "1,0,0"], r"--split 1,0,0 is 0 of 5 doc"),
    "split that is none": (["--load", "EXPORT", "--data-path", "DATA", "--split", "a"], r"--split 'a' is not a split"),
    "split of a text": (["--load", "EXPORT", "--text-file", "TEXT", "--split", "1,1"], r"--split goes with --data-pat"),
    "stride 0": (["--load", "EXPORT", "--text-file", "TEXT", "--stride", "0"], r"--stride 0: must be at least 1"),
    "stride": (["--load", "EXPORT", "--text-file", "TEXT", "--stride", "33"], r"--stride 33 exceeds --seq-length 32"),
    "length": (["--load", "EXPORT", "--text-file", "TEXT", "--seq-length", "33"], r"--seq-length 33 exceeds .* 32"),
    "batch size": (["--load", "EXPORT", "--text-file", "TEXT", "--batch-size", "0"], r"--batch-size 0: must be"),
    "output": (["--load", "EXPORT", "--text-file", "TEXT", "--output", "no/out"], r"--output no/out cannot be written"),
    "limit of a text": (["--load", "EXPORT", "--text-file", "TEXT", "--limit", "2"], r"--limit goes with --tasks"),
    "no task folder": (
        ["--load", "EXPORT", "--tasks", "a", "--include-path", "absent"],
        r"--include-path absent is not",
    ),
    "empty task": (["--load", "EXPORT", "--tasks", "a,,b"], r"--tasks 'a,,b': give names"),
    "task without data": (
        ["--load", "EXPORT", "--tasks", "broken", "--include-path", "TASKS"],
        r"--tasks broken: its definition or data cannot be read .*data_files",
    ),
    "no room": (
        ["--load", "EXPORT", "--tasks", "endless", "--include-path", "TASKS"],
        r"--tasks: 256 new tokens .* context is 32: set a smaller max_gen_toks",
    ),
}


@pytest.fixture(scope="module")
def bad_files(export: str, dataset: str, text_file: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("bad")
    (directory / "empty").write_bytes(b"")
    (directory / "latin").write_bytes(b"caf\xe9")
    folder = Path(write_tasks(directory))
    story = json.loads((folder / "tiny_story.yaml").read_text())
    (folder / "endless.yaml").write_text(json.dumps({**story, "task": "endless", "generation_kwargs": {"until": []}}))
    story["dataset_kwargs"]["data_files"] = {"test": str(directory / "absent.jsonl")}
    (folder / "broken.yaml").write_text(json.dumps({**story, "task": "broken"}))
    single = write_indexed_dataset(str(directory / "single"), [[5]], 257).prefix
    wide = write_indexed_dataset(str(directory / "wide"), [[5, 300]], 500).prefix
    return {
        "EXPORT": export,
        "DATA": dataset,
        "TEXT": text_file,
        "EMPTY": str(directory / "empty"),
        "SINGLE": single,
        "LATIN": str(directory / "latin"),
        "WIDE": wide,
        "TASKS": str(folder),
    }


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, bad_files: dict[str, str], capfd: pytest.CaptureFixture) -> None:
    flags, message = BAD[case]
    capfd.readouterr()
    try:
        code: object = evaluate_program.main([bad_files.get(flag, flag) for flag in flags])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    errors = capfd.readouterr().err
    assert code == 2, errors
    assert "Traceback" not in errors
    assert len(re.findall(r"scmoe evaluate: error: ", errors)) == 1 or "usage: " in errors, errors
    assert re.search(message, errors), errors


def test_an_unknown_task(bad_files: dict[str, str], capfd: pytest.CaptureFixture, monkeypatch: Any) -> None:
    """Without the index of all tasks that lm_eval brings, which takes it ten seconds to read."""
    from lm_eval.tasks import TaskManager

    class Small(TaskManager):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "include_defaults": False})

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Small)
    flags = ["--load", bad_files["EXPORT"], "--tasks", "tiny_choice,unheard_of", "--include-path", bad_files["TASKS"]]
    assert evaluate_program.main(flags) == 2
    errors = capfd.readouterr().err
    assert re.search(
        r"--tasks unheard_of: neither a task of lm_eval nor of yours; --include-path \S+ has broken, ", errors
    )


def test_without_lm_eval(export: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)  # an import of it fails
    assert evaluate_program.main(["--load", export, "--tasks", "hellaswag"]) == 2
    assert re.search(r'--tasks needs lm_eval: pip install "scmoe_ds\[eval\]"', capfd.readouterr().err)


def test_a_model_that_has_diverged(export: str, text_file: str, capfd: pytest.CaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(Scorer, "score", lambda self, rows: torch.full((len(rows), 2), float("nan")).double())
    assert evaluate_program.main(["--load", export, "--text-file", text_file]) == 2
    assert "the loss is nan" in capfd.readouterr().err
