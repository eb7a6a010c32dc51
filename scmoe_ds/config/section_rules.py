"""What the fields of a `ScMoEConfig` require of each other. Its module imports this one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scmoe_ds.config import offload_section
from scmoe_ds.config.expert_parallel import MODELS_OWN
from scmoe_ds.config.messages import counted, more_ranks

Rule = tuple[str, bool, str]
"""A field, whether its value breaks the rule, and the rule with the remedy."""


def rules_of_section(section: Any) -> Iterator[Rule]:
    """What the fields alone show."""
    for rules in (rules_of_layers, rules_of_slots, rules_of_router, rules_of_adapt, offload_section.rules_of_offload):
        yield from rules(section)


def rules_of_layers(section: Any) -> Iterator[Rule]:
    """Sizes, top-k and positions."""
    counts = section.num_experts if isinstance(section.num_experts, list) else [section.num_experts]
    k, ep, pairs, fewest = section.top_k, section.expert_parallel_size, section.pairs_per_moe, min(counts, default=2)
    shared = any(n != counts[i - i % pairs] for i, n in enumerate(counts))
    farthest = max(section.moe_every - 1, 1)
    dgmoe = section.architecture == "dgmoe"
    yield "num_experts", not counts, "needs at least one number, one per MoE layer"
    yield "num_experts", fewest < 1, "each number must be at least 1"
    parts = section.expert_partition
    places = "must" if parts == 1 else f"times expert_partition = {parts} must"
    uneven = any(n * parts % ep for n in counts)
    yield "num_experts", uneven, f"{places} be divisible by scmoe.expert_parallel_size = {ep}"
    yield "top_k", k < 1, "must be at least 1"
    of_model = section.replace and "num_experts" not in section.model_fields_set  # layers that exist have their numbers
    yield "top_k", k > fewest and not of_model, f"cannot exceed the number of experts ({fewest})"
    yield "top_k", dgmoe and k != 1, "dgmoe routes one expert from each of two layers; set 1"
    yield "num_experts", dgmoe and fewest < 2, "dgmoe's two choices are distinct experts; it needs at least 2"
    narrow = section.moe_shared_expert_intermediate_size is not None
    without = section.architecture in ("topk", "pipelined_topk", "dgmoe")
    yield "moe_shared_expert_intermediate_size", narrow and without, f"{section.architecture} has no shared expert"
    yield "pairs_per_moe", pairs > 1 and not dgmoe, "only dgmoe has no part that each pair owns; set 1"
    yield "num_experts", shared, f"pairs that share a MoE (pairs_per_moe = {pairs}) have one number of experts"
    rsample = section.noisy_gate_policy == "RSample"
    yield "noisy_gate_policy", rsample and k > 1, "DeepSpeed applies RSample with top_k 1 only; use Jitter or null"
    in_one_piece = section.join == "late" and not section.is_scheduled
    yield "join", in_one_piece, "DeepSpeed's own layers run in one piece; set end, or an architecture of this package"
    yield (
        "shortcut_distance",
        section.shortcut_distance > farthest,
        f"the shortcut starts within the pair of moe_every = {section.moe_every} blocks; use at most {farthest}",
    )
    positions = {"position": section.position, "first_layer_position": section.first_layer_position or "pos1"}
    for field, position in positions.items():
        yield (
            field,
            section.has_shortcut and section.moe_every == 1 and position != "pos1",
            "with an MoE in every block (moe_every = 1) the preceding block has no plain MLP to overlap; "
            "use pos1, which already gives the longest window",
        )
    yield from _rules_of_parts(section)


def _rules_of_parts(section: Any) -> Iterator[Rule]:
    """What experts in parts require."""
    divided, own = section.expert_partition > 1, section.architecture in ("topk", "shared_expert")
    same = {"topk": "pipelined_topk", "shared_expert": "overlapped_shared_expert"}.get(section.architecture)
    rule = f"DeepSpeed's own layers know no parts; set architecture {same}"
    yield "expert_partition", divided and own, rule
    of_model = section.replace and section.router.score_func != MODELS_OWN
    whole = "is for models of this package and for those that AutoEP distributes; remove it"
    yield "expert_partition", divided and of_model, whole
    twice = divided and section.expert_tensor_parallelism is True
    yield "expert_partition", twice, "parts are not divided again; set expert_tensor_parallelism to false"
    if section.expert_tensor_parallelism == "partition":
        yield "expert_tensor_parallelism", own, rule
        yield "expert_tensor_parallelism", of_model, "parts are for models of this package; set true or false"


def rules_of_world(section: Any, world_size: int, tp: int) -> Iterator[Rule]:
    """Expert-parallel sizes against numbers of ranks."""
    field, ep, divided = "expert_parallel_size", section.expert_parallel_size, section.expert_tensor_parallelism
    yield field, world_size % ep > 0, f"must divide the world size {world_size}; {more_ranks(ep)}"
    yield (
        field,
        bool(divided) and world_size // tp % ep > 0,
        f"with expert_tensor_parallelism it must divide the {world_size // tp} data-parallel ranks; change it, or set "
        "expert_tensor_parallelism to false",
    )
    other = not divided and ep % tp > 0 < tp % ep
    yield field, other, f"it or --tensor-model-parallel-size {tp} must divide the other"
    yield from offload_section.rules_of_world(section, tp)


def rules_of_slots(section: Any) -> Iterator[Rule]:
    """The slots that `overlap` names, against the operators that there are."""
    slot, chunks = section.overlap.expert_slot, section.overlap.num_chunks
    if not section.is_scheduled or slot == "auto" or section.architecture == "as_is":
        return
    last = min(section.num_operators(each) for each in (section.position, section.first_layer_position)) + 1
    highest = slot[-1] if isinstance(slot, list) else slot
    # A replaced layer's backbone is the model's own: its first forward pass shows the operators.
    yield (
        "overlap.expert_slot",
        not section.replace and highest > last,
        f"the backbone has {counted(last - 1, 'operator')} here; use 1 … {last}",
    )
    yield (
        "overlap.expert_slot",
        isinstance(slot, list) and chunks not in ("auto", len(slot)),
        f"gives each chunk its slot, but num_chunks = {chunks}; remove one",
    )


def rules_of_router(section: Any) -> Iterator[Rule]:
    """The router against sizes, and against fields that DeepSpeed's gate alone reads."""
    counts = section.num_experts if isinstance(section.num_experts, list) else [section.num_experts]
    for experts in sorted(set(counts)):
        for field, broken, rule in section.router.rules(section.top_k, experts):
            yield f"router.{field}", broken, rule
    if section.router.score_func is None:
        return
    kept = "DeepSpeed's gate alone reads it; remove it, or scmoe.router.score_func"
    yield "gate_softmax", section.gate_softmax != "deepspeed", f"{kept} (route_norm says what adds up to 1)"
    yield "noisy_gate_policy", section.noisy_gate_policy == "RSample", kept
    yield "top2_2nd_expert_sampling", section.top2_2nd_expert_sampling, kept
    groups = section.architecture == "dgmoe" and section.router.num_expert_groups is not None
    yield "router.num_expert_groups", groups, "dgmoe's second choice may need another group; remove it"


def rules_of_adapt(section: Any) -> Iterator[Rule]:
    """What becomes of a trained model."""
    if section.adapt is None:
        return
    yield "architecture", section.architecture != "scmoe", 'scmoe.adapt makes a ScMoE; set "scmoe", or remove adapt'
    counts = section.num_experts if isinstance(section.num_experts, list) else [section.num_experts]
    many = section.adapt.base is not None and section.adapt.base.top_k > min(counts, default=1)
    yield "adapt.base.top_k", many, f"cannot exceed the number of experts ({min(counts, default=1)})"
    for field, broken, rule in section.adapt.rules():
        yield f"adapt.{field}", broken, rule


def rules_of_depth(section: Any, num_layers: int, moe_layers: int) -> Iterator[Rule]:
    """What the model's depth allows."""
    depth, pairs = f"--num-layers {num_layers}", f"the {moe_layers} pairs of --num-layers {num_layers}"
    yield "moe_every", num_layers % section.moe_every > 0, f"must divide {depth}"
    yield "pairs_per_moe", moe_layers % section.pairs_per_moe > 0, f"must divide {pairs}"
    layers = (section.adapt.layers if section.adapt is not None else None) or []
    there = f"the model has the MoE layers 0 … {moe_layers - 1}"
    yield "adapt.layers", max(layers, default=-1) >= moe_layers, f"{there}; name those"
