"""`scmoe.adapt`: a trained model becomes a ScMoE. What is kept of it, what changes, and who teaches the result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Union

from pydantic import Field, ValidationError

from scmoe_ds.config.messages import explain
from scmoe_ds.config.names import Merge
from scmoe_ds.config.overlap_section import Section
from scmoe_ds.errors import ScMoEConfigError

SharedExpert = Literal["mean", "busiest", "fit", "none"]
SAME_LAYER = {"topk": "pipelined_topk", "shared_expert": "overlapped_shared_expert"}
"""DeepSpeed's own layers to those of this package with the same parameters and the same function."""


class BaseConfig(Section):
    """`scmoe.adapt.base`: how an MoE layer of this package's GPT ran before; the programs fill it in."""

    architecture: Literal["pipelined_topk", "overlapped_shared_expert"] = Field(
        "pipelined_topk", description="This package's layer of the same function as the source's."
    )
    top_k: int = Field(2, ge=1, strict=True, description="Routed experts per token.")
    merge: Merge = Field("add", description="How a source with a shared expert adds both outputs.")

    def keeps_coefficient(self, merge: Merge) -> bool:
        """Whether the base needs a coefficient network of its own, beside that of the ScMoE's merge."""
        shared = self.architecture == "overlapped_shared_expert"
        return shared and self.merge not in ("add", merge)


class DistillConfig(Section):
    """`scmoe.adapt.distill`: the loss alpha · KL(teacher ‖ student) + beta · LM + gamma · match."""

    alpha: float = Field(1.0, ge=0, description="Weight of the divergence from the teacher's distribution.")
    beta: float = Field(1.0, ge=0, description="Weight of the language-model loss of the text itself.")
    gamma: float = Field(
        0.0, ge=0, description="Weight of the relative squared distance from what the teacher's MoE blocks put out."
    )
    temperature: float = Field(1.0, gt=0, description="By which both models' logits are divided in the divergence.")
    teacher_top_n: int = Field(
        64, ge=1, strict=True, description="Best tokens of each place that stored logits keep; the rest is one number."
    )
    teacher_logits: Union[str, None] = Field(
        None, description="Directory of the teacher's best logits, so that no teacher is in memory; made if need be."
    )

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        """A field, whether its value breaks the rule, and the rule with the remedy."""
        yield "alpha", not (self.alpha or self.beta or self.gamma), "all three weights are 0; nothing would be learnt"
        idle = self.alpha == 0 and self.teacher_logits is not None
        yield "teacher_logits", idle, "with alpha = 0 nothing is learnt from logits; remove it, or set alpha"
        yield "teacher_logits", self.teacher_logits == "", "name a directory, or remove it"
        stored = self.gamma > 0 and self.teacher_logits is not None
        yield "gamma", stored, "stored logits hold no outputs of MoE blocks; set 0, or remove teacher_logits"


class AdaptConfig(Section):
    """`scmoe.adapt`: a trained model becomes a ScMoE whose weights are kept.

    Raises:
        ScMoEConfigError: an unknown field (with the nearest valid one), or a value that breaks a rule.
    """

    source: Union[str, None] = Field(
        None, description="Checkpoint, export or Hugging Face directory of the trained model; null: the model itself."
    )
    base: Union[BaseConfig, None] = Field(
        None, description="How layers that are not converted run; filled in from the source."
    )
    layers: Union[list[int], None] = Field(
        None, description="Numbers of the MoE layers to convert, from 0, in the order of conversion; null: all."
    )
    shared_expert: Union[SharedExpert, None] = Field(
        None,
        description="Shared expert of a source without one: mean of its experts, the busiest one, fit (least squares "
        "on text), or none. null: mean for this package's GPT, none for Hugging Face's models.",
    )
    convert_every: int = Field(
        0, ge=0, strict=True, description="Convert one more layer every so many steps; 0: all of them at the start."
    )
    distill: Union[DistillConfig, None] = Field(
        None, description="The source teaches the converted model; null: the text alone does."
    )

    def __init__(self, **section: Any) -> None:
        try:
            super().__init__(**section)
        except ValidationError as error:
            fields = {"": type(self).model_fields, **OBJECTS_OF_ADAPT}
            raise ScMoEConfigError(explain(error, section, fields, "scmoe.adapt")) from None

    def converted_after(self, steps: int, moe_layers: int) -> list[int]:
        """The MoE layers that run as ScMoE after some optimizer steps, in a model with so many of them.

        Without `layers` the last layer of the model is converted first.
        """
        order = list(range(moe_layers))[::-1] if self.layers is None else self.layers
        return sorted(order[: 1 + steps // self.convert_every] if self.convert_every else order)

    def converted_at(self, iteration: int, moe_layers: int) -> list[int]:
        """Those that ran as ScMoE in the step that a checkpoint of this iteration ends with; 0: before the first."""
        return self.converted_after(max(iteration - 1, 0), moe_layers)

    def rules(self) -> Iterator[tuple[str, bool, str]]:
        """A field, whether its value breaks the rule, and the rule with the remedy."""
        layers = self.layers or []
        yield "source", self.source == "", "name the trained model's directory, or remove it"
        yield "layers", min(layers, default=0) < 0, "MoE layers are numbered from 0"
        yield "layers", len(set(layers)) < len(layers), "name each MoE layer once"
        for field, broken, rule in self.distill.rules() if self.distill is not None else ():
            yield f"distill.{field}", broken, rule


def same_layers(section: Any) -> dict[str, Any]:
    """Fields of a ScMoEConfig by which DeepSpeed's layers become this package's equal ones; its shared expert merges by
    cg2."""
    merge = "cg2" if section.architecture == "shared_expert" else section.merge
    return {"architecture": SAME_LAYER.get(section.architecture, section.architecture), "merge": merge}


def base_of(section: Any) -> BaseConfig:
    """How the layers of a ScMoEConfig run, as the base of what they become."""
    same = same_layers(section)
    alone = same["architecture"] == "pipelined_topk"
    return BaseConfig(**{**same, "merge": "add"} if alone else same, top_k=section.top_k)


def section_of_base(section: Any) -> Any:
    """The section of layers that are not converted, of a ScMoEConfig whose base is known.

    A slot that the section fixes is one of the ScMoE's operators: it says nothing here.
    """
    base, overlap = section.adapt.base, section.overlap
    routed_alone = base.architecture == "pipelined_topk"
    changes = {
        **base.model_dump(),
        "join": "end",
        "adapt": None,
        "overlap": overlap.model_copy(update={"expert_slot": "auto"}),
        "moe_shared_expert_intermediate_size": None if routed_alone else section.moe_shared_expert_intermediate_size,
    }
    return section.model_copy(update=changes)


OBJECTS_OF_ADAPT = {"base": BaseConfig.model_fields, "distill": DistillConfig.model_fields}
"""The objects in the section, with their fields."""
