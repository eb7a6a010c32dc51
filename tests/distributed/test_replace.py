"""Replaced models on two ranks: against the same model written directly, and five families of Hugging Face models,
upcycled and replaced, trained by DeepSpeed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

import scmoe_ds
from benchmarks.speed.replace import Direct, Replaced
from benchmarks.speed.replace import results as computed
from lab.distributed import run_distributed
from scmoe_ds import ScMoEConfig, load_balancing_loss, moe_from_dense
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.parallel import tensor
from scmoe_ds.replace.layer import HookedScMoE
from tests.helpers.blocks import Block
from tests.helpers.hugging_face import FAMILIES

STEPS, MICRO_BATCHES = 20, 2
FIVE = ["GPT-2", "LLaMA", "GPT-NeoX", "ViT", "Swin"]
BY_SECTION = ["LLaMA", "ViT"]
"""Made DeepSpeed's Residual MoE, and replaced by `"replace": true`; the others are ScMoE before they are initialised."""
NOISE = 0.02


SHAPE = GPTSettings(num_layers=4, hidden_size=16, num_attention_heads=2, vocab_size=32, max_position_embeddings=12)
EXPERTS = 4
CASES = [(position, norm) for position in ("pos1", "pos2", "pos3") for norm in ("shared", "own")]


@dataclass
class Trained:
    """What a rank has seen.

    Attributes:
        losses: means over the ranks.
        weights: final ones by name, local to the rank.
        overlapped: whether all layers began at their taps, and their communication was not blocking.
        after_save, after_load: loss in evaluation right after a save, and after more steps and a load.
    """

    losses: list[float]
    weights: dict[str, Tensor]
    overlapped: bool
    after_save: float = 0.0
    after_load: float = 0.0


def make_json(ep: int, overlap: bool, **section: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": MICRO_BATCHES // dist.get_world_size(),
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "eps": 1e-4, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "scmoe": {
            "num_experts": 4,
            "expert_parallel_size": ep,
            "capacity_factor": 1.0,
            "min_capacity": 1,
            "use_rts": False,
            "overlap": {"enabled": overlap, "num_chunks": 1, "calibration_steps": 0},
            **section,
        },
    }


def micro_batch(model: nn.Module, number: int) -> dict[str, Tensor]:
    """Numbers that count up, or images whose class is their brightest row."""
    generator = torch.Generator().manual_seed(number)
    if hasattr(model.config, "image_size"):
        size = model.config.image_size
        labels = torch.randint(3, (4,), generator=generator)
        images = torch.randn(4, 1, size, size, generator=generator)
        images[torch.arange(4), 0, labels] += 3.0
        return {"pixel_values": images, "labels": labels}
    first = torch.randint(32, (4, 1), generator=generator)
    tokens = (first + torch.arange(12)) % 32
    return {"input_ids": tokens, "labels": tokens}


def loss_of(engine: Any, number: int) -> Tensor:
    output = engine(**micro_batch(engine.module, number))
    return output.loss + 0.01 * load_balancing_loss(engine)


def train_one(family: str, ep: int, overlap: bool, directory: str | None) -> Trained:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    in_two_steps = family in BY_SECTION
    dense_to = make_json(ep, overlap, architecture="shared_expert" if in_two_steps else "scmoe")
    moe_from_dense(model, ScMoEConfig.from_deepspeed(dense_to), noise=NOISE)
    engine, *_ = scmoe_ds.initialize(model=model, config=make_json(ep, overlap, replace=in_two_steps))
    losses: list[float] = []
    train(engine, losses, STEPS)
    weights = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    assert len(engine.overlap.pairs) == 2
    overlapped = all(pair._recomputation.in_pieces and pair.schedule.overlap for pair in engine.overlap.pairs)
    trained = Trained(losses, weights, overlapped)
    if directory is not None:
        engine.save_checkpoint(directory, tag=family)
        trained.after_save = evaluated(engine)
        train(engine, [], 2)
        assert evaluated(engine) != trained.after_save, "two more steps have changed nothing"
        engine.load_checkpoint(directory, tag=family)
        trained.after_load = evaluated(engine)
    return trained


def train(engine: Any, losses: list[float], steps: int) -> None:
    ranks = dist.get_world_size()
    for step in range(steps):
        total = torch.zeros(())
        for micro_step in range(MICRO_BATCHES // ranks):
            torch.manual_seed(step)
            loss = loss_of(engine, step * MICRO_BATCHES + micro_step * ranks + dist.get_rank())
            engine.backward(loss)
            engine.step()
            total += loss.detach() / MICRO_BATCHES
        dist.all_reduce(total)
        losses.append(total.item())


@torch.no_grad()
def evaluated(engine: Any) -> float:
    engine.eval()
    loss = loss_of(engine, 10_000).item()
    engine.train()
    return loss


def train_all(cases: list[tuple[str, int, bool]], directory: str) -> list[Trained]:
    results = []
    for family, ep, overlap in cases:
        results.append(train_one(family, ep, overlap, directory if ep > 1 and overlap else None))
    return results


@cache
def results(ranks: int, directory: str) -> dict[tuple[str, bool], list[Trained]]:
    """By family and whether overlapped, of every rank."""
    modes = (True, False) if ranks > 1 else (True,)
    cases = [(family, ranks, overlap) for family in FIVE for overlap in modes]
    by_rank = run_distributed(train_all, ranks, cases, directory, timeout_s=240)
    keys = [(family, overlap) for family, _, overlap in cases]
    return dict(zip(keys, zip(*by_rank, strict=True), strict=True))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("family", FIVE)
def test_a_family_trains_saves_and_loads(family: str, directory: str) -> None:
    for rank in results(2, directory)[family, True]:
        assert sum(rank.losses[-3:]) < 0.9 * sum(rank.losses[:3])
        assert rank.after_load == rank.after_save
        assert rank.overlapped


@pytest.mark.parametrize("family", FIVE)
def test_overlap_changes_no_bit(family: str, directory: str) -> None:
    overlapped, serial = (results(2, directory)[family, overlap] for overlap in (True, False))
    for one, other in zip(overlapped, serial, strict=True):
        assert one.losses == other.losses and not other.overlapped
        assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())


@pytest.mark.parametrize("family", FIVE)
def test_two_ranks_train_as_one_does(family: str, directory: str) -> None:
    [alone] = results(1, directory)[family, True]
    for rank in results(2, directory)[family, True]:
        assert rank.losses == pytest.approx(alone.losses, rel=1e-5)


def compute(position: str, shortcut_norm: str, ep: int) -> dict[str, dict[str, Tensor]]:
    """Of the two models, with equal weights whatever the number of ranks that share the experts.

    Tokens differ from rank to rank. An expert's number in a gradient's name is that among the experts of all ranks.
    """
    config = ScMoEConfig.from_deepspeed(
        {
            "scmoe": {
                "position": position,
                "shortcut_norm": shortcut_norm,
                "merge": "cg2",
                "num_experts": EXPERTS,
                "expert_parallel_size": ep,
                "capacity_factor": 1.0,
                "min_capacity": 1,
                "use_rts": False,
            }
        }
    )
    replaced = Replaced(SHAPE, config, EXPERTS)
    ep_rank = dist.get_rank() % ep
    initialize_parameters(replaced, 0, 0.2, SHAPE.num_layers)
    direct = Direct(SHAPE, config, EXPERTS, replaced)
    for module in (*replaced.modules(), *direct.modules()):
        if isinstance(module, MoE):
            module.set_deepspeed_parallelism()
    hidden = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
    computed(replaced, hidden)  # the first pass looks for operators and overlaps nothing
    found = {"replaced": computed(replaced, hidden), "direct": computed(direct, hidden)}
    assert all(each.pair._recomputation.in_pieces for each in replaced.modules() if isinstance(each, HookedScMoE))
    first = ep_rank * EXPERTS // ep
    return {model: {numbered(name, first): value for name, value in each.items()} for model, each in found.items()}


def numbered(name: str, first: int) -> str:
    return re.sub(r"(?<=deepspeed_experts\.)\d+", lambda local: str(int(local[0]) + first), name)


def compute_all() -> dict[tuple[str, str, int], dict[str, dict[str, Tensor]]]:
    return {(*case, ep): compute(*case, ep) for case in CASES for ep in (1, 2)}


@cache
def computed_by_two() -> list[dict[tuple[str, str, int], dict[str, dict[str, Tensor]]]]:
    return run_distributed(compute_all, 2)


@pytest.mark.parametrize(("position", "shortcut_norm"), CASES)
def test_replaced_equals_written_directly(position: str, shortcut_norm: str) -> None:
    """Also where the directly written model has all experts on every rank: what ranks share changes no value, and an
    expert that two ranks share gets the sum of the gradients that it gets on either."""
    ranks = computed_by_two()
    shared = [rank[position, shortcut_norm, 2] for rank in ranks]
    alone = [rank[position, shortcut_norm, 1]["direct"] for rank in ranks]
    experts = {name for name in alone[0] if "deepspeed_experts" in name}
    assert {name for rank in shared for name in rank["replaced"]} == set(alone[0])
    assert not experts & shared[0]["replaced"].keys() & shared[1]["replaced"].keys()
    for rank, own in zip(shared, alone, strict=True):
        assert rank["replaced"].keys() == rank["direct"].keys()
        for name, value in rank["replaced"].items():
            both = alone[0][name] + alone[1][name] if name in experts else own[name]
            for expected in (rank["direct"][name], both):
                assert expected.any(), f"{name} would be equal to anything that is 0"
                assert (value - expected).abs().max() <= 1e-6 * expected.abs().max(), name


def train_with_tensor_parallelism(size: int, ep: int, fields: dict[str, Any]) -> tuple[list[float], Tensor, list[str]]:
    """Losses of a replaced model whose experts would be divided, its first shared expert, and an error if there is one.

    Its experts are whole all the same: the layout is what is tested here.
    """
    torch.manual_seed(0)
    moe = MoE(
        8,
        nn.Linear(8, 8),
        4,
        ep,
        1,
        min_capacity=1,
        use_rts=False,
        drop_tokens=False,
        enable_expert_tensor_parallelism=size > 1,
    )
    for number, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
        place = dist.get_rank() // size % ep * moe.num_local_experts + number
        nn.init.constant_(expert.weight, 0.1 * (place + 1))
    torch.manual_seed(1)
    model = nn.Sequential(Block(nn.Linear(8, 8)), Block(moe))
    nn.init.normal_(moe.deepspeed_moe.gate.wg.weight, std=0.5)
    whole = make_json(ep, True)
    whole["gradient_accumulation_steps"] = 1
    whole.update(fields.get("top", {}))
    whole["scmoe"] = {
        "replace": True,
        "expert_tensor_parallelism": size > 1,
        "overlap": {"calibration_steps": 0},
        "shared_from": fields.get("shared_from", "fresh"),
    }
    mpu = None
    if size > 1:
        tensor.start_tensor_parallel(size)
        groups.mpu, mpu = None, tensor.ModelParallelUnit()  # as a user's, which is known to initialize alone
    try:
        engine, *_ = scmoe_ds.initialize(model=model, config=whole, mpu=mpu)
    except ValueError as error:
        return [], torch.zeros(0), [str(error)]
    shared = engine.module[1].mlp.mlp.weight.detach().clone()
    losses = []
    for step in range(3):
        loss = engine(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(step))).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, shared, []


@pytest.mark.parametrize("shared_from", ["mean", 2])
def test_expert_tensor_parallelism(shared_from: str | int) -> None:
    """Tensor-parallel 2 × expert-parallel 2, as one process."""
    losses, shared, _ = run_distributed(train_with_tensor_parallelism, 1, 1, 1, {"shared_from": shared_from})[0]
    assert torch.allclose(shared, torch.full((8, 8), 0.25 if shared_from == "mean" else 0.3))
    for found, divided, _ in run_distributed(train_with_tensor_parallelism, 4, 2, 2, {"shared_from": shared_from}):
        assert found == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(divided, shared)


def upcycle(**fields: Any) -> tuple[dict[str, Tensor], Tensor]:
    """This rank's experts of a dense model that is upcycled with noise, and its logits."""
    torch.manual_seed(0)
    model = FAMILIES["LLaMA"]()
    section = {"num_experts": EXPERTS, "drop_tokens": False, **fields}
    moe_from_dense(model, ScMoEConfig.from_deepspeed({"scmoe": section}), noise=1.0)
    for module in model.modules():
        if isinstance(module, MoE):
            module.set_deepspeed_parallelism()
    with torch.no_grad():
        logits = model.eval()(**micro_batch(model, 0)).logits
    return {name: weight for name, weight in model.named_parameters() if "deepspeed_experts" in name}, logits


def upcycle_alone_and_divided() -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor], Tensor]:
    alone = upcycle()
    tensor.start_tensor_parallel(2)
    return *alone, *upcycle(expert_parallel_size=2, expert_tensor_parallelism=True)


def test_upcycling_with_expert_tensor_parallelism() -> None:
    """Tensor-parallel 2 × expert-parallel 2: a rank holds the experts that a model in one process has, and its output.

    The ranks of a tensor-parallel group hold the same experts.
    """
    for rank, (whole, expected, held, found) in enumerate(run_distributed(upcycle_alone_and_divided, 4)):
        for name, weight in held.items():
            assert torch.equal(weight, whole[numbered(name, rank // 2 * EXPERTS // 2)]), name
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_layout_that_fits_not_is_refused_on_every_rank() -> None:
    top = {"use_data_before_expert_parallelism": True}
    for _, _, errors in run_distributed(train_with_tensor_parallelism, 4, 1, 2, {"top": top}):
        assert len(errors) == 1 and errors[0].startswith(
            "use_data_before_expert_parallelism = true: experts are laid out over"
        )
