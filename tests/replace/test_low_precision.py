"""AutoEP's experts of a Hugging Face model in low precision: every rank, and hot ones on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import scmoe_ds
from lab.distributed import run_distributed
from lab.moe_families import SEQUENCE, VOCABULARY, tiny
from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference.low_precision import use_low_precision
from scmoe_ds.moe.decisions.low_precision import LowPrecision


def passes() -> dict[str, Any]:
    """Logits, and how often this rank was hot."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0,
        "expert_parallel": {"enabled": True, "autoep_size": dist.get_world_size()},
        "scmoe": {"overlap": {"calibration_steps": 0}},
    }
    engine, *_ = scmoe_ds.initialize(model=tiny("qwen3_moe"), config=config)
    model = engine.module.eval()
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(dist.get_rank()))

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return model(input_ids=tokens, use_cache=False).logits

    found: dict[str, Any] = {"usual": logits()}
    with pytest.raises(ArgumentError, match=r"score = None: AutoEP's .* has no marks of tokens"):
        use_low_precision(model, LowPrecision(score=None))
    names = list(model.state_dict())
    for ranks in ("all", "hot"):
        attached = use_low_precision(model, LowPrecision(ranks, score=1.0, share=0.0, overload=1.0, min_tokens=0))
        found[ranks] = logits()
        found[f"{ranks} passes"] = [each.counts.hot for each in attached.layers]
        attached.detach()
    assert torch.equal(logits(), found["usual"])
    assert list(model.state_dict()) == names
    return found


def test_autoep_layers() -> None:
    ranks = run_distributed(passes, 2)
    for each in ranks:
        assert set(each["all passes"]) == {1}
        for which in ("all", "hot"):
            error = float((each[which] - each["usual"]).norm() / each["usual"].norm())
            assert 0 < error < 0.05
    # At most one of two ranks has more rows than the mean.
    assert all(sum(hot) <= 1 for hot in zip(*(each["hot passes"] for each in ranks), strict=True))
    assert sum(map(sum, (each["hot passes"] for each in ranks))) >= 1
