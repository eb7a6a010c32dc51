"""Surgery on Hugging Face directories: what is in the files, what they compute, and who can read them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lab.moe_families import TOP_K, VOCABULARY, tiny
from scmoe_ds.checkpoint.adapted.dense import DenseDirectory, as_moe
from scmoe_ds.checkpoint.adapted.surgery import adapt_hugging_face
from scmoe_ds.checkpoint.adapted.text import TextSettings, trained_model
from scmoe_ds.errors import UserError
from scmoe_ds.programs.flags.adapt import build_parser, check
from scmoe_ds.replace.modeling_adapted import install

ALONE = """
import sys
sys.modules["scmoe_ds"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise SystemExit("a model without its code")
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    expected = torch.load(f"{directory}/expected.pt")
    tokens = expected["tokens"]
    assert (model(input_ids=tokens, use_cache=False).logits - expected["logits"]).abs().max() <= 1e-5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        losses.append(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5, losses
    model.save_pretrained(f"{directory}/trained")
    again = AutoModelForCausalLM.from_pretrained(f"{directory}/trained", trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)
print("all read")
"""
TEXT = "the shortcut reads the block before the block reads the experts and the router routes the tokens " * 9


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of trained models, by family, and a text."""
    root = tmp_path_factory.mktemp("sources")
    for family in ("qwen3_moe", "mixtral", "deepseek_v3"):
        more = {"first_k_dense_replace": 1, "num_hidden_layers": 3} if family == "deepseek_v3" else {}
        model = tiny(family, **more)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
        model.save_pretrained(root / family)  # type: ignore[operator]
        tokenizer().save_pretrained(root / family)
    (root / "text.txt").write_text(TEXT)
    return root


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["?", *sorted(set(TEXT.split()))])}
    found = Tokenizer(models.WordLevel(words, unk_token="?"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, unk_token="?")


def weights_of(directory: Path) -> dict[str, Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def loaded(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))


def test_a_directory_computes_the_scmoe_and_trains_where_this_package_is_not(sources: Path, tmp_path: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "qwen3_moe": {"join": "late", "shared_expert": "mean", "layers": [1], "top_k": 2},
        "mixtral": {"shared_expert": "mean", "merge": "cg2"},
        "deepseek_v3": {"first_layer_position": "pos2", "merge": "cg1"},
    }
    for family, fields in cases.items():
        out = tmp_path / family
        adapt_hugging_face(sources / family, out, fields)
        before, after = weights_of(sources / family), weights_of(out)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert all(".shortcut." in name for name in after.keys() - before.keys())
        assert {file.name for file in sources.joinpath(family).glob("[tg]*")} <= {file.name for file in out.iterdir()}
        model = loaded(sources / family)
        install(model, json.loads((out / "config.json").read_text())["scmoe"])
        missing = model.load_state_dict({n: v for n, v in after.items() if ".shortcut." in n}, strict=False)
        assert not missing.unexpected_keys and not any(".shortcut." in name for name in missing.missing_keys)
        logits = model(input_ids=tokens(), use_cache=False).logits.detach()
        torch.save({"tokens": tokens(), "logits": logits}, out / "expected.pt")
    command = [sys.executable, "-c", ALONE, *(str(tmp_path / family) for family in cases)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.stdout.endswith("all read\n"), done.stderr[-2000:]
    for family in cases:
        assert weights_of(tmp_path / family / "trained").keys() == weights_of(tmp_path / family).keys()


def test_no_converted_layer_is_the_source_bit_for_bit(sources: Path, tmp_path: Path) -> None:
    adapt_hugging_face(sources / "qwen3_moe", tmp_path / "out", {"layers": []})
    found = loaded(tmp_path / "out")(input_ids=tokens()).logits
    assert torch.equal(found, loaded(sources / "qwen3_moe")(input_ids=tokens()).logits)


def test_the_new_weights_are_the_norm_of_the_moe_the_mean_and_the_busiest_expert(sources: Path, tmp_path: Path) -> None:
    text = TextSettings(sources / "text.txt", seq_length=16, batch_size=3)
    source = loaded(sources / "qwen3_moe")
    ids = torch.tensor(tokenizer()(TEXT)["input_ids"])
    ids = ids[: len(ids) // 16 * 16].view(-1, 16)
    output = source(input_ids=ids, labels=ids, output_router_logits=True)
    for kind in ("mean", "busiest"):
        said = adapt_hugging_face(sources / "qwen3_moe", tmp_path / kind, {"shared_expert": kind}, text=text)
        found = weights_of(tmp_path / kind)
        for number, logits in enumerate(output.router_logits):
            begin = f"model.layers.{number}."
            chosen = logits.topk(TOP_K).indices.flatten().bincount(minlength=logits.shape[1])
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                every = torch.stack([found[f"{begin}mlp.experts.{each}.{matrix}.weight"] for each in range(8)])
                expected = every.mean(0) if kind == "mean" else every[chosen.argmax()]
                new = found[f"{begin}shortcut.shared_expert.{matrix}.weight"]
                assert torch.allclose(new, expected, rtol=1e-6, atol=1e-8)
            norm = found[f"{begin}post_attention_layernorm.weight"]
            assert torch.equal(found[f"{begin}shortcut.norm.weight"], norm)
            bias = found[f"{begin}shortcut.coefficient.bias"]
            assert (
                torch.sigmoid(bias).item() == pytest.approx(0.05)
                and not found[f"{begin}shortcut.coefficient.weight"].any()
            )
        adapted = loaded(tmp_path / kind)
        after = adapted(input_ids=ids, labels=ids).loss.item()
        plain = source(input_ids=ids, labels=ids).loss.item()
        assert f"({ids.numel()} tokens): {plain:.4f} before, {after:.4f} after surgery" in said[-1]


@pytest.mark.parametrize("merge", ["add", "cg1", "cg2"])
def test_a_fitted_shared_expert_makes_up_for_the_moved_tap(sources: Path, tmp_path: Path, merge: str) -> None:
    """The first layer's, by least squares on what hooks of the source and of the mean's model see."""
    source, text = sources / "qwen3_moe", TextSettings(sources / "text.txt", seq_length=16)
    fields = {"merge": merge, "layers": [0], "shared_expert": "fit"}
    adapt_hugging_face(source, tmp_path / "fit", fields, text=text)
    model, seen = loaded(tmp_path / "fit"), {}
    block = model.model.layers[0]
    block.post_attention_layernorm.register_forward_hook(lambda _, args, output: seen.update(hidden=output))
    block.mlp.experts.register_forward_hook(lambda _, args, output: seen.update(routed=output))
    ids = torch.tensor(tokenizer()(TEXT)["input_ids"])
    model(input_ids=ids[: len(ids) // 16 * 16].view(-1, 16), use_cache=False)
    hidden, routed, parts = seen["hidden"].flatten(0, 1), seen["routed"], block.shortcut
    old = loaded(source).model.layers[0].mlp(seen["hidden"]).flatten(0, 1)
    of_shared, of_routed = {"add": (1.0, 1.0), "cg1": (0.5, 1.0), "cg2": (0.2, 0.8)}[merge]
    if merge != "add":
        logits = parts.coefficient(hidden)
        found = logits.sigmoid() if merge == "cg1" else logits.softmax(-1)
        expected = torch.tensor([[of_shared]] if merge == "cg1" else [[of_routed, of_shared]])
        assert torch.allclose(found, expected.expand_as(found), atol=1e-6)
    shared = parts.shared_expert
    gate, up = shared.gate_proj(hidden), shared.up_proj(hidden)
    inner = (of_shared * torch.nn.functional.silu(gate) * up).double()
    missing = (old - of_routed * routed.view_as(old)).double()
    ridge = 1e-3 * (inner**2).sum(0).mean()
    rows = torch.cat([inner, ridge.sqrt() * torch.eye(inner.shape[1], dtype=torch.float64)])
    solution = torch.linalg.lstsq(
        rows, torch.cat([missing, missing.new_zeros(inner.shape[1], missing.shape[1])])
    ).solution
    weight = shared.down_proj.weight.double()
    assert (weight - solution.t()).abs().max() <= 1e-3 * solution.abs().max()
    adapt_hugging_face(source, tmp_path / "mean", {**fields, "shared_expert": "mean"})
    mean = loaded(tmp_path / "mean").model.layers[0].shortcut.shared_expert
    assert torch.equal(mean.gate_proj.weight, shared.gate_proj.weight)


def test_a_dtype_is_that_of_all_weights_but_the_routers_bias(sources: Path, tmp_path: Path) -> None:
    adapt_hugging_face(sources / "deepseek_v3", tmp_path / "out", {}, torch.bfloat16)
    for name, value in weights_of(tmp_path / "out").items():
        is_bias = name.endswith("e_score_correction_bias")
        assert value.dtype == (torch.float32 if is_bias else torch.bfloat16), name


SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "more", "every"),
    [
        ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}, 1),
        ("Mistral", {"sliding_window": 4}, 1),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, 1),
        ("Qwen3", {"head_dim": 8}, 2),
    ],
)
def test_the_moe_sibling_of_a_dense_model_computes_the_same(
    family: str, more: dict[str, Any], every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dense = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SHAPE, **more))
    dense.save_pretrained(tmp_path / "dense")
    expected = dense(input_ids=tokens()).logits
    for noise in (0.0, 0.1):
        DenseDirectory(tmp_path / "dense", 4, 2, every, noise).write(tmp_path / f"moe{noise}")
        moe = loaded(tmp_path / f"moe{noise}")
        assert sum(hasattr(layer.mlp, "experts") for layer in moe.model.layers) == 2 // every
        worst = (moe(input_ids=tokens()).logits - expected).abs().max()
        assert worst < 1e-6 if noise == 0 else worst > 1e-4
    position = "pos1" if every == 1 else "pos2"
    monkeypatch.chdir(tmp_path / "dense")
    with as_moe(Path(), tmp_path / "out", {"position": position, "top_k": 1}, 4, 0.0) as moe:
        adapt_hugging_face(moe, tmp_path / "out", {"position": position})
    assert loaded(tmp_path / "out").model.layers[-1].mlp.gate.top_k == 1


def test_what_cannot_be_adapted_is_one_sentence(sources: Path, tmp_path: Path) -> None:
    source, out = sources / "qwen3_moe", tmp_path / "out"
    adapt_hugging_face(source, tmp_path / "done", {})
    for name in ("dense", "pickles", "many", "empty", "damaged", "olmo2", "other", "fp8"):
        (tmp_path / name).mkdir()
    transformers.LlamaConfig(**SHAPE).save_pretrained(tmp_path / "dense")
    transformers.GPT2Config().save_pretrained(tmp_path / "other")
    transformers.FlexOlmoConfig(**SHAPE, num_experts=4, pad_token_id=None).save_pretrained(tmp_path / "olmo2")
    for name in ("dense", "olmo2", "other"):
        shutil.copy(source / "model.safetensors", tmp_path / name)
    for name in ("pickles", "damaged"):
        shutil.copy(source / "config.json", tmp_path / name)
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"x" * 20)
    (tmp_path / "fp8" / "config.json").write_text('{"model_type": "deepseek_v3", "quantization_config": {}}')
    (tmp_path / "many" / "config.json").write_text('{"model_type": "qwen3_5_moe", "text_config": {}}')
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "done", {}, "is adapted already; name the model that it was made of"),
        (tmp_path / "nowhere", {}, "holds no config.json"),
        (tmp_path / "empty", {}, "holds no config.json"),
        (tmp_path / "pickles", {}, "its weights are pickles"),
        (tmp_path / "damaged", {}, "cannot be read"),
        (tmp_path / "many", {}, "is more than a language model"),
        (tmp_path / "dense", {}, "LlamaForCausalLM has no MoE layer"),
        (tmp_path / "olmo2", {}, "a shortcut needs a pre-norm model"),
        (source, {"position": "pos2"}, "nothing precedes it"),
        (source, {"layers": [2]}, "there is no MoE layer 2; the model has 0 … 1"),
        (source, {"layers": [0, 0]}, "name each MoE layer once"),
        (source, {"merge": "cg2"}, "has no shared expert"),
        (source, {"top_k": 4}, "routes a token to 3 experts; use 1 … 3"),
        (source, {"shared_expert": "busiest"}, "busiest: is measured on text"),
        (source, {"shared_expert": "fit"}, "fit: is measured on text"),
        (tmp_path / "fp8", {}, "its weights are quantized"),
        (sources / "deepseek_v3", {"shared_expert": "mean"}, "has a shared expert already"),
    ]
    for path, fields, text in cases:
        with pytest.raises(UserError) as caught:
            adapt_hugging_face(path, out, fields)
        assert text in str(caught.value) and "\n" not in str(caught.value), (path.name, str(caught.value))
        assert not out.exists() and not out.with_name("out.partial").exists()
    with pytest.raises(UserError, match="is not empty"):
        adapt_hugging_face(source, tmp_path / "done", {})
    (tmp_path / "packed").mkdir()
    transformers.LlamaConfig(**SHAPE, quantization_config={"quant_method": "fp8"}).save_pretrained(tmp_path / "packed")
    dense_cases: list[tuple[Path, int | None, str]] = [
        (tmp_path / "dense", None, "--experts N makes"),
        (tmp_path / "other", 4, "moe_from_dense makes MoE layers"),
        (tmp_path / "packed", 4, "its weights are quantized"),
        (source, 4, r"--experts 4: .* is a qwen3_moe, and only llama.* remove the flag for a model with an MoE"),
    ]
    (tmp_path / "file").write_text("")
    transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "real")
    with (
        pytest.raises(UserError, match="the weights were not written"),
        as_moe(tmp_path / "real", tmp_path / "file" / "out", {}, 2, 0.0),
    ):
        pass
    for path, experts, text in dense_cases:
        with pytest.raises(UserError, match=text), as_moe(path, out, {}, experts, 0.0):
            pass


def test_what_a_text_cannot_measure_is_one_sentence_before_anything_is_measured(sources: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", TextSettings(sources / "text.txt", seq_length=16)
    words = shutil.copytree(sources / "qwen3_moe", tmp_path / "words")
    (words / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="has no tokenizer for --text-file"):
        adapt_hugging_face(words, out, {}, text=text)
    (words / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="words: transformers does not load it"):
        trained_model(words)
    for flags, said in (
        (["--output", str(words)], "words: is not empty; name another directory"),
        (["--output", str(sources / "text.txt")], "text.txt: is not empty; name another directory"),
        (["--output", str(out), "--noise", "0.1"], "--noise 0.1: is for the experts that --experts makes"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            check(build_parser().parse_args([str(words), *flags]))
