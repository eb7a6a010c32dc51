"""A vision-language model on two ranks: kinds of tokens reach experts on other ranks and layers of both, one result."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lab.distributed import run_distributed
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.evaluation.answers import score_answers
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.vision_language import VisionLanguageGPT
from scmoe_ds.moe.gate import TOLERANT
from scmoe_ds.parallel import tensor
from tests.models.test_vision_language import IMAGES, KINDS, SETTINGS, TOKENS, USED, watched


def made(group: Any = None, **section: Any) -> VisionLanguageGPT:
    free = {"num_experts": 4, "drop_tokens": False, "use_rts": False, "min_capacity": 0}
    model = VisionLanguageGPT(SETTINGS, ScMoEConfig.from_deepspeed({"scmoe": {**free, **section}}), group=group)
    initialize_parameters(model, 1, 0.2, 4)
    for layer in model.moe_layers():
        layer.set_deepspeed_parallelism()
    return model.eval()


def check(model: VisionLanguageGPT, expected: Tensor) -> None:
    witness = watched(model)
    with torch.no_grad():
        found = model(TOKENS, used_token=USED, images=IMAGES).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(witness.seen) == 2
    for _, tolerant_T in witness.seen:
        assert tolerant_T is not None and tolerant_T.tolist() == (KINDS == TOLERANT).flatten().tolist()


def on_two_ranks() -> tuple[float, ...]:
    whole = made()
    with torch.no_grad():
        expected = whole(TOKENS, used_token=USED, images=IMAGES).logits
    divided = made(expert_parallel_size=2)
    check(divided, expected)
    # A rank has a question of its own; both together are what one rank finds for both.
    batch = {"tokens": TOKENS, "labels": TOKENS.roll(-1, 1), "loss_mask": (KINDS == 1).float()}
    rows = [{name: each[row : row + 1] for name, each in batch.items()} for row in (0, 1)]
    mine = {**rows[dist.get_rank()], "images": IMAGES[:2] if dist.get_rank() == 0 else IMAGES[2:]}
    both, one = score_answers(divided, [mine]), score_answers(whole, [{**batch, "images": IMAGES}])
    torch.testing.assert_close(both[:3], one[:3], rtol=1e-4, atol=1e-5)
    assert both.questions == 2 and one.questions == 4, "the two ranks have scored the same two questions"
    tensor.start_tensor_parallel(2)
    check(made(tensor.tensor_parallel_group(), expert_parallel_size=2), expected)
    return tuple(both)


def test_two_ranks_find_what_one_finds() -> None:
    first, second = run_distributed(on_two_ranks, 2)
    assert first == second
