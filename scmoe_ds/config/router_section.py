"""`scmoe.router`: how tokens choose their experts, where that is not left to DeepSpeed's gate. Names as in AutoEP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Union

from pydantic import Field, ValidationError

from scmoe_ds.config.messages import explain
from scmoe_ds.config.overlap_section import Section
from scmoe_ds.errors import ScMoEConfigError

OF_SCORES = ("route_norm", "route_scale", "num_expert_groups", "num_limited_groups", "group_score_func")
"""Fields that say how scores become choices and weights."""
_NOT_DEEPSPEEDS = (*OF_SCORES, "load_balance_coeff", "load_balance_rule")
"""Fields that a router with a score function reads; DeepSpeed's gate has no such parts."""


class RouterConfig(Section):
    """`scmoe.router`: scores, choice and weights of a router, and what keeps its experts evenly loaded.

    Example:
        deepseek_v3 = scmoe_ds.RouterConfig(
            score_func="sigmoid", route_scale=2.5, num_expert_groups=8, num_limited_groups=4, load_balance_coeff=0.001
        )
        layer = scmoe_ds.ScMoE(hidden_size, expert, num_experts=256, k=8, router=deepseek_v3)

    Raises:
        ScMoEConfigError: an unknown field (with the nearest valid one), or a value that breaks a rule.
    """

    score_func: Union[Literal["softmax", "sigmoid", "model"], None] = Field(
        None,
        description="Scores of all experts: sigmoid (DeepSeek-V3, GLM-4) or softmax (Mixtral, Qwen, DeepSeek-V2, "
        "LongCat), in fp32; null: DeepSpeed's gate, and beside AutoEP model: the Hugging Face model's own router.",
    )
    route_norm: Union[bool, None] = Field(
        None,
        strict=True,
        description="Divide a token's weights by their sum, as DeepSeek-V3, Mixtral and Qwen3 do (DeepSeek-V2 and "
        "LongCat do not); null: if top_k > 1.",
    )
    route_scale: float = Field(1.0, gt=0, description="Factor on all weights (DeepSeek-V3: 2.5, LongCat: 6).")
    num_expert_groups: Union[int, None] = Field(
        None, ge=1, description="Groups of consecutive experts, to limit to how many nodes a token goes; null: none."
    )
    num_limited_groups: Union[int, None] = Field(
        None, ge=1, description="How many of these groups a token may choose experts from."
    )
    group_score_func: Literal["top2_sum", "max"] = Field(
        "top2_sum", description="A group's score: of its two best experts (DeepSeek-V3), or its best one (DeepSeek-V2)."
    )
    load_balance_coeff: Union[float, None] = Field(
        None,
        ge=0,
        description="Step by which each optimizer step moves a bias on the choice towards even loads (DeepSeek-V3: "
        "0.001); 0: a bias that stays, to fine-tune; null: no bias.",
    )
    load_balance_rule: Literal["sign", "proportional"] = Field(
        "sign", description="The step has this size (DeepSeek), or is proportional to the missing share (LongCat)."
    )
    z_loss_coefficient: float = Field(
        0.0, ge=0, description="Weight of the mean squared log-sum-exp of the logits, against logits that grow."
    )

    def __init__(self, **section: Any) -> None:
        try:
            super().__init__(**section)
        except ValidationError as error:
            raise ScMoEConfigError(explain(error, section, {"": type(self).model_fields}, "scmoe.router")) from None

    @property
    def has_bias(self) -> bool:
        """Whether the choice is corrected by a bias."""
        return self.load_balance_coeff is not None

    def normalises(self, top_k: int) -> bool:
        """Whether a token's weights are divided by their sum."""
        return top_k > 1 if self.route_norm is None else self.route_norm

    def rules(self, top_k: int, num_experts: int) -> Iterator[tuple[str, bool, str]]:
        """A field, whether its value breaks the rule, and the rule with the remedy.

        Args:
            num_experts: of a layer; identity experts count.
        """
        for field in _NOT_DEEPSPEEDS:
            idle = self.score_func is None and getattr(self, field) != type(self).model_fields[field].default
            yield field, idle, 'DeepSpeed\'s gate has no such part; set "score_func", or remove it'
        alone = "a token's only weight would be 1 and the router could not learn; remove it, or use more experts"
        yield "route_norm", bool(self.route_norm) and top_k == 1, alone
        groups, limit = self.num_expert_groups, self.num_limited_groups
        yield "num_expert_groups", groups is not None and limit is None, "set num_limited_groups, too"
        yield "num_limited_groups", groups is None and limit is not None, "set num_expert_groups, too"
        if groups is None or limit is None:
            return
        yield "num_expert_groups", num_experts % groups > 0, f"must divide the number of experts ({num_experts})"
        yield "num_limited_groups", limit > groups, f"must be at most num_expert_groups = {groups}"
        size = num_experts // groups
        two = self.group_score_func == "top2_sum" and size < 2
        yield "num_expert_groups", two, 'a group of one expert has no two best ones; use fewer, or "max"'
        few = f"{limit} × {size} experts are fewer than the {top_k} that a token chooses; use more groups"
        yield "num_limited_groups", limit * size < top_k, few
