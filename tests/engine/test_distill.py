"""A teacher in the student's own modules: it is the source, bit by bit, and leaves nothing behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.distill import Distillation
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.trace.recorder import Recorder
from tests.models.test_converted import SOURCES, TOKENS, adapted, gpt
from tests.models.test_distillation import kl_by_hand

LABELS = TOKENS.roll(-1, 1)


def engine_of(model: GPT) -> Any:
    """What a teacher asks of an engine."""
    pairs = list(model.scheduled_pairs())
    return SimpleNamespace(module=model, overlap=SimpleNamespace(pairs=pairs), torch_autocast_enabled=lambda: False)


def taught(model: GPT, **distill: Any) -> Distillation:
    section = {"adapt": {**model.config.adapt.model_dump(), "distill": distill}}  # type: ignore[union-attr]
    config = ScMoEConfig(**{**model.config.model_dump(exclude={"adapt"}), **section})
    return Distillation(engine_of(model), model.conversion, config)


def streams_by_hand(model: GPT, join: str) -> list[Tensor]:
    """Behind each of the two pairs, or behind the second one's first attention."""
    kept = []
    place = model.runs[1].blocks[0].mlp_norm if join == "late" else model.runs[1]
    handles = [
        place.register_forward_pre_hook(lambda module, args: kept.append(args[0])),  # type: ignore[union-attr]
        model.final_norm.register_forward_pre_hook(lambda module, args: kept.append(args[0])),
    ]
    model.local_logits(TOKENS)
    for handle in handles:
        handle.remove()
    return [kept[0], kept[-1]]


@pytest.mark.parametrize("join", ["end", "late"])
@pytest.mark.parametrize("source", sorted(SOURCES))
def test_loss_is_that_of_two_separate_models(source: str, join: str) -> None:
    model, teacher = adapted(source, join=join), gpt(**SOURCES[source])
    distillation = taught(model, alpha=0.5, beta=0.25, gamma=2.0, temperature=2.0)
    with torch.no_grad():
        for parameter in model.parameters():  # as if it had trained
            parameter.mul_(1.01)
        of_teacher = teacher.local_logits(TOKENS)
        targets = streams_by_hand(teacher, join)

    found = model(TOKENS, LABELS, targets=distillation.teach(TOKENS))
    found.loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()

    plain = model(TOKENS, LABELS)
    kl = kl_by_hand(model.local_logits(TOKENS), of_teacher, 2.0).mean().float()
    errors = [
        (s - t).square().sum() / t.square().sum() for s, t in zip(streams_by_hand(model, join), targets, strict=True)
    ]
    loss = 0.5 * 4 * kl + 0.25 * plain.lm_loss + 2.0 * sum(errors) / 2 + 0.01 * plain.moe_loss
    loss.backward()
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.kl, kl)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=2e-6, msg=name)
    assert gradients.keys() == {name for name, each in model.named_parameters() if each.grad is not None}


def test_the_teacher_stays_what_the_source_was_and_leaves_nothing_behind() -> None:
    model, teacher = adapted("top-k"), gpt(**SOURCES["top-k"])
    distillation = taught(model, gamma=1.0)
    exact = teacher.local_logits(TOKENS)
    pair = model.scheduled_pairs()[0]
    assert isinstance(pair, StagedPair)
    pair.recorder = Recorder(torch.device("cpu")).pair(0)
    model.train()
    model.runs[0].blocks[0].eval()  # frozen by its user, for example
    storages = [parameter.data_ptr() for parameter in model.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        values = [parameter.clone() for parameter in model.parameters()]
        modes, recorder = [module.training for module in model.modules()], pair.recorder
        numbers = torch.get_rng_state()
        targets = distillation.teach(TOKENS)
        assert torch.equal(targets.distribution[0], exact)  # type: ignore[index]  # dropout and all
        assert not any(stream.requires_grad for stream in targets.streams)
        assert torch.equal(torch.get_rng_state(), numbers)
        assert modes == [module.training for module in model.modules()]
        assert pair.recorder is recorder and model.conversion.converted == [0, 1]
        assert [parameter.data_ptr() for parameter in model.parameters()] == storages
        for parameter, value in zip(model.parameters(), values, strict=True):
            assert torch.equal(parameter, value)
        model(TOKENS, LABELS, targets=targets)  # takes the student's streams


def test_what_a_user_froze_is_not_copied() -> None:
    model = adapted("top-k")
    everything = taught(model).teacher
    for parameter in model.embedding.parameters():
        parameter.requires_grad_(False)
    rest = taught(model).teacher
    assert everything is not None and rest is not None
    assert everything.copied_bytes - rest.copied_bytes == model.embedding.weight.nbytes
    assert taught(model, alpha=0.0, beta=1.0).teacher is None  # the text alone teaches


def test_the_text_alone_is_plain_training_bit_by_bit() -> None:
    model = adapted("top-k").train()
    targets = taught(model, alpha=0.0, beta=1.0).teach(TOKENS)
    found = []
    for given in (targets, None):
        torch.manual_seed(3)
        output = model(TOKENS, LABELS, targets=given)
        model.zero_grad()
        output.loss.backward()
        found.append([output.loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)])
    assert all(map(torch.equal, *found))


def test_parameters_in_pieces_have_no_teacher() -> None:
    model = adapted("top-k")
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]  # ZeRO-3's mark
    with pytest.raises(ScMoEConfigError, match=r"zero_optimization.stage = 3: .*set stage 1 or 2"):
        taught(model)
