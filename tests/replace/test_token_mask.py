"""Padding in models that others wrote: their attention_mask reaches the MoE layers, which leave such tokens out."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from benchmarks.speed.replace import Block
from scmoe_ds import ScMoEConfig, load_balancing_loss, moe_from_dense
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.moe import layer as moe_layer
from scmoe_ds.moe.gate import route
from scmoe_ds.replace import replace_moe_layers, undo_replacement
from scmoe_ds.replace.upcycle import MoEFeedForward
from tests.helpers.hugging_face import FAMILIES, VOCABULARY

LANGUAGE = [family for family in FAMILIES if family not in ("ViT", "Swin")]
SECTIONS = {
    "scmoe": {},
    "scmoe top-2": {"top_k": 2},
    "padded": {"dispatch": "padded", "position": "pos1"},
    "topk": {"architecture": "topk"},
    "shared_expert": {"architecture": "shared_expert"},
}
REAL = torch.randint(VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))
PADDED = torch.cat([REAL, torch.zeros(3, 5, dtype=torch.int64)], 1)
MASK = (torch.arange(11) < 6).long().expand(3, -1)


def made(family: str = "GPT-2", **section: Any) -> nn.Module:
    """Capacity is scarce, so that padding would take real tokens' places."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    config = ScMoEConfig.from_deepspeed(
        {"scmoe": {"num_experts": 4, "use_rts": False, "min_capacity": 1, "eval_capacity_factor": 0.7, **section}}
    )
    return moe_from_dense(model, config, noise=0.5)


def counts(model: nn.Module) -> list[int]:
    return [int(each.exp_counts.sum()) for each in model.modules() if isinstance(each, MoEFeedForward)]


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "scmoe") for family in LANGUAGE] + [("GPT-2", kind) for kind in SECTIONS if kind != "scmoe"],
)
def test_padding_changes_nothing(family: str, kind: str) -> None:
    alone, model = made(family, **SECTIONS[kind]), made(family, **SECTIONS[kind])
    for _ in range(2):  # the first pass looks for operators, and does all in the layer
        expected, found = alone(REAL).logits, model(PADDED, attention_mask=MASK).logits[:, :6]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(load_balancing_loss(model), load_balancing_loss(alone))
        assert counts(model) == counts(alone)
    unmasked = model(PADDED, attention_mask=torch.ones_like(MASK))
    assert counts(model) != counts(alone)
    assert not torch.allclose(unmasked.logits[:, :6], expected, atol=1e-3), (
        "capacity is not scarce enough to see padding"
    )


@pytest.mark.parametrize("family", ["GPT-2", "LLaMA"])
def test_marks_of_tolerant_tokens_reach_the_layers_and_change_nothing_else(family: str) -> None:
    model, kinds, layers = made(family), MASK * (1 + (torch.arange(11) % 2)), 0
    expected = made(family)(PADDED, attention_mask=MASK).logits[:, :6]
    given: list[Tensor | None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_layer, "route", lambda *args: given.append(args[2]) or route(*args))
        for _ in range(2):  # the first pass looks for operators, and does all in the layer
            found = model(PADDED, attention_mask=kinds).logits[:, :6]
            torch.testing.assert_close(found, expected)
            layers += len(counts(model))
    assert len(given) == layers
    assert all(each is not None and torch.equal(each, kinds) for each in given)


@pytest.mark.parametrize("kind", ["scmoe", "topk", "shared_expert"])
@pytest.mark.parametrize("family", ["GPT-2", "LLaMA"])
def test_generate_from_padded_prompts(family: str, kind: str) -> None:
    """On the left, with a cache: a mask is then longer than the tokens that are read."""
    model, seen = made(family, **SECTIONS[kind], drop_tokens=False), []
    feed = next(each for each in model.modules() if isinstance(each, MoEFeedForward))
    feed.register_forward_hook(lambda *_: seen.append(int(feed.exp_counts.sum())))
    prompts = [[5], [7, 8, 9], [1, 2, 3, 4, 5, 6]]
    padded = torch.tensor([[0] * (6 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (6 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(padded, attention_mask=mask, **settings)[:, 6:]
    k = 2 if kind == "topk" else 1
    assert seen == [10 * k, 3 * k, 3 * k, 3 * k]
    alone = [
        model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **settings)[0, -4:]
        for prompt in prompts
    ]
    assert torch.equal(found, torch.stack(alone))


FORMS = {
    "2-D": (MASK, 18),
    "bool": (MASK.bool(), 18),
    "float": (MASK.float(), 18),
    "none": (None, 33),
    "all ones": (torch.ones_like(MASK), 33),
    # Not padding by themselves: a 4-D mask also says who looks at whom.
    "4-D": (MASK.bool()[:, None, None, :] & torch.ones(11, 11).tril().bool(), 33),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_mask(form: str) -> None:
    mask, routed = FORMS[form]
    for kind in ("scmoe", "topk"):
        model = made(**SECTIONS[kind])
        model(PADDED, attention_mask=mask)
        assert counts(model) == [routed * (2 if kind == "topk" else 1)] * 2


class Wrapper(nn.Module):
    """Somebody's own around a Hugging Face model: takes no attention_mask itself, hands it on by position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Any:
        parameters = list(inspect.signature(self.model.forward).parameters)  # transformers 4's order is another one
        between = [None] * (parameters.index("attention_mask") - 1)
        return self.model(batch["tokens"], *between, batch["mask"])


def test_mask_that_is_handed_over_by_position_inside_a_wrapper() -> None:
    model = Wrapper(FAMILIES["GPT-2"]())
    moe_from_dense(model, ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 4}}))
    model({"tokens": PADDED, "mask": MASK})
    assert counts(model) == [18, 18]


@pytest.mark.parametrize("kind", ["scmoe", "topk"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_that_are_computed_again_have_the_mask_of_their_pass(kind: str, reentrant: bool) -> None:
    """Two batches forward, then both backward: the second mask is not the first one's."""
    found = []
    other = (torch.arange(11) < torch.tensor([[11], [3], [1]])).long()
    for checkpointed in (False, True):
        # A block of its own tap: with a reentrant checkpoint a pair that is cut apart is refused.
        model = made(**SECTIONS[kind], **({"tap": "{block}.ln_1:input"} if kind == "scmoe" else {}))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        for masks in ((MASK,), (MASK, other)):  # the first pass looks for operators
            model.zero_grad()
            losses = [model(PADDED, attention_mask=mask).logits.square().mean() for mask in masks]
            sum(losses).backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


class TwoStacks(nn.Module):
    """An encoder and a decoder, each with a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(), Stack()

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None = None, decoder_attention_mask: Tensor | None = None
    ) -> Tensor:
        return self.decoder(self.encoder(hidden, attention_mask), decoder_attention_mask)


SETTINGS = GPTSettings(4, 16, 2, 32, 12)


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(16, MLP(SETTINGS), 4, min_capacity=1, use_rts=False)
        self.used_token: Tensor | None = None
        self.counts: list[int] = []
        self.l_aux: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        output, self.l_aux, exp_counts = self.moe(hidden, self.used_token)
        self.counts.append(int(exp_counts.sum()))
        return output


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(SETTINGS, MLP(SETTINGS)), Block(SETTINGS, Feed())])

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def replaced(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return replace_moe_layers(model, ScMoEConfig.from_deepspeed({"scmoe": {"overlap": {"num_chunks": 2}}}))


def feeds(model: nn.Module) -> list[Feed]:
    return [module for module in model.modules() if isinstance(module, Feed)]


def test_the_stack_that_holds_a_layer_decides() -> None:
    model, hidden = replaced(TwoStacks()), torch.randn(2, 8, 16)
    mask = (torch.arange(8) < torch.tensor([[8], [3]])).long()
    for masks, expected in (((mask, None), (11, 16)), ((None, mask), (16, 11)), ((None, None), (16, 16))):
        for _ in range(2):
            model(hidden, *masks)
        assert [feed.counts[-2:] for feed in feeds(model)] == [[each] * 2 for each in expected]


def test_a_mask_of_other_tokens_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """The model of the call puts the sequence first, which looks like another batch."""
    model = replaced(Stack())
    model.register_forward_pre_hook(lambda module, args: (args[0].transpose(0, 1), *args[1:]))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(torch.randn(2, 8, 16), torch.arange(8).expand(2, -1))
    assert feeds(model)[0].counts == [16, 16]
    assert caplog.text.count("attention_mask (2, 8) does not fit an MoE layer's hidden states (8, 2, 16)") == 1


SOME = (torch.arange(8) < torch.tensor([[8], [3]])).long()


@pytest.mark.parametrize(("masks", "warned"), [([None, None, SOME, torch.ones(2, 8)], 2), ([SOME, SOME], None)])
def test_used_token_that_the_layer_is_told(
    masks: list[Tensor | None], warned: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Too late for the tap: what went ahead is taken back once, and later passes wait. Not from the first pass on, nor with
    attention_mask, which is the advice."""
    told, masked, hidden = replaced(Stack()), replaced(Stack()), torch.randn(2, 8, 16)
    for number, mask in enumerate(masks):
        feeds(told)[0].used_token = mask
        caplog.clear()
        results = []
        for model, given in ((told, None), (masked, mask)):
            model.zero_grad()
            output = model(hidden, given)
            (output.square().sum() + feeds(model)[0].l_aux).backward()
            results.append([output, *(each.grad for each in model.parameters())])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert ("runs without overlap from now on" in caplog.text) == (number == warned)
    assert feeds(told)[0].counts == feeds(masked)[0].counts
    assert feeds(told)[0].counts == [16 if mask is None else int(mask.sum()) for mask in masks]
    assert [feeds(model)[0].moe.pair._recomputation.in_pieces for model in (told, masked)] == [False, True]


def test_undoing_keeps_the_mask_of_moe_from_dense_and_removes_hooks() -> None:
    model = made(**SECTIONS["scmoe"])
    undo_replacement(model)
    model(PADDED, attention_mask=MASK)
    assert counts(model) == [18, 18]
    other = replaced(Stack())
    undo_replacement(other)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())
