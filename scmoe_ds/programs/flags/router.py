"""Megatron-core's flags for routers and widths of experts, as fields of the "scmoe" section."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from scmoe_ds.errors import ArgumentError

_FIELDS: dict[str, str] = {
    "moe_router_score_function": "score_func",
    "moe_router_topk_scaling_factor": "route_scale",
    "moe_router_num_groups": "num_expert_groups",
    "moe_router_group_topk": "num_limited_groups",
    "moe_z_loss_coeff": "z_loss_coefficient",
}
"""Flag (as argparse stores it) to field of `scmoe.router`."""
_WIDTHS = ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
_NEEDS_SCORES = ("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk")
_RATE = 1e-3
"""Megatron-core's --moe-router-bias-update-rate."""


def add_router(group: Any) -> None:
    """Adds the flags."""
    group.add_argument("--moe-ffn-hidden-size", type=int, help="width of a routed expert; default: the dense MLP's")
    group.add_argument(
        "--moe-shared-expert-intermediate-size", type=int, help="width of the shared expert; default: the dense MLP's"
    )
    group.add_argument(
        "--moe-router-score-function", choices=["softmax", "sigmoid"], help="scores; default: DeepSpeed's gate"
    )
    group.add_argument(
        "--moe-router-pre-softmax",
        action="store_true",
        help="weights are softmax scores, not divided by the sum of the chosen ones",
    )
    group.add_argument("--moe-router-topk-scaling-factor", type=float, help="factor on the weights")
    group.add_argument("--moe-router-num-groups", type=int, help="groups of consecutive experts")
    group.add_argument("--moe-router-group-topk", type=int, help="groups that a token may choose experts from")
    group.add_argument(
        "--moe-router-enable-expert-bias", action="store_true", help="balance loads by a bias on the choice"
    )
    group.add_argument("--moe-router-bias-update-rate", type=float, help="by how much a step moves it; default: 0.001")
    group.add_argument("--moe-z-loss-coeff", type=float, help="weight of the router z-loss")
    group.add_argument("--moe-router-load-balancing-type", choices=["none", "aux_loss"], help="none: no balancing loss")


def merge_router(args: argparse.Namespace, whole: dict[str, Any], put: Callable[[str, Any, str], None]) -> None:
    """Puts what the flags say into the section.

    Args:
        whole: the JSON with the other flags in it.
        put: takes a field of the section, its value, and the flag.

    Raises:
        ArgumentError: flags that Megatron-core computes otherwise than any router here, or that need another one.
    """
    for name, field in {**{each: each for each in _WIDTHS}, **_FIELDS}.items():
        if (value := getattr(args, name)) is not None:
            field = field if name in _WIDTHS else f"router.{field}"
            put(field, value, _flag(name))
    if args.moe_router_load_balancing_type == "none":
        put("aux_loss_coefficient", 0, "--moe-router-load-balancing-type none")
    if args.moe_router_pre_softmax:
        if args.moe_router_score_function == "sigmoid":
            raise ArgumentError("--moe-router-pre-softmax: sigmoid scores have no softmax; remove one of the two")
        put("router.route_norm", False, "--moe-router-pre-softmax")
    if args.moe_router_enable_expert_bias:
        rate = args.moe_router_bias_update_rate
        put("router.load_balance_coeff", _RATE if rate is None else rate, "--moe-router-enable-expert-bias")
    elif args.moe_router_bias_update_rate is not None:
        raise ArgumentError("--moe-router-bias-update-rate: needs --moe-router-enable-expert-bias")
    switches = args.moe_router_pre_softmax or args.moe_router_enable_expert_bias
    section = whole.get("scmoe")
    router = section.get("router") if isinstance(section, dict) else None
    if isinstance(router, dict) and (switches or any(getattr(args, name) is not None for name in _NEEDS_SCORES)):
        router.setdefault("score_func", "softmax")  # Megatron-core's default
    if args.moe_router_group_topk is not None and isinstance(section, dict):
        put("router.group_score_func", _group_score(args, section), "--moe-router-group-topk")


def _group_score(args: argparse.Namespace, section: Any) -> str:
    """Megatron-core adds up as many of a group's best scores as a token chooses experts per group."""
    top_k, groups = section.get("top_k"), args.moe_router_group_topk
    if not isinstance(top_k, int) or groups < 1 or top_k // groups not in (1, 2):
        raise ArgumentError(
            f"--moe-router-group-topk {groups} with --topk {top_k}: a group's score is that of its best one or two "
            "experts, so --topk must be one or two times as many; or set scmoe.router in the JSON"
        )
    return {1: "max", 2: "top2_sum"}[top_k // groups]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
