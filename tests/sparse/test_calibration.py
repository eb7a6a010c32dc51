"""Neurons that are sorted compute the same, and thresholds that are calibrated drop what they say."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import Tensor

from scmoe_ds.data.text_file import read_text
from scmoe_ds.data.tokenizer import ByteTokenizer
from scmoe_ds.errors import ArgumentError, CheckpointError
from scmoe_ds.inference.model import TrainedModel, load_model, serving_config
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.programs import sparsify
from scmoe_ds.sparse.calibration import CalibratedLayer
from scmoe_ds.sparse.hugging_face_layers import FusedLayer, fused_layers
from scmoe_ds.sparse.importance import MEASURES, WITHOUT_W3, LayerSums
from scmoe_ds.sparse.own_layers import own_layers
from scmoe_ds.sparse.sparsity_file import Sparsity, digest_of, left_out
from tests.helpers.exports import whole_model, write_export

TEXT = "Half of the neurons do most of the work, and some of the choices hardly matter. " * 20
SHAPE: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "moe_intermediate_size": 12, "max_position_embeddings": 32, "num_experts_per_tok": 2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
DEEPSEEK = {**LATENT, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
FAMILIES: dict[str, Callable[[], Any]] = {
    "Qwen3-MoE": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SHAPE, num_experts=4, head_dim=8, norm_topk_prob=True)
    ),
    "Mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, num_local_experts=4)),
    "DeepSeek-V3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**{**SHAPE, "num_key_value_heads": 2}, **DEEPSEEK, routed_scaling_factor=2.5)
    ),
}
TOKENS = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def loaded(path: Path) -> Any:
    trained = TrainedModel.open(path)
    return load_model(trained, serving_config(trained.config), torch.float32, torch.device("cpu"))


def by_hand(sums: LayerSums, expert: int, gate_SF: Tensor, up_SF: Tensor | None) -> None:
    expected = {"gate": gate_SF, "abs-gate": gate_SF.abs()}
    if up_SF is not None:
        expected |= {"gate-up": gate_SF * up_SF, "abs-gate-up": (gate_SF * up_SF).abs()}
    assert sums.importance.keys() == expected.keys()
    for measure, values in expected.items():
        torch.testing.assert_close(sums.importance[measure][expert], values.double().sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_gpt_of_ours(tmp_path: Path, text: Path, swiglu: bool, top_k: int, capsys: Any) -> None:
    settings = GPTSettings(4, 16, 2, 260, 32, swiglu=swiglu)
    section = {"architecture": "scmoe", "position": "pos2", "num_experts": 4, "top_k": top_k}
    write_export(tmp_path / "export", whole_model(settings, section))
    out = tmp_path / "sparse"
    flags = ["--load", str(tmp_path / "export"), "--text-file", str(text), "--output", str(out), "--rate", "0.3"]
    measure = "abs-gate-up" if swiglu else "abs-gate"
    assert sparsify.main([*flags, "--measure", measure]) == 0
    told = capsys.readouterr().out
    assert f"wrote {out}: scmoe evaluate --load {out} --drop-rate 0.3" in told
    shares = [float(each) for each in re.findall(r"([\d.]+)%", told)]
    rates = [each for row in (shares[1:4], shares[4:7]) for each in row[:2]]  # of each layer, with 1T and 2T
    assert len(shares) == 7 and rates == pytest.approx([30] * 4, abs=1.5)
    before, after = loaded(tmp_path / "export"), loaded(out)
    with torch.no_grad():
        torch.testing.assert_close(after(TOKENS).logits, before(TOKENS).logits, rtol=1e-6, atol=1e-5)
    found = Sparsity.read(out)
    check_identity(found, own_layers(after))
    with pytest.raises(CheckpointError, match="the same in another order"):
        check_identity(found, own_layers(before))
    assert found.rate == 0.3
    assert (found.top_k, found.measure, [layer.name for layer in found.layers]) == (
        top_k, measure, [layer.name for layer in own_layers(after)],
    )  # fmt: skip
    check_rates_and_order(after, found)


def check_identity(found: Sparsity, layers: Sequence[CalibratedLayer]) -> None:
    digests = digest_of(each.gate_ED for each in layers), digest_of(each.input_FD for each in layers)
    found.check("export", *digests, layers[0].top_k)


def check_rates_and_order(model: Any, found: Sparsity) -> None:
    """On other text: neurons of the seen experts are mostly in order, rates are near those that were asked for."""
    layers = own_layers(model)
    tokens = torch.tensor([list(TEXT.encode()[:1600])]).view(-1, 32)
    sums = [layer.sums() for layer in layers]
    for layer, own in zip(layers, sums, strict=True):
        with layer.watched(own), torch.no_grad():
            model.hidden_states(tokens)
    for own, (skip, halve) in zip(sums, found.thresholds(0.3, "2t"), strict=True):
        assert left_out(own.criterion_N, skip, halve) == pytest.approx(0.3, abs=0.02)
        order_EF = own.order_EF(found.measure)  # type: ignore[arg-type]
        assert torch.equal(order_EF, torch.arange(order_EF.shape[1]).expand_as(order_EF))
        assert own.major_share(found.measure) > 0.5  # type: ignore[arg-type]


def test_sums_are_those_of_the_rows_of_each_expert() -> None:
    model = FAMILIES["Qwen3-MoE"]().eval()
    (layer, *_) = fused_layers(model, "--load a")
    sums = layer.sums()
    rows_TD, chosen_TK = torch.randn(9, 16), torch.tensor([[0, 2]] * 4 + [[2, 1]] * 5)
    weight_TK = torch.tensor([[0.3, 0.1]] * 9)
    experts = model.model.layers[0].mlp.experts
    with layer.watched(sums), torch.no_grad():
        experts(rows_TD, chosen_TK, weight_TK)
    assert sums.rows == [4, 5, 9, 0]
    for expert, rows_SD in {0: rows_TD[:4], 1: rows_TD[4:], 2: rows_TD}.items():
        gate_SF, up_SF = (rows_SD @ experts.gate_up_proj[expert].T).detach().chunk(2, dim=1)
        by_hand(sums, expert, F.silu(gate_SF), up_SF)
    assert sorted(sums.criterion_N.tolist()) == pytest.approx([0.25] * 9 + [0.75] * 9)
    assert torch.equal(sums.order_EF("abs-gate")[3], torch.arange(12))  # no token: as it was


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_transformers(family: str, tmp_path: Path, text: Path, capsys: Any) -> None:
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(tmp_path / "model")
    flags = ["--load", str(tmp_path / "model"), "--text", str(text), "--output", str(tmp_path / "sparse")]
    assert sparsify.main([*flags, "--measure", "gate-up"]) == 0
    told = capsys.readouterr().out
    assert f'attach_dropping(model, Sparsity.read(Path("{tmp_path / "sparse"}")), 0.25, "2t")' in told
    assert "scmoe evaluate" not in told  # which reads no model of transformers
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    with torch.no_grad():
        torch.testing.assert_close(after(TOKENS).logits, model(TOKENS).logits, rtol=1e-6, atol=1e-5)
    moved = [a for a, b in zip(after.parameters(), model.parameters(), strict=True) if not torch.equal(a, b)]
    layers = fused_layers(after, "--load a")
    assert len(moved) == 2 * len(layers)  # the experts alone
    check_identity(Sparsity.read(tmp_path / "sparse"), layers)
    with pytest.raises(CheckpointError, match="the same in another order"):
        check_identity(Sparsity.read(tmp_path / "sparse"), fused_layers(model, "--load a"))
    assert (tmp_path / "sparse" / "tokenizer.json").is_file()
    with safe_open(tmp_path / "sparse" / "model.safetensors", "pt") as weights:
        assert weights.keys()


def byte_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*alphabet, "<eod>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eod>").save_pretrained(directory)


def test_models_without_experts_of_this_form_are_refused() -> None:
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{k: v for k, v in SHAPE.items() if not k.startswith(("moe", "num_experts"))})
    )
    with pytest.raises(CheckpointError, match=r"--load a: LlamaForCausalLM has no MoE layer.*name a MoE model"):
        fused_layers(dense, "--load a")
    layer = FAMILIES["Mixtral"]().model.layers[0].mlp
    layer.experts.is_transposed = True
    with pytest.raises(CheckpointError, match="are not of the form"):
        FusedLayer("blocks.0.mlp", layer, 2)
    one = FAMILIES["Qwen3-MoE"]()
    one.config.num_experts_per_tok = 1
    with pytest.raises(CheckpointError, match="each token's score is 1"):
        fused_layers(one, "--load a")
    one.config.num_experts_per_tok = 5
    with pytest.raises(CheckpointError, match="num_experts_per_tok = 5: must be 1 … 4, a layer's experts"):
        fused_layers(one, "--load a")


def test_experts_without_w3_have_the_first_measures() -> None:
    sums = LayerSums(1, 4, torch.device("cpu"))
    sums.add_rows(0, torch.tensor([[-3.0, 1.0, 2.0, 0.5]]), None)
    assert tuple(sums.importance) == WITHOUT_W3 == MEASURES[:2]
    assert sums.order_EF("abs-gate").tolist() == [[0, 2, 1, 3]] and sums.order_EF("gate").tolist() == [[2, 1, 3, 0]]
    assert sums.major_share("abs-gate") == pytest.approx(5 / 6.5)


def test_numbers_that_are_not_finite_are_refused_and_dead_neurons_are_alike() -> None:
    sums = LayerSums(1, 4, torch.device("cpu"))
    sums.add_rows(0, torch.zeros(1, 4), None)
    assert sums.major_share("abs-gate") == 0.5
    sums.add_rows(0, torch.full((1, 4), torch.inf), None)
    with pytest.raises(ArgumentError, match="importance of the neurons = inf: must be finite"):
        sums.major_share("abs-gate")
    with pytest.raises(ArgumentError, match=r"scores of a gate = nan: must be finite.*--dtype fp32"):
        sums.add_choices(torch.tensor([0.5, torch.nan]))


def test_a_pipe_is_read_as_a_file_is(text: Path) -> None:
    os.mkfifo(pipe := text.with_name("pipe"))
    Thread(target=lambda: pipe.write_text(TEXT), daemon=True).start()
    whole, piped = (read_text(str(path), ByteTokenizer(), 257) for path in (text, pipe))
    assert piped.digest == whole.digest and piped.tokens.tolist() == whole.tokens.tolist()
