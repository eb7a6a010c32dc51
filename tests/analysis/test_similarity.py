"""Similarity of representations against a computation that keeps every representation of every token."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn

from scmoe_ds.analysis.probes import Representation, check_hugging_face, hugging_face_probes
from scmoe_ds.analysis.similarity import Similarity, SimilaritySums, measure, verdict
from scmoe_ds.analysis.subjects import gpt_subject, hugging_face_subject, swin_subject
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.errors import AnalysisError
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.swin import SwinMoE, initialize_swin
from scmoe_ds.models.swin_settings import SwinSettings
from tests.helpers.by_hand import gpt_by_hand
from tests.helpers.exports import whole_model
from tests.helpers.hugging_face import FAMILIES, TEXT_SHAPE
from tests.helpers.settings import GPT2, LLAMA

POST_NORM = replace(GPT2, norm_placement="post", residual_scale=0.5)
SECTIONS: dict[str, dict[str, Any]] = {
    "pos2": {},
    "pos3, shared norm": {"position": "pos3", "shortcut_norm": "shared"},
    "pos2, shared norm, post norm": {"shortcut_norm": "shared", "post_norm": True},
    "every block": {"moe_every": 1, "position": "pos1"},
    "top-2": {"architecture": "topk"},
    "dgmoe": {"architecture": "dgmoe"},
}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


def random_tokens(batches: int, vocabulary: int, length: int = 16, rows: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (rows, length), generator=generator) for _ in range(batches)]


def require_equal(found: Similarity, kept: list[Tensor], stage: int = 0) -> None:
    """Against all tokens' representations at once, pair by pair: kept is [T, D] for each."""
    places = [number for number, each in enumerate(found.representations) if each.stage == stage]
    assert len(places) == len(kept)
    for i, a in zip(places, kept, strict=True):
        for j, b in zip(places, kept, strict=True):
            cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean()
            distance = (a.double() - b.double()).norm(dim=-1).mean()
            assert abs(found.cosine[i, j] - cosine) <= 1e-6
            assert abs(found.distance[i, j] - distance) <= 1e-6
    norms = torch.stack([value.double().norm(dim=-1).mean() for value in kept])
    assert (found.norm[places] - norms).abs().max() <= 1e-6


@pytest.mark.parametrize("settings", [GPT2, LLAMA, POST_NORM], ids=["gpt2", "llama", "post-norm"])
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())
def test_gpt(settings: GPTSettings, section: dict[str, Any]) -> None:
    model = whole_model(settings, {"num_experts": 4, **section})
    batches = random_tokens(3, 384)
    found = measure(gpt_subject(model), batches)
    assert found.tokens == 3 * 3 * 16 and len(found.representations) == 9
    with torch.no_grad():
        each = [gpt_by_hand(model, batch) for batch in batches]
        kept = [torch.cat(parts).flatten(0, 1) for parts in zip(*each, strict=True)]
    require_equal(found, kept)
    names = [one.name for one in found.representations]
    assert names[:4] == [
        "input",
        "block 0 attention",
        f"block 0 {'MoE' if model.config.moe_every == 1 else 'MLP'}",
        "block 1 attention",
    ]


def hugging_face_by_hand(model: Any, family: str, tokens: Tensor) -> list[Tensor]:
    """Block inputs and outputs as transformers returns them; in between, attention called by hand."""
    hidden: list[Tensor] = []
    updates: list[Tensor] = []
    blocks = model.transformer.h if family == "GPT-2" else model.base_model.layers
    handles = []
    for block in blocks:
        attention = next(getattr(block, name) for name in ("attn", "self_attn", "attention") if hasattr(block, name))
        handles.append(attention.register_forward_hook(lambda _, args, output: updates.append(output[0].clone())))
        handles.append(
            block.register_forward_hook(
                lambda _, args, output: hidden.append((output[0] if isinstance(output, tuple) else output).clone())
            )
        )
    first = model(tokens, output_hidden_states=True, use_cache=False).hidden_states[0]
    for handle in handles:
        handle.remove()
    values = [first]
    for update, output in zip(updates, hidden, strict=True):
        values += [values[-1] + update, output]
    return values


@pytest.mark.parametrize("family", ["GPT-2", "LLaMA", "Mistral", "Qwen2", "GPT-NeoX"])
def test_hugging_face(family: str) -> None:
    torch.manual_seed(0)
    model: Any = FAMILIES[family]().eval()
    batches = random_tokens(2, 32)
    found = measure(hugging_face_subject(model), batches)
    with torch.no_grad():
        each = [hugging_face_by_hand(model, family, batch) for batch in batches]
    require_equal(found, [torch.cat(parts).flatten(0, 1) for parts in zip(*each, strict=True)])


def test_parallel_residual() -> None:
    """GPT-NeoX as it is by default: no norm reads the attention's sum."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**TEXT_SHAPE, num_hidden_layers=2)
    model: Any = transformers.GPTNeoXForCausalLM(config).eval()
    (batch,) = random_tokens(1, 32)
    found = measure(hugging_face_subject(model), [batch])
    with torch.no_grad():
        require_equal(found, [value.flatten(0, 1) for value in hugging_face_by_hand(model, "GPT-NeoX", batch)])


SWIN = SwinSettings(16, 4, 8, (1, 1, 4, 2), (1, 1, 2, 2), num_classes=10, patch_size=1, num_channels=1)


def swin_moe() -> nn.Module:
    model = SwinMoE(SWIN, ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 2, "drop_tokens": False}}))
    initialize_swin(model, seed=1)
    return model


def plain_swin() -> nn.Module:
    torch.manual_seed(0)
    return transformers.Swinv2ForImageClassification(
        transformers.Swinv2Config(
            image_size=16,
            patch_size=1,
            num_channels=1,
            embed_dim=8,
            depths=[1, 1, 4, 2],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            num_labels=3,
        )
    )


@pytest.mark.parametrize("make", [swin_moe, plain_swin], ids=["ours", "transformers"])
def test_swin(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    subject = swin_subject(model)
    assert subject.moe_blocks == [(3, 1), (3, 3), (4, 1)]
    found = measure(subject, [images[:1], images[1:]])
    blocks = cast(Any, model).swin if hasattr(model, "swin") else cast(Any, model).swinv2
    for stage in (3, 4):
        kept: list[list[Tensor]] = []
        layers = blocks.encoder.layers[stage - 1].blocks
        handles = [layers[0].register_forward_pre_hook(lambda _, args, kept=kept: kept.append([args[0].clone()]))]
        for layer in layers:  # h + norm(attention), then h + norm(MLP or MoE): the second is the layer's output
            handles.append(
                layer.layernorm_before.register_forward_hook(
                    lambda _, args, output, kept=kept: kept[-1].append(kept[-1][-1] + output)
                )
            )
            handles.append(
                layer.layernorm_after.register_forward_hook(
                    lambda _, args, output, kept=kept: kept[-1].append(kept[-1][-1] + output)
                )
            )
        with torch.no_grad():
            for image in images.split(1):  # in the same batches: rounding depends on them
                model(image)
        for handle in handles:
            handle.remove()
        require_equal(found, [torch.cat(parts).flatten(0, 1) for parts in zip(*kept, strict=True)], stage)
    first, last = found.cosine[0], found.record()["cosine"][0]
    assert bool(first[:3].isfinite().all()) and bool(first[3:].isnan().all()) and last[3:] == [None] * (len(last) - 3)
    assert [len(each["layers"]) for each in verdict(found, subject.moe_blocks)["positions"].values()] == [3, 3, 3]


@pytest.mark.slow
def test_memory_does_not_grow() -> None:
    """100 000 tokens against 10 000: kept, their representations would take 9 * 64 * 4 bytes each, 200 MB more."""
    config = transformers.GPT2Config(vocab_size=32, n_positions=128, n_embd=64, n_layer=4, n_head=2)
    resident: list[int] = []

    def batches() -> Iterator[Tensor]:
        for number in range(98):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * resource.getpagesize())
            yield torch.randint(32, (8, 128), generator=torch.Generator().manual_seed(number))

    assert measure(hugging_face_subject(transformers.GPT2LMHeadModel(config)), batches()).tokens == 100_352
    assert max(resident[10:]) - max(resident[:10]) < 32 << 20


def test_verdict() -> None:
    """Which representations each position connects, by hand, for MoE layers in blocks 1 and 3."""
    each = [Representation("input", 0)] + [
        Representation(kind, block, is_moe=kind == "mlp" and block % 2 == 1)  # type: ignore[arg-type]
        for block in range(4)
        for kind in ("attention", "mlp")
    ]
    cosine = torch.arange(81, dtype=torch.float64).view(9, 9) / 100
    found = Similarity(tuple(each), cosine, cosine * 10, torch.ones(9), 7)
    result = verdict(found, [(0, 1), (0, 3)])
    ends = {"pos1": [(2, 3), (6, 7)], "pos2": [(1, 3), (5, 7)], "pos3": [(0, 3), (4, 7)]}
    for position, pairs in ends.items():
        layers = result["positions"][position]["layers"]
        assert [(layer["from"], layer["to"]) for layer in layers] == [(each[a].name, each[b].name) for a, b in pairs]
        assert [layer["cosine"] for layer in layers] == [float(cosine[a, b]) for a, b in pairs]
        assert result["positions"][position]["passes"] is False
    assert result["text"][0].startswith("Pos-1 (block 0 MLP → block 1 attention, …)")
    assert "a hint only" in result["text"][0] and "in 2 of 2 MoE layers" in result["text"][0]
    own = verdict(found, [(0, 1), (0, 3)], trained="pos1")["text"]
    assert "experts of this model were trained with this shortcut" in own[0] and own[1:] == result["text"][1:]
    good = verdict(Similarity(tuple(each), cosine * 0 + 0.9, cosine, torch.ones(9), 7), [(0, 1), (0, 3)])
    assert good["positions"]["pos3"]["passes"] and "alike (at least 0.8) in all 2" in good["text"][2]
    every = verdict(found, [(0, 0), (0, 1), (0, 2), (0, 3)])["positions"]
    assert [len(every[position]["layers"]) for position in ("pos1", "pos2", "pos3")] == [4, 3, 3]
    assert every["pos1"]["layers"][0]["from"] == "input" and every["pos3"]["layers"][0]["from"] == "input"


def test_what_cannot_be_compared() -> None:
    one = Representation("input", 0)
    with pytest.raises(AnalysisError, match=r"1 intermediate representation\(s\)"):
        SimilaritySums([one])
    sums = SimilaritySums([one, Representation("attention", 0)])
    with pytest.raises(AnalysisError, match="no tokens"):
        sums.result()
    with pytest.raises(AnalysisError, match="block 0 attention is not finite in batch 5"):
        sums.add([torch.ones(2, 3), torch.tensor([[1.0, 2, 3], [1, torch.inf, 3]])], 5)
    sums.add([torch.zeros(2, 3), torch.ones(2, 3)], 0)
    assert sums.result().cosine[0].tolist() == [0, 0]


def test_unknown_families() -> None:
    config = transformers.Gemma2Config(**TEXT_SHAPE, num_hidden_layers=2, num_key_value_heads=1, head_dim=8)
    gemma = transformers.Gemma2ForCausalLM(config).eval()
    tokens = torch.arange(8).view(1, 8)
    with pytest.raises(AnalysisError, match=r"Gemma2DecoderLayer .*post_attention_layernorm does not read"):
        check_hugging_face(gemma, lambda: gemma(tokens))
    opt = transformers.OPTForCausalLM(transformers.OPTConfig(**TEXT_SHAPE, ffn_dim=24, num_hidden_layers=1))
    with pytest.raises(AnalysisError, match=r"OPTForCausalLM has no .* ln_1, attn, ln_2 \(GPT-2\); input_layernorm"):
        hugging_face_probes(opt)
    with pytest.raises(AnalysisError, match="no Swinv2Stage"):
        swin_subject(opt)
