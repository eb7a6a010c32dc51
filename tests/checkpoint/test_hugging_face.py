"""An export for transformers: the class that it carries computes what the GPT does, trained and generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from scmoe_ds.checkpoint.description import BINDING_SECTION_FIELDS, describe_model
from scmoe_ds.checkpoint.export import export, open_weights
from scmoe_ds.checkpoint.hugging_face import _OF_SECTION, describe_for_transformers
from scmoe_ds.checkpoint.parsing import Parsed
from scmoe_ds.checkpoint.safetensors_files import write_weights
from scmoe_ds.checkpoint.tokenizer_files import carried_files, describe, record
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.hugging_face_tokenizer import HuggingFaceTokenizer
from scmoe_ds.data.tokenizer import ByteTokenizer, GPT2BPETokenizer, Tokenizer
from scmoe_ds.engine import connect
from scmoe_ds.errors import CheckpointError
from scmoe_ds.inference.generate import Request, TextGenerator
from scmoe_ds.inference.sampling import Sampling
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.swin_settings import SwinSettings
from scmoe_ds.programs.convert import main
from tests.helpers.exports import whole_model, write_export

TOKENS = torch.randint(257, (3, 12), generator=torch.Generator().manual_seed(3))
LLAMA: dict[str, Any] = dict(
    normalization="RMSNorm",
    swiglu=True,
    position_embedding="rope",
    rotary_base=500.0,
    add_bias_linear=False,
    tie_embeddings=False,
    num_key_value_heads=2,
    ffn_hidden_size=24,
)
DEEPSEEK = dict(
    score_func="softmax",
    route_norm=False,
    num_expert_groups=4,
    num_limited_groups=2,
    group_score_func="max",
    load_balance_coeff=0.001,
)
IN_PART = {
    "adapt": {"base": {"architecture": "overlapped_shared_expert", "top_k": 2, "merge": "cg2"}, "layers": [2, 0]},
    **dict(join="late", position="pos1", moe_every=1),
}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, dict(position="pos1", merge="add", shortcut_norm="shared")),
    ({}, dict(position="pos3", first_layer_position="pos1", merge="cg2", post_norm=True, top_k=2, num_experts=[4, 6])),
    (LLAMA, dict(moe_every=1, position="pos1", top_k=3, gate_softmax="chosen")),
    (LLAMA, dict(moe_every=4, shortcut_distance=2, gate_softmax="kept", top_k=2)),
    (dict(norm_placement="post", residual_scale=0.5), dict(shortcut_norm="shared", top_k=2, gate_softmax="all")),
    ({}, dict(architecture="dgmoe")),
    (LLAMA, dict(architecture="dgmoe", position="pos1", pairs_per_moe=2)),
    (LLAMA, dict(architecture="topk")),
    ({}, dict(architecture="shared_expert", merge="add")),  # DeepSpeed's layer merges by cg2 whatever this says
    ({}, dict(architecture="pipelined_topk", top_k=3)),
    (LLAMA, dict(architecture="overlapped_shared_expert", merge="cg1", shortcut_norm="own")),
    ({}, dict(join="late", merge="cg2", post_norm=True, position="pos3")),
    (dict(residual_scale=0.5, **LLAMA), dict(join="late", position="pos1", moe_every=1, top_k=2)),
    ({}, dict(join="late", architecture="dgmoe")),
    ({}, dict(top_k=2, router=dict(score_func="sigmoid", route_scale=2.5, load_balance_coeff=0.0))),
    (
        LLAMA,
        dict(top_k=3, num_experts=8, router=DEEPSEEK, moe_ffn_hidden_size=8, moe_shared_expert_intermediate_size=40),
    ),
    ({}, IN_PART),
    (
        LLAMA,
        dict(router=dict(score_func="sigmoid"), top_k=1, adapt={"base": {"top_k": 3}, "layers": [1]}),
    ),
]


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


def make(directory: Path, style: dict[str, Any], section: dict[str, Any]) -> tuple[GPT, Any, Path]:
    """A model, and transformers' of its export."""
    model = whole_model(GPTSettings(4, 32, 4, 384, 24, **style), {"num_experts": 4, **section})
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.uniform_(-0.5, 0.5)
    write_export(directory / "scmoe", model)
    export(directory / "scmoe", directory / "hf", for_transformers=True)
    return model, load(directory / "hf"), directory / "hf"


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Any, Path]:
    return make(tmp_path_factory.mktemp("llama"), LLAMA, {"top_k": 2})


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("case", range(len(CASES)))
def test_logits_loss_and_gradients_are_those_of_the_gpt(case: int, tmp_path: Path) -> None:
    model, hf, _ = make(tmp_path, *CASES[case])
    logits = model(TOKENS).logits
    torch.testing.assert_close(hf(TOKENS).logits, logits, atol=1e-5, rtol=1e-5)
    mask = torch.ones_like(TOKENS)
    mask[:, -1] = 0
    expected = model(TOKENS, labels=TOKENS.roll(-1, 1), loss_mask=mask)
    evaluated, trained = hf(TOKENS, labels=TOKENS).loss, hf.train()(TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(evaluated, expected.lm_loss)  # what perplexity is computed from
    torch.testing.assert_close(trained, expected.loss)
    found, own = gradients(hf, trained), gradients(model, expected.loss)
    assert own.keys() == found.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-4)


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[7] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return tokens, mask


@pytest.mark.parametrize("style, section", [(LLAMA, {"top_k": 2}), ({}, {"architecture": "dgmoe"}), ({}, IN_PART)])
def test_batches_with_padding_generate_what_scmoe_generate_does(
    style: dict[str, Any], section: dict[str, Any], tmp_path: Path
) -> None:
    model, hf, _ = make(tmp_path, style, section)
    prompts = [[5, 17, 200], [9], [1, 2, 3, 4, 5, 6, 250]]
    own = TextGenerator(model).generate(prompts, Request(10, Sampling(0), end=(256,), vocab_size=257))
    tokens, mask = left_padded(prompts)
    for cache in (True, False):
        whole = hf.generate(tokens, attention_mask=mask, max_new_tokens=10, do_sample=False, use_cache=cache)
        for row, completion in zip(whole[:, tokens.shape[1] :].tolist(), own, strict=True):
            assert row[: len(completion.tokens)] == completion.tokens
            assert set(row[len(completion.tokens) :]) <= {256}  # padding behind an end
    beams = hf.generate(tokens, attention_mask=mask, max_new_tokens=4, num_beams=3)  # reorders the cache
    assert beams.shape == (3, tokens.shape[1] + 4)


def test_padding_changes_no_token(llama: tuple[GPT, Any, Path]) -> None:
    _, hf, _ = llama
    rows = [[5, 17, 200], [1, 2, 3, 4, 5, 6, 250]]
    tokens, mask = left_padded(rows)
    alone = [hf(torch.tensor([row])) for row in rows]
    left, right = hf(tokens, attention_mask=mask), hf(tokens.flip(1), attention_mask=mask.flip(1))
    torch.testing.assert_close(left.logits[0, -3:], alone[0].logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right.logits[0, :3], hf(torch.tensor([rows[0][::-1]])).logits[0], atol=1e-5, rtol=1e-5)
    tokens[0, :4] = 300  # what stands there counts nowhere, in the balancing loss neither
    torch.testing.assert_close(hf(tokens, attention_mask=mask).aux_loss, left.aux_loss)


def test_recomputed_activations_give_the_same_gradients(llama: tuple[GPT, Any, Path]) -> None:
    hf = load(llama[2]).train()
    plain = gradients(hf, hf(TOKENS, labels=TOKENS).loss)
    hf.gradient_checkpointing_enable()
    calls = []
    handle = hf.runs[0].blocks[0].attention.register_forward_hook(lambda *_: calls.append(1))
    again = gradients(hf, hf(TOKENS, labels=TOKENS).loss)
    handle.remove()
    assert len(calls) == 2  # forward, and again in backward
    torch.testing.assert_close(again, plain)


def test_accumulated_micro_batches_weigh_the_balancing_loss_as_the_loss(llama: tuple[GPT, Any, Path]) -> None:
    """Trainer hands over the tokens of all micro-batches, and adds up the losses."""
    _, hf, _ = llama
    hf.train()
    labels = TOKENS.clone()
    labels[0, 4:] = -100
    items = (labels[:, 1:] != -100).sum()
    parts = [hf(TOKENS[row], labels=labels[row], num_items_in_batch=items) for row in (slice(0, 1), slice(1, 3))]
    shares = [3 / 25, 22 / 25]
    expected = sum(
        share * hf(TOKENS[row], labels=labels[row]).loss
        for share, row in zip(shares, (slice(0, 1), slice(1, 3)), strict=True)
    )
    torch.testing.assert_close(sum(part.loss for part in parts), expected)


def test_what_transformers_saves_it_loads(llama: tuple[GPT, Any, Path], tmp_path: Path) -> None:
    model, hf, _ = llama
    hf.eval().save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    again = load(tmp_path / "saved")
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-5)
    assert "scmoe" not in json.loads((tmp_path / "saved/config.json").read_text())
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True, dtype=torch.bfloat16)
    assert half(TOKENS).logits.dtype == torch.bfloat16


def test_the_tokenizer_comes_along(llama: tuple[GPT, Any, Path]) -> None:
    tokenizer, own, text = AutoTokenizer.from_pretrained(llama[2]), ByteTokenizer(), " Grüße,\r\n\t世界 🙂"
    assert tokenizer(text)["input_ids"] == own.tokenize(text)
    assert tokenizer.decode(own.tokenize(text)) == text
    assert (tokenizer.eos_token_id, len(tokenizer)) == (own.eod, own.vocab_size)


def test_gpt2s_tokenizer_comes_along(tmp_path: Path) -> None:
    from tokenizers.implementations import ByteLevelBPETokenizer

    text = "It's 12 o'clock, \t isn't it? Grüße\r\n 世界"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text] * 3, vocab_size=290, min_frequency=2, special_tokens=["<|endoftext|>"])
    bpe.save_model(str(tmp_path))
    own = GPT2BPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    export_with(own, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer(text)["input_ids"] == own.tokenize(text)
    assert len(own.tokenize(text)) < len(text.encode())  # it merges
    assert tokenizer.decode(own.tokenize(text)) == text
    assert tokenizer.eos_token_id == own.eod
    tokenizer.save_pretrained(tmp_path / "again")
    export_with(HuggingFaceTokenizer(str(tmp_path / "again")), tmp_path / "other")
    again = AutoTokenizer.from_pretrained(tmp_path / "other/hf")
    assert again(text)["input_ids"] == own.tokenize(text)


def export_with(tokenizer: Tokenizer, directory: Path) -> None:
    model = whole_model(GPTSettings(2, 8, 2, 384, 8), {"num_experts": 2})
    carried = carried_files(tokenizer)
    described = describe_model(model.settings, model.config) | {"tokenizer": record(describe(tokenizer), carried)}
    weights = [(name, lambda each=each: each.detach()) for name, each in sorted(model.named_parameters())]
    write_weights(directory / "scmoe", weights, described, torch.float32, 10**9, carried)
    export(directory / "scmoe", directory / "hf", for_transformers=True)


def test_every_field_of_a_checkpoint_has_its_place() -> None:
    """A field that this list does not know would be left out of config.json without a word."""
    elsewhere = {"architecture", "merge", "router"}
    elsewhere |= {"expert_partition"}  # refused
    assert {*BINDING_SECTION_FIELDS} <= {*_OF_SECTION.values()} | elsewhere


def test_a_swin_has_no_class_of_transformers() -> None:
    swin = SwinSettings(16, 4, 8, (1, 1, 2, 2), (1, 1, 2, 2), patch_size=1)
    with pytest.raises(CheckpointError, match="--format hf: the checkpoint is of a Swin"):
        describe_for_transformers(Parsed(swin, ScMoEConfig(), "fp32"), None)


def test_lm_eval_scores_the_directory(llama: tuple[GPT, Any, Path]) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, _, directory = llama
    texts = [("the", " shortcut"), ("a b", " c")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(texts)]
    harness = HFLM(pretrained=str(directory), trust_remote_code=True, device="cpu", batch_size=2)
    for (nats, _), (context, continuation) in zip(harness.loglikelihood(requests), texts, strict=True):
        ids = ByteTokenizer().tokenize(context + continuation)
        log_probability = model(torch.tensor([ids])).logits.log_softmax(-1)
        places = range(len(context), len(ids))
        assert nats == pytest.approx(sum(log_probability[0, at - 1, ids[at]].item() for at in places), abs=1e-4)


def test_the_command_writes_what_both_load(llama: tuple[GPT, Any, Path], tmp_path: Path) -> None:
    model, _, directory = llama
    assert main(["export", str(directory), str(tmp_path / "out"), "--format", "hf", "--shard-gb", "0.00002"]) == 0
    torch.testing.assert_close(load(tmp_path / "out")(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-5)
    weights, _ = open_weights(tmp_path / "out")
    assert torch.equal(weights.read("embedding.weight"), model.embedding.weight)
