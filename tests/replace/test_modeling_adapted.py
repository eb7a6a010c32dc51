"""The eager ScMoE of a Hugging Face model against the equation, written out with the model's own modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lab.moe_families import EXPERTS, SEQUENCE, VOCABULARY, tiny
from scmoe_ds.moe.conversion import Conversion
from scmoe_ds.replace.modeling_adapted import install, uninstall

BEHIND_DENSE = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
THREE = {"num_hidden_layers": 3}
MEAN = {"adapt": {"shared_expert": "mean"}}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen3_moe", THREE, {"shortcut_norm": "own"}),
    ("qwen3_moe", {}, {"join": "late", "merge": "cg1", **MEAN}),
    ("mixtral", {}, {"shortcut_norm": "own", "merge": "cg2", "top_k": 1, **MEAN}),
    ("qwen2_moe", THREE, {"join": "late", "merge": "cg2", "shortcut_norm": "own", "adapt": {"layers": [0, 2]}}),
    ("qwen3_5_moe", {}, {"merge": "cg1", "top_k": 2}),
    ("deepseek_v2", BEHIND_DENSE, {"first_layer_position": "pos2", "join": "late", "shortcut_norm": "own"}),
    ("deepseek_v3", BEHIND_DENSE, {"first_layer_position": "pos3", "merge": "cg2"}),
    ("glm4_moe", {}, {"join": "late", "adapt": {"layers": [1]}}),
    ("olmoe", {}, {"shortcut_norm": "own", "top_k": 4}),
    ("minimax_m3", {}, {"join": "late", "merge": "cg1", "shortcut_norm": "own"}),
]


def some(family: str, **settings: Any) -> Any:
    """A model whose norms differ from each other."""
    model = tiny(family, **settings)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    if hasattr(model, "set_experts_implementation"):  # the others have no fp64
        model.set_experts_implementation("eager")
    return model.double()


def converted(model: Any, scmoe: dict[str, Any]) -> Conversion:
    """Installs, with parts that are as trained."""
    parts = install(model, scmoe)
    for each in parts.values():
        for parameter in each.parameters():
            nn.init.uniform_(parameter, 0.2, 0.8)
    return Conversion(parts)


def tokens(length: int = SEQUENCE) -> Tensor:
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(3))


def results(model: nn.Module) -> dict[str, Tensor]:
    """Logits, and the gradients of all parameters, by name."""
    logits = model(input_ids=tokens(), use_cache=False).logits
    loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return {"logits": logits, **dict(zip(parameters, found, strict=True))}


def equation(model: Any, scmoe: dict[str, Any]) -> None:
    """Gives every block a forward pass that is the equation."""
    blocks, streams, late = list(model.model.layers), {}, []
    layers = (scmoe.get("adapt") or {}).get("layers")
    numbers = [place for place, block in enumerate(blocks) if hasattr(block.mlp, "experts")]

    def of_experts(mlp: Any, value: Tensor, top_k: int) -> Tensor:
        before, mlp.gate.top_k = mlp.gate.top_k, top_k
        _, weights, chosen = mlp.gate(value)
        mlp.gate.top_k = before
        routed = mlp.experts(value.view(-1, value.shape[-1]), chosen, weights).view_as(value)
        return routed * getattr(mlp, "routed_scaling_factor", 1.0)

    def of_shared(block: Any, value: Tensor, added: Any) -> Tensor:
        if added is not None:
            return added(value)
        if hasattr(block.mlp, "shared_experts"):
            return block.mlp.shared_experts(value)
        if hasattr(block.mlp, "shared_expert"):
            return torch.sigmoid(block.mlp.shared_expert_gate(value)) * block.mlp.shared_expert(value)
        return torch.zeros_like(value)

    def forward(place: int, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        block = blocks[place]
        entered = hidden_states
        attended = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)
        x = entered + (attended[0] if isinstance(attended, tuple) else attended)
        x = x + late.pop() if late else x
        streams[place] = {"pos3": (entered, block.input_layernorm), "pos2": (x, block.post_attention_layernorm)}
        current, mlp = block.post_attention_layernorm(x), block.mlp
        if place not in numbers:
            return x + mlp(current)
        number = numbers.index(place)
        if layers is not None and number not in layers:
            return x + of_experts(mlp, current, mlp.gate.top_k) + of_shared(block, current, None)
        position = scmoe.get("first_layer_position", "pos1") if number == 0 else "pos1"
        value, norm = streams[place]["pos3"] if position == "pos1" else streams[place - 1][position]
        parts = block.shortcut
        routed = of_experts(mlp, (parts.norm or norm)(value), scmoe.get("top_k") or mlp.gate.top_k)
        shared, merge = of_shared(block, current, parts.shared_expert), scmoe.get("merge", "add")
        if merge == "cg1":
            shared = torch.sigmoid(parts.coefficient(current)) * shared
        elif merge == "cg2":
            weights = parts.coefficient(current).softmax(-1)
            routed, shared = weights[..., 0:1] * routed, weights[..., 1:2] * shared
        if scmoe.get("join") != "late" or place + 1 == len(blocks):
            return x + shared + routed
        late.append(routed)
        return x + shared

    for place, block in enumerate(blocks):
        block.forward = lambda hidden_states, place=place, **kwargs: forward(place, hidden_states, **kwargs)


@pytest.mark.parametrize(("family", "settings", "scmoe"), CASES)
def test_a_converted_model_computes_the_equation(family: str, settings: dict[str, Any], scmoe: dict[str, Any]) -> None:
    model = some(family, **settings)
    of_source = results(model)
    conversion = converted(model, scmoe)
    found = results(model)
    assert not torch.allclose(found["logits"], of_source["logits"])
    with conversion.as_source():
        for name, value in results(model).items():
            assert torch.equal(value, of_source.get(name, torch.zeros_like(value))), name
    uninstall(model)
    equation(model, scmoe)
    for name, value in results(model).items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max().clamp(min=1e-4), name


def test_a_copy_has_hooks_of_its_own_and_the_original_none_after_uninstalling() -> None:
    model = some("qwen3_moe")
    of_source, conversion = model(input_ids=tokens()).logits, converted(model, {"join": "late"})
    twin, expected = copy.deepcopy(model), model(input_ids=tokens()).logits
    conversion.only(())
    assert torch.equal(model(input_ids=tokens()).logits, of_source)
    assert torch.equal(twin(input_ids=tokens()).logits, expected)
    conversion.only([0, 1])
    uninstall(model)
    assert torch.equal(model(input_ids=tokens()).logits, of_source)


def test_token_by_token_with_a_cache_and_with_padding_as_without() -> None:
    model = some("qwen2_moe").eval()
    converted(model, {"join": "late", "merge": "cg1"})
    model.generation_config.eos_token_id = None
    ids = tokens(6)
    expected = model(input_ids=ids, use_cache=False).logits
    generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    for place in range(6, 9):
        last = model(input_ids=generated[:, :place], use_cache=False).logits[:, -1]
        assert torch.equal(last.argmax(-1), generated[:, place])
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(input_ids=padded, attention_mask=mask, position_ids=places, use_cache=False).logits[:, 3:]
    assert (found - expected).abs().max() < 1e-6


def test_the_balancing_loss_is_that_of_the_students_choices() -> None:
    model = some("qwen3_moe")
    converted(model, {"top_k": 1})
    output = model(input_ids=tokens(), output_router_logits=True)
    scores = torch.cat(list(output.router_logits)).softmax(-1)
    counts = torch.bincount(scores.argmax(-1), minlength=EXPERTS) / len(scores)
    assert output.aux_loss.item() == pytest.approx(float(EXPERTS * (counts * scores.mean(0)).sum()), rel=1e-5)
    uninstall(model)
    assert model.num_experts_per_tok == model.config.num_experts_per_tok > 1


def test_a_pass_that_failed_leaves_the_source_nothing() -> None:
    model = some("qwen3_moe")
    of_source, conversion = model(input_ids=tokens()).logits, converted(model, {"join": "late"})

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].input_layernorm.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=tokens())
    hook.remove()
    with conversion.as_source():
        assert torch.equal(model(input_ids=tokens()).logits, of_source)


def test_gradient_checkpointing_within_the_block_repeats_and_across_blocks_is_refused() -> None:
    model = some("qwen3_moe").train()
    converted(model, {"shortcut_norm": "own"})
    expected = results(model)
    model.gradient_checkpointing_enable()
    for name, value in results(model).items():
        assert torch.equal(value, expected[name]), name
    install(model, {"join": "late"})
    with pytest.raises(ValueError, match='needs a shortcut within the block, position "pos1" and join "end"'):
        results(model)


@pytest.mark.parametrize(
    ("family", "settings", "scmoe", "text"),
    [
        ("qwen3_moe", {}, {"position": "pos2"}, "is the first block, nothing precedes it"),
        ("deepseek_v2", THREE, {"position": "pos2", "first_layer_position": "pos1"}, "has an MoE itself and no dense"),
        ("qwen3_moe", {}, {"adapt": {"layers": [0, 2]}}, "there is no MoE layer 2; the model has 0 … 1"),
        ("qwen3_moe", {}, {"merge": "cg1"}, "has no shared expert"),
        ("qwen2_moe", {}, MEAN, "has a shared expert already"),
        ("longcat_flash", {}, {}, "has a shortcut of its own already"),
    ],
)
def test_what_a_model_cannot_have(family: str, settings: dict[str, Any], scmoe: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        install(tiny(family, **settings), scmoe)
