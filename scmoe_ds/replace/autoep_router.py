"""What the "scmoe" section adds to the router of an AutoEP layer: load balancing by its bias, and a z-loss.

AutoEP copies the bias `e_score_correction_bias` of a model, but never moves it: it refuses its own load_balance_coeff.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from scmoe_ds.config.messages import fail
from scmoe_ds.config.router_section import RouterConfig
from scmoe_ds.moe.balance import BiasBalance
from scmoe_ds.moe.router import CORRECTION_BIAS
from scmoe_ds.moe.z_loss import ZLoss


def extend_router(layer: Any, router: RouterConfig) -> None:
    """Adds to an AutoEP layer's router what the section asks for.

    Raises:
        ScMoEConfigError: a model without a correction bias, or with one that its optimizer trains, is to be balanced.
    """
    if router.z_loss_coefficient:
        layer.z_loss = ZLoss(router.z_loss_coefficient)
    coefficient = router.load_balance_coeff
    if not coefficient:
        return
    bias = getattr(layer.router, CORRECTION_BIAS, None)
    if bias is None or isinstance(bias, nn.Parameter):
        what = "no bias on the choice of experts" if bias is None else "one that its optimizer trains"
        rule = (
            f"{layer.name} ({layer.model_family}) has {what}, as DeepSeek-V3, GLM-4-MoE and LongCat-Flash have in "
            f"{CORRECTION_BIAS}; remove it: router_aux_loss_coef of the model's config evens out loads"
        )
        raise fail("scmoe.router.load_balance_coeff", coefficient, rule)
    # DeepSpeed casts buffers with the model. Steps of 0.001 would be lost in bf16.
    setattr(layer.router, CORRECTION_BIAS, bias.float())
    layer.balance = BiasBalance(layer.router, coefficient, router.load_balance_rule, layer.num_experts)


@contextmanager
def attached(z_loss: ZLoss | None, gate: nn.Module) -> Iterator[None]:
    """Inside the block the gate's logits carry the z-loss. Outside, a model that reads them for its own balancing loss
    calls the gate again."""
    if z_loss is None:
        yield
        return

    def attach(module: nn.Module, args: Any, logits_TE: Tensor) -> Tensor:
        return z_loss.attach(logits_TE)

    hook = gate.register_forward_hook(attach)
    try:
        yield
    finally:
        hook.remove()
