"""Generation in one process: key/value cache, sampling, batches, endings, and the program's errors."""

from __future__ import annotations

import io
import json
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.distributed import environment_of_one
from scmoe_ds.engine import connect
from scmoe_ds.errors import GenerationError
from scmoe_ds.inference.generate import Completion, Request, TextGenerator
from scmoe_ds.inference.kv_cache import KeyValueCache
from scmoe_ds.inference.model import TrainedModel, load_model, serving_config
from scmoe_ds.inference.sampling import Sampling, allowed, choose
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.programs import generate as generate_program
from tests.helpers.exports import greedy, whole_model, write_export
from tests.helpers.settings import GPT2, LLAMA

CPU, FP32 = torch.device("cpu"), torch.float32
POST_NORM = replace(GPT2, norm_placement="post", residual_scale=0.7)
SECTIONS: dict[str, dict[str, Any]] = {
    "pos1": {"position": "pos1"},
    "pos2, then pos1": {"first_layer_position": "pos1"},
    "pos3, cg2": {"position": "pos3", "merge": "cg2"},
    "every block": {"moe_every": 1, "position": "pos1", "top_k": 2},
    "topk": {"architecture": "topk"},
    "shared_expert": {"architecture": "shared_expert"},
    "shared_expert, merged otherwise": {"architecture": "overlapped_shared_expert", "merge": "add"},
    "dgmoe": {"architecture": "dgmoe"},
}
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12], [4, 4], [6] * 20]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


def serve(path: Path, **options: Any) -> GPT:
    trained = TrainedModel.open(path)
    return load_model(trained, serving_config(trained.config), FP32, CPU, **options)


@pytest.mark.parametrize("settings", [GPT2, LLAMA, POST_NORM], ids=["gpt2", "llama", "post-norm"])
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())
def test_cached_logits_and_text(settings: GPTSettings, section: dict[str, Any], tmp_path: Path) -> None:
    """Token by token with the cache against whole forward passes, in a batch of different lengths."""
    reference = whole_model(settings, {"num_experts": 4, **section})
    model = serve(write_export(tmp_path / "export", reference))
    expected = [greedy(reference, prompt, 8) for prompt in PROMPTS]
    assert texts(TextGenerator(model, batch_size=3), GREEDY, 8) == [tokens for tokens, _ in expected]

    cache = KeyValueCache(model, len(PROMPTS), 48)
    cache.begin(len(PROMPTS))
    lengths = [len(prompt) for prompt in PROMPTS]
    padded = torch.tensor([prompt + [0] * (max(lengths) - len(prompt)) for prompt in PROMPTS])
    with torch.inference_mode(), cache.attached():
        hidden = model.hidden_states(padded, cache.positions(max(lengths)))
        cache.advance(lengths)
        found = [model.logits(hidden[torch.arange(len(PROMPTS)), torch.tensor(lengths) - 1])]
        for step in range(7):
            tokens = torch.tensor([tokens[step] for tokens, _ in expected])
            found.append(model.logits(model.hidden_states(tokens.unsqueeze(1), cache.positions(1))[:, 0]))
            cache.advance([1] * len(PROMPTS))
    for row, (_, logits) in enumerate(expected):
        close(torch.stack([each[row] for each in found]), logits, 1e-5)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def texts(generator: TextGenerator, sampling: Sampling, length: int = 12) -> list[list[int]]:
    return [completion.tokens for completion in generator.generate(PROMPTS, Request(length, sampling))]


def test_several_tokens_after_others(tmp_path: Path) -> None:
    """A cache takes more than one token at a time also when it is not empty."""
    reference = whole_model(LLAMA, {"num_experts": 4})
    model = serve(write_export(tmp_path / "export", reference))
    tokens = torch.randint(384, (2, 14), generator=torch.Generator().manual_seed(1))
    cache = KeyValueCache(model, 2, 14)
    cache.begin(2)
    parts = []
    with torch.inference_mode(), cache.attached():
        for part in tokens.split([5, 6, 3], dim=1):
            parts.append(model.logits(model.hidden_states(part, cache.positions(part.shape[1]))))
            cache.advance([part.shape[1]] * 2)
    whole = reference(tokens).logits
    assert whole is not None
    close(torch.cat(parts, 1), whole.detach(), 1e-5)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("models") / "export", whole_model(GPT2, {"num_experts": 4}))


def test_text_does_not_depend_on_the_batch(export: Path) -> None:
    model = serve(export)
    sampling = Sampling(0.9, top_k=50, top_p=0.95)
    alone = texts(TextGenerator(model, batch_size=1), sampling)
    assert texts(TextGenerator(model, batch_size=2), sampling) == alone
    assert texts(TextGenerator(model, batch_size=8), sampling) == alone
    assert texts(TextGenerator(model, batch_size=8), Sampling(0.9, 50, 0.95, seed=7)) != alone
    generator = TextGenerator(model, batch_size=4)
    assert texts(generator, sampling) == alone == texts(generator, sampling)  # the cache is used again


def test_sampling_against_the_definition() -> None:
    logits = torch.tensor([[2.0, 1.0, 3.0, -1.0, 0.5]])
    weights = torch.softmax(logits[0].double() / 0.7, 0)
    kept = [2, 0, 1]  # of top-k 3
    chances, tokens = allowed(logits, Sampling(0.7, top_k=3))
    assert tokens[0, :3].tolist() == kept
    close(chances[0, :3].double(), weights[kept] / weights[kept].sum(), 1e-6)
    assert chances[0, 3:].eq(0).all()
    chances, tokens = allowed(logits, Sampling(0.7, top_p=0.8))
    assert weights[2] < 0.8 < weights[2] + weights[0]  # the token that reaches top_p is still in
    assert chances[0, :2].gt(0).all() and chances[0, 2:].eq(0).all()
    chances, _ = allowed(logits, Sampling(0.7, top_p=0.1))
    assert chances[0, 0] > 0 and chances[0, 1:].eq(0).all()


def test_frequencies_of_sampled_tokens() -> None:
    logits = torch.tensor([2.0, 1.0, 3.0, -1.0, 0.5]).repeat(4000, 1)
    sampling = Sampling(1.3)
    generators = [sampling.generator(number) for number in range(4000)]
    found = choose(logits, sampling, generators).bincount(minlength=5) / 4000
    assert (found - torch.softmax(logits[0] / 1.3, 0)).abs().max() < 0.03
    assert choose(logits[:2], Sampling(0), generators).tolist() == [2, 2]
    for _ in range(50):
        assert int(choose(logits[:1], Sampling(5.0, top_k=2), generators[:1])) in (0, 2)


def test_the_least_temperature_is_greedy() -> None:
    """Logits over 1e-40 are infinite."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [-4.0, -6.0, -5.0]])
    generators = [torch.Generator() for _ in logits]
    for temperature in (0.0, 1e-40, 1e-300, 1e-12):
        assert choose(logits, Sampling(temperature=temperature), generators).tolist() == [1, 0]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}]
)
def test_sampling_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="--" + next(iter(wrong)).replace("_", "-")):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_endings(export: Path) -> None:
    generator = TextGenerator(serve(export), batch_size=4)
    prompt = [3, 1, 4]
    (whole,) = generator.generate([prompt], Request(10, GREEDY))
    assert whole.ended == "length" and len(whole.tokens) == 10
    first = whole.tokens.index(whole.tokens[3])
    (ended,) = generator.generate([prompt], Request(10, GREEDY, end=(383, whole.tokens[3])))
    assert ended == Completion(0, whole.tokens[: first + 1], "", "stop")
    long = [5] * 45
    both = generator.generate([prompt, long], Request(10, GREEDY))
    assert both[0].tokens == whole.tokens and both[1].ended == "context" and len(both[1].tokens) == 3
    limited = generator.generate([prompt], Request(10, Sampling(5.0), vocab_size=7))
    assert max(limited[0].tokens) < 7


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "prompt 2 is empty"), ([1] * 48, "has 48 tokens.*at most 47"), ([384], "outside of the model's vocabulary")],
)
def test_prompts_that_cannot_be(export: Path, prompt: list[int], words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        TextGenerator(serve(export)).generate([[1], prompt], Request(2))


def test_no_autograd_and_no_growth(tmp_path: Path) -> None:
    """200 tokens: nothing of a step is kept (a step's logits alone would be 26 MB over the last 150)."""
    settings = GPTSettings(2, 64, 4, 44032, 256)
    generator = TextGenerator(serve(write_export(tmp_path / "export", whole_model(settings, {"num_experts": 2}))))
    resident: list[int] = []

    def note(completion: Completion) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * resource.getpagesize())

    generator.generate([[1, 2]], Request(200, GREEDY), note)
    assert len(resident) == 200 and resident[-1] - resident[49] < 4 << 20
    cached = generator.passes._cache
    assert cached is not None and cached.nbytes == 2 * 2 * 202 * 64 * 4
    assert not any(parameter.requires_grad for parameter in generator.model.parameters())


def run_program(*flags: str) -> int:
    return generate_program.main([str(flag) for flag in flags])


def test_program(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    common = ("--load", str(export), "--max-new-tokens", "12", "--temperature", "0")
    assert run_program(*common, "--prompt", "ab") == 0
    first = capsys.readouterr()
    assert first.out.startswith("ab") and "prefill 2 tokens" in first.err and "ms per step" in first.err
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"ab\r\nsec\x0cond\n")  # Python, not a text editor, ends a line at a form feed
    assert run_program(*common, "--prompt-file", str(file)) == 0
    assert (out := capsys.readouterr().out).startswith(first.out)  # the same text in a batch as alone
    assert out[len(first.out) :].startswith("sec\x0cond")
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n\n" + "x" * 60 + "\nab\n"))
    assert run_program(*common, "--interactive") == 0
    talked = capsys.readouterr()
    assert talked.out == first.out * 2 and "the model's context is 48" in talked.err


def test_a_stream_prints_what_is_certain(capsys: pytest.CaptureFixture[str]) -> None:
    stream = generate_program._Stream(">")
    for text in ("", "a", "a", "ab\n"):
        stream(Completion(0, text=text))
        assert capsys.readouterr().out.endswith(text[1:])
    stream.end(Completion(0, text="ab\nc", ended="stop"))
    assert capsys.readouterr().out == "c\n"


BAD: list[tuple[list[str], str]] = [
    ([], "there is nothing to go on from"),
    (["--prompt", ""], "prompt 1 is empty"),
    (["--prompt", "x" * 48], "prompt 1 has 48 tokens"),
    (["--prompt", "a", "--top-p", "2"], "--top-p 2.0: must be"),
    (["--prompt", "a", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
    (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    (["--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt cannot be read"),
    (["--prompt", "a", "--load", "nowhere"], "nowhere is neither a checkpoint nor"),
    (["--prompt", "a", "--moe-expert-parallel-size", "3"], "expert_parallel_size = 3"),
    (["--prompt", "a", "--moe-expert-parallel-size", "2"], "must divide the world size 1"),
    (["--prompt", "a", "--tensor-model-parallel-size", "2"], "must divide the world size 1"),
    (["--prompt", "a", "--stop", ""], "--stop '': is empty"),
    (["--prompt", "a\udcff"], r"--prompt 'a\\udcff': is not UTF-8 text at character 2"),
    (["--prompt", "a", "--stop", "\udcff"], r"--stop '\\udcff': is not UTF-8 text at character 1"),
    (["--prompt", "a", "--top-k", "-1"], "--top-k -1: must be at least 0"),
    (["--prompt", "a", "--temperature", "nan"], "--temperature nan: must be at least 0"),
    (["--prompt", "a", "--distributed-timeout-minutes", "nan"], "--distributed-timeout-minutes nan: must be above 0"),
    (["--prompt", "a", "--distributed-timeout-minutes", "1e300"], "must be above 0 and at most 1000000"),
    (["--prompt", "a", "--expert-cache", "4"], "--expert-cache goes with --experts offload"),
    (["--prompt", "a", "--expert-tier", "disk"], "--expert-tier goes with --experts offload"),
    (["--prompt", "a", "--experts", "offload", "--expert-tier", "host"], "--expert-tier host: is memory beside a GPU"),
    (["--prompt", "a", "--experts", "offload", "--expert-cache", "9" * 5000], "999: must be a number of experts"),
    (["--prompt", "a", "--experts", "offload", "--expert-cache", "much"], "--expert-cache much: must be a number"),
    (["--prompt", "a", "--experts", "offload", "--expert-cache", "1KB"], "has no room for one expert"),
    (
        ["--prompt", "a", "--experts", "offload-async", "--expert-cache", "1"],
        "--expert-cache 1: --experts offload-async keeps 2 experts at once; give 2 or more",
    ),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=[" ".join(flags)[:40] for flags, _ in BAD])
def test_bad_input(export: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [] if "--load" in flags else ["--load", str(export)]
    assert run_program(*given, *flags) == 2
    message = capsys.readouterr().err
    if message.startswith("loading "):  # says which checkpoint it is about
        message = message.split("\n", 1)[1]
    assert message.startswith("scmoe generate: error: ") and words in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "1e-45"],
        ["--temperature", "1e-300"],
        ["--top-p", "1e-300"],
        ["--top-k", "1"],
        ["--temperature", "5e-324", "--top-p", "1e-45", "--top-k", "3"],
    ],
)
def test_limits_of_sampling_are_the_most_likely_token(
    export: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--load", str(export), "--prompt", "ab", "--max-new-tokens", "9")
    assert run_program(*common, "--temperature", "0") == 0
    greedy = capsys.readouterr().out
    assert run_program(*common, *flags) == 0
    assert capsys.readouterr().out == greedy


def test_other_limits_of_sampling(export: Path) -> None:
    common = ("--load", str(export), "--prompt", "ab", "--max-new-tokens", "2")
    for flags in (
        ["--temperature", "1e300"],
        ["--top-k", "999999999"],
        ["--seed", "-1"],
        ["--seed", "9" * 9],
        ["--max-new-tokens", "9" * 9, "--stop", "a"],
        ["--batch-size", "9" * 9],
    ):
        assert run_program(*common, *flags) == 0, flags


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    model = whole_model(GPTSettings(2, 16, 2, 384, 16), {"num_experts": 2})
    with torch.no_grad():
        model.embedding.weight.fill_(value)
    path = str(write_export(tmp_path / "export", model))
    for flags in ([], ["--temperature", "0"]):
        assert run_program("--load", path, "--prompt", "a", *flags) == 2
        assert "the logits are not finite" in capsys.readouterr().err


def test_bytes_that_are_not_utf8_in_a_talk(export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\nab\n"), encoding="utf-8"))
    assert run_program("--load", str(export), "--interactive", "--max-new-tokens", "2", "--temperature", "0") == 0
    said = capsys.readouterr()
    assert said.out.startswith("ab") and r"prompt> 'a\\udcff': is not UTF-8 text" in said.err


def test_another_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = write_export(tmp_path / "export", whole_model(GPTSettings(2, 16, 2, 128, 16), {"num_experts": 2}))
    assert run_program("--load", str(small), "--prompt", "a") == 2
    assert "ByteTokenizer has 257 tokens, the model of --load" in capsys.readouterr().err


def test_damaged_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_export(tmp_path / "export", whole_model(GPTSettings(2, 16, 2, 384, 16), {"num_experts": 2}))
    description = path / "config.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"x": 1}))
    assert run_program("--load", str(path), "--prompt", "a") == 2
    assert "config.json has" in capsys.readouterr().err


def test_interrupt(export: Path) -> None:
    """Ctrl-C in the middle of a text: 130, one line, and nothing left behind."""
    # The shell that runs the tests may ignore SIGINT, and a child would inherit that.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from scmoe_ds.programs import generate; sys.exit(generate.main())"
    )
    command = [sys.executable, "-c", code, "--load", str(export), "--interactive", "--max-new-tokens", "40"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment_of_one()
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"ab\n")
    process.stdin.flush()
    while b"ab" not in process.stdout.readline():
        assert process.poll() is None, process.stderr and process.stderr.read()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"interrupted" in errors and b"Traceback" not in errors
