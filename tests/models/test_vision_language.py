"""A GPT that reads images: patches in their places, and the kinds of tokens on every path to the MoE layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scmoe_ds.checkpoint.description import describe_model, rebuild
from scmoe_ds.checkpoint.hugging_face import describe_for_transformers
from scmoe_ds.checkpoint.parsing import Parsed, parse
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.digit_questions import DigitQuestions
from scmoe_ds.engine import connect
from scmoe_ds.errors import CheckpointError
from scmoe_ds.inference.generate import Request, TextGenerator
from scmoe_ds.inference.model import TrainedModel, load_model, serving_config
from scmoe_ds.inference.sampling import Sampling
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.recompute import Recompute
from scmoe_ds.models.vision_language import VisionLanguageGPT, gpt_of, in_patches
from scmoe_ds.models.vision_language_settings import VisionLanguageSettings
from scmoe_ds.moe.gate import TOLERANT, Routing
from tests.helpers.exports import write_export

PATCH = 63
SETTINGS = VisionLanguageSettings(4, 32, 4, 64, 24, patch_token=PATCH, image_size=8, patch_size=4)
PROMPT = [PATCH] * 4 + [5] + [PATCH] * 4 + [6, 7]
TOKENS = torch.tensor([[*PROMPT, 8], [1, 2, 3, 4, 9, *[PATCH] * 4, 8, 0, 0]])
USED = TOKENS != 0
KINDS = torch.tensor([[2, 2, 2, 2, 1, 2, 2, 2, 2, 1, 1, 1], [1, 1, 1, 1, 1, 2, 2, 2, 2, 1, 0, 0]])
IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Witness:
    """A routing rule that changes nothing, and notes which tokens the gate was told are patches."""

    in_training = True

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor | None, Tensor | None]] = []

    def apply(self, routing: Routing) -> Routing:
        self.seen.append((routing.used_T, routing.tolerant_T))
        return routing


def built(recompute: Recompute | None = None, **section: Any) -> VisionLanguageGPT:
    free = {"drop_tokens": False, "use_rts": False, "min_capacity": 0}
    config = ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 4, **free, **section}})
    model = VisionLanguageGPT(SETTINGS, config, recompute=recompute)
    initialize_parameters(model, 1, 0.2, 4)
    return model


def watched(model: VisionLanguageGPT) -> Witness:
    witness = Witness()
    for pair in model.scheduled_pairs():
        pair.layer.routing_rule = witness
    return witness


def test_patches_are_squares_row_by_row() -> None:
    image = torch.arange(2 * 2 * 16).view(2, 2, 4, 4)
    found = in_patches(image, 2)
    assert found.shape == (8, 8)
    assert found[0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert found[1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert found[4].tolist() == [32, 33, 36, 37, 48, 49, 52, 53]


def test_the_stream_has_projections_where_patches_are_and_embeddings_elsewhere() -> None:
    model = built()
    hidden_BSD, _ = model.embedded(TOKENS, None, None, IMAGES)
    is_patch, patches = TOKENS == PATCH, model.patch_projection(in_patches(IMAGES, 4))
    torch.testing.assert_close(hidden_BSD[is_patch], patches)
    torch.testing.assert_close(hidden_BSD[~is_patch], model.embedding(TOKENS[~is_patch]))


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
@pytest.mark.parametrize("architecture", ["scmoe", "dgmoe", "pipelined_topk", "overlapped_shared_expert"])
def test_kinds_reach_every_layer(architecture: str, recompute: Recompute | None) -> None:
    model = built(recompute, architecture=architecture)
    witness = watched(model)
    output = model(TOKENS, labels=TOKENS, used_token=USED, images=IMAGES)
    output.loss.backward()
    assert len(witness.seen) >= len(model.runs) * (2 if recompute == "full" else 1)
    for used_T, tolerant_T in witness.seen:
        assert used_T is not None and used_T.tolist() == (KINDS != 0).flatten().tolist()
        assert tolerant_T is not None and tolerant_T.tolist() == (KINDS == TOLERANT).flatten().tolist()
    assert model.patch_projection.weight.grad is not None and model.patch_projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("architecture", ["scmoe", "topk", "shared_expert", "dgmoe"])
def test_a_mark_alone_changes_nothing(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(architecture=architecture)
    marked = model(TOKENS, labels=TOKENS, used_token=USED, images=IMAGES)
    monkeypatch.setattr(model, "kinds", lambda tokens, used: used)
    plain = model(TOKENS, labels=TOKENS, used_token=USED, images=IMAGES)
    assert torch.equal(marked.loss, plain.loss)
    choices = int(USED.sum()) * (2 if architecture == "dgmoe" else model.config.top_k)
    for a, b in zip(marked.exp_counts, plain.exp_counts, strict=True):
        assert torch.equal(a, b) and int(a.sum()) == choices


def test_generation_reads_images_through_the_cache(tmp_path: Path) -> None:
    """An export, loaded again; prompts of unequal length and number of images against whole forward passes."""
    connect()
    whole = built().eval()
    trained = TrainedModel.open(write_export(tmp_path / "export", whole))
    assert trained.settings == SETTINGS
    model = load_model(trained, serving_config(trained.config), torch.float32, torch.device("cpu"))
    assert isinstance(model, VisionLanguageGPT)
    witness = watched(model)
    prompts, images = [PROMPT, [1, 2, *[PATCH] * 4, 3]], [IMAGES[:2], IMAGES[2:]]
    found = TextGenerator(model).generate(prompts, Request(5, Sampling(temperature=0)), images=images)
    for completion, prompt, seen in zip(found, prompts, images, strict=True):
        tokens = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                tokens.append(int(whole(torch.tensor([tokens]), images=seen).logits[0, -1].argmax()))
        assert completion.tokens == tokens[len(prompt) :]
    (used_T, tolerant_T), decoded = witness.seen[0], witness.seen[-1]
    assert used_T is not None and int(used_T.sum()) == len(PROMPT) + 7
    assert tolerant_T is not None and int(tolerant_T.sum()) == 12
    assert decoded[1] is not None and not decoded[1].any()


def test_its_description_is_a_gpts_with_patches(tmp_path: Path) -> None:
    model = built()
    description = describe_model(SETTINGS, model.config)
    assert parse(description, tmp_path).settings == SETTINGS
    assert isinstance(gpt_of(*rebuild(description)), VisionLanguageGPT)
    with pytest.raises(CheckpointError, match="of a vision-language model; only text models"):
        describe_for_transformers(Parsed(SETTINGS, model.config, "fp32"), None)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="patch_size = 3: must divide image_size = 8"):
        replace(SETTINGS, patch_size=3)
    with pytest.raises(ValueError, match="patch_token = 64: must be below vocab_size = 64"):
        replace(SETTINGS, patch_token=64)
    model = built()
    with pytest.raises(ValueError, match=r"images of shape \(3, 1, 4, 8\): must end in \(1, 8, 8\)"):
        model(TOKENS, images=IMAGES[:, :, :4])
    with pytest.raises(ValueError, match="images have 8 patches: must be as many as the patch tokens, 12"):
        model(TOKENS, images=IMAGES[:2])


def test_questions() -> None:
    """Half of the answers are backwards; training and held-out questions have no image in common."""
    train, held_out = DigitQuestions(40, 4, images=3), DigitQuestions(40, 4, images=3, held_out=True)
    pools = []
    for questions in (train, held_out):
        pools.append({image.numpy().tobytes() for number in range(40) for image in questions.question(number).images})
        for number in range(40):
            question, sample = questions.question(number), questions[number]
            text = bytes(question.prompt[12:]).decode()
            digits = [
                int(questions._digits.labels[(questions._digits.images == image).flatten(1).all(1)][0])
                for image in question.images
            ]
            assert question.text == "".join(map(str, digits[:: -1 if text == "back? " else 1])) + "."
            assert text in ("read? ", "back? ") and question.prompt[:12] == [257] * 12
            answer = sample["labels"][sample["loss_mask"] != 0]
            assert answer.tolist() == question.answer and len(sample["tokens"]) == questions.length
    assert not pools[0] & pools[1]
    assert len({questions.question(number).text for number in range(40)}) > 30
