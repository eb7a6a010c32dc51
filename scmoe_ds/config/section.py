"""The "scmoe" section of a DeepSpeed JSON: its fields, their defaults and their rules.

DeepSpeed ignores top-level keys that it does not know, so the section is in the same file as optimizer, precision and
ZeRO. What the file alone shows to be wrong is found before a process group exists.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union

from pydantic import Field, StrictBool, ValidationError, model_validator

from scmoe_ds.config import offload_section
from scmoe_ds.config.adapt_section import OBJECTS_OF_ADAPT, AdaptConfig, section_of_base
from scmoe_ds.config.deepspeed_json import AnyConfig, load_deepspeed_json
from scmoe_ds.config.deepspeed_settings import check_settings
from scmoe_ds.config.expert_parallel import with_autoep
from scmoe_ds.config.messages import explain, fail, more_ranks, nearest
from scmoe_ds.config.names import (
    Architecture,
    BoolOrAuto,
    Dispatch,
    GateSoftmax,
    Join,
    MergeOrAuto,
    Position,
    TopK,
    in_present_words,
)
from scmoe_ds.config.offload_section import OffloadConfig
from scmoe_ds.config.overlap_section import OverlapConfig, Section
from scmoe_ds.config.router_section import RouterConfig
from scmoe_ds.config.section_rules import Rule, rules_of_depth, rules_of_section, rules_of_world
from scmoe_ds.errors import ScMoEConfigError

_AUTO_FIELDS = ("top_k", "merge", "drop_tokens")
"""Fields whose default follows from others."""


class ScMoEConfig(Section):
    """The validated `"scmoe"` section. Frozen; one instance describes all MoE layers of a model.

    Example:
        config = scmoe_ds.ScMoEConfig(num_experts=8, expert_parallel_size=2)
        config = scmoe_ds.ScMoEConfig.from_deepspeed("ds.json")

    Raises:
        ScMoEConfigError: an unknown field (with the nearest valid one), or a value that breaks a rule.
    """

    architecture: Architecture = Field(
        "scmoe",
        description="scmoe (paper eq. 7), or a baseline: topk, shared_expert (DeepSpeed's own layers), dgmoe (eq. 23), "
        "pipelined_topk, overlapped_shared_expert (this package's layers, with all overlap that they allow). as_is: "
        "the mathematics of a Hugging Face model, beside expert_parallel, where it is the default.",
    )
    position: Position = Field("pos2", description="Where the shortcut is taken in the preceding block.")
    first_layer_position: Union[Position, None] = Field(None, description="Another position for the first MoE layer.")
    shortcut_distance: int = Field(
        1, ge=1, strict=True, description="How many blocks before the MoE block the shortcut is taken (1: the paper's)."
    )
    join: Join = Field(
        "end",
        description="Where routed outputs are added: at the end of their block, or late, after the next attention.",
    )
    moe_every: int = Field(2, ge=1, strict=True, description="MoE frequency 1/moe_every; 1 is every block.")
    pairs_per_moe: int = Field(
        1, ge=1, strict=True, description="Consecutive pairs of blocks that share one MoE; dgmoe only (DGMoE-Share: 2)."
    )
    num_experts: Union[int, list[int]] = Field(8, description="Routed experts, or one number per MoE layer (pyramid).")
    top_k: TopK = Field(
        default_factory=lambda given: 2 if given.get("architecture") in ("topk", "pipelined_topk") else 1,
        json_schema_extra={"default": "auto"},
        description="Routed experts per token. auto: 2 for top-k architectures, else 1: as much computation in all.",
    )
    moe_ffn_hidden_size: Union[int, None] = Field(
        None, ge=1, strict=True, description="Width of a routed expert; null: as the dense MLP."
    )
    moe_shared_expert_intermediate_size: Union[int, None] = Field(
        None, ge=1, strict=True, description="Width of the shared expert; null: as the dense MLP."
    )
    merge: MergeOrAuto = Field(
        default_factory=lambda given: "cg2" if given.get("architecture") == "overlapped_shared_expert" else "cg1",
        json_schema_extra={"default": "auto"},
        description="How shared and routed outputs are added (paper eq. 6-7, 14-17); "
        "auto: cg1, for overlapped_shared_expert DeepSpeed's cg2.",
    )
    expert_parallel_size: int = Field(1, ge=1, strict=True, description="Ranks that share one set of experts.")
    expert_partition: int = Field(
        1, ge=1, strict=True, description="Parts of each routed expert, placed as experts; 1: it is whole."
    )
    expert_tensor_parallelism: Union[StrictBool, Literal["partition"]] = Field(
        False,
        description="Split each expert over tensor parallel ranks: true divides its products, partition (S-ETP) makes "
        "parts that tokens are sent to (no effect without tensor parallelism).",
    )
    router: RouterConfig = Field(default_factory=RouterConfig)
    capacity_factor: float = Field(2.0, gt=0, description="Tokens per expert in training, relative to an even split.")
    eval_capacity_factor: float = Field(2.0, gt=0, description="The same in evaluation.")
    min_capacity: int = Field(4, ge=0, strict=True, description="Least number of tokens that each expert accepts.")
    drop_tokens: BoolOrAuto = Field(
        default_factory=lambda given: getattr(given.get("router"), "score_func", None) is None,
        strict=True,
        json_schema_extra={"default": "auto"},
        description="false: every token reaches its experts. auto: true with DeepSpeed's gate, false with a router of "
        "another score function.",
    )
    use_rts: bool = Field(
        True, strict=True, description="Top-1 drops random tokens (true), or whichever torch.topk does (false)."
    )
    top2_2nd_expert_sampling: bool = Field(
        False, strict=True, description="DeepSpeed's Gumbel sampling of the second expert, in evaluation too."
    )
    gate_softmax: GateSoftmax = Field(
        "deepspeed",
        description="Among which experts a token's weights add up to 1: all, the chosen ones (eq. 2-3), or the chosen "
        "ones that are kept (not dropped). deepspeed: all for top_k 1, kept for more.",
    )
    noisy_gate_policy: Union[Literal["Jitter", "RSample"], None] = Field(None, description="DeepSpeed's gate noise.")
    aux_loss_coefficient: float = Field(0.01, ge=0, description="Weight of the load-balancing loss.")
    shortcut_norm: Literal["own", "shared"] = Field(
        "own", description="A norm of its own for the shortcut, or the backbone's norm of the same value (LongCat)."
    )
    post_norm: bool = Field(False, strict=True, description="A norm after the merge (Megatron-core's shortcut MoE).")
    dispatch: Dispatch = Field(
        "exact", description="Send and compute routed tokens only, or DeepSpeed's padded buffers."
    )
    all_to_all: Literal["auto", "collective", "send_receive", "hierarchical"] = Field(
        "auto", description="Primitive of dispatch and combine; auto: the fastest of a probe at start."
    )
    wire_dtype: Union[Literal["bf16", "fp8"], None] = Field(
        None, description="Number format of tokens between ranks; null: as they are computed."
    )
    replace: bool = Field(
        False, strict=True, description="Make DeepSpeed MoE layers of a model that others wrote ScMoE layers, at start."
    )
    tap: Union[str, None] = Field(
        None,
        description='Where a replaced layer\'s shortcut is taken, e.g. "{previous}.ln_2:input"; null: by position.',
    )
    shared_from: Union[int, Literal["fresh", "mean"]] = Field(
        "fresh", description="Shared expert of a replaced MoE that has none: new, mean of its experts, or one of them."
    )
    adapt: Union[AdaptConfig, None] = Field(
        None, description="A trained model becomes this ScMoE; null: the model is one already, or starts from nothing."
    )
    offload_experts: Union[OffloadConfig, None] = Field(
        None, description="Training keeps routed experts and their optimizer states out of the device's memory."
    )
    overlap: OverlapConfig = Field(default_factory=OverlapConfig)

    @classmethod
    def from_deepspeed(cls, config: AnyConfig | ScMoEConfig) -> ScMoEConfig:
        """Reads and validates the section of a DeepSpeed JSON; what is validated already is returned as it is.

        Args:
            config: a path, the parsed JSON, a ScMoEConfig, or what `scmoe_ds.config.loading.load` returned.

        Raises:
            ScMoEConfigError: an unreadable file, no section, an unknown key (with the nearest valid one), a value
                that breaks a rule, or a DeepSpeed setting outside of the section that ScMoE cannot run with.
        """
        if isinstance(section := getattr(config, "section", config), ScMoEConfig):
            return section
        whole = load_deepspeed_json(config)
        lines = check_settings(whole, cls.model_fields)
        try:
            parsed = cls._from_section(whole)
        except ScMoEConfigError as error:
            lines.insert(0, str(error))
        if lines:
            raise ScMoEConfigError("\n".join(lines))
        return parsed

    @classmethod
    def _from_section(cls, whole: Mapping[str, Any]) -> ScMoEConfig:
        if "scmoe" not in whole:
            near = nearest("scmoe", map(str, whole))
            hint = f', but "{near}"' if near else ""
            raise ScMoEConfigError(
                f'no "scmoe" section in the DeepSpeed JSON{hint}: add "scmoe": {{}} to use the defaults'
            )
        section = whole["scmoe"]
        if not isinstance(section, Mapping):
            raise fail("scmoe", section, "must be a JSON object")
        return cls(**with_autoep(whole, section))

    def __init__(self, **section: Any) -> None:
        try:
            super().__init__(**section)
        except ValidationError as error:
            objects = {"overlap": OverlapConfig.model_fields, "router": RouterConfig.model_fields}
            objects |= {"adapt": AdaptConfig.model_fields, "offload_experts": OffloadConfig.model_fields}
            objects |= {f"adapt.{name}": fields for name, fields in OBJECTS_OF_ADAPT.items()}
            fields = {"": type(self).model_fields, **objects}
            raise ScMoEConfigError(explain(error, section, fields)) from None

    @model_validator(mode="before")
    @classmethod
    def _without_auto(cls, section: Any) -> Any:
        """Former names become today's; an "auto" is a field that is left out."""
        if not isinstance(section, Mapping):
            return section
        given = offload_section.in_one_chunk(in_present_words(section))
        return {key: value for key, value in given.items() if key not in _AUTO_FIELDS or value != "auto"}

    @model_validator(mode="after")
    def _rules(self) -> ScMoEConfig:
        self._require(rules_of_section(self))
        return self

    def _require(self, rules: Iterable[Rule]) -> None:
        for path, broken, rule in rules:
            if broken:
                value = functools.reduce(getattr, path.split("."), self)
                raise fail(f"scmoe.{path}", value, rule)

    @property
    def written(self) -> dict[str, Any]:
        """The fields that the section has, with their values. A layer that exists keeps its own for the others."""
        return {field: getattr(self, field) for field in self.model_fields_set}

    @property
    def has_shortcut(self) -> bool:
        """Whether routed experts read a preceding layer."""
        return self.architecture in ("scmoe", "dgmoe")

    @property
    def is_scheduled(self) -> bool:
        """Whether the MoE runs in stages, under a schedule."""
        return self.architecture not in ("topk", "shared_expert")

    def num_operators(self, position: str | None = None) -> int:
        """How many backbone operators stand between shortcut and join (paper section 3; Pos-2, every second: 3)."""
        if not self.has_shortcut:
            return 2 if self.architecture == "overlapped_shared_expert" else 0
        position = position or self.position
        shared = 0 if self.architecture == "dgmoe" else 1
        # Pos-1 sees every block after the tapped one, Pos-2 also that block's MLP, Pos-3 also its attention.
        blocks_between = (1 if self.moe_every == 1 else self.shortcut_distance) - 1
        return {"pos1": 0, "pos2": 1, "pos3": 2}[position] + 2 * blocks_between + 1 + shared

    def moe_layers(self, num_layers: int) -> int:
        """Number of MoE layers in a model of `num_layers` blocks."""
        return num_layers // self.moe_every

    def experts_of_layers(self, moe_layers: int) -> list[int]:
        """Routed experts of each MoE layer. A pyramid of another length raises a ScMoEConfigError."""
        counts = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts] * moe_layers
        if len(counts) != moe_layers:
            raise fail("scmoe.num_experts", counts, f"needs {moe_layers} numbers, one per MoE layer")
        return list(counts)

    def experts_of(self, moe_layer: int) -> int:
        """Number of routed experts of an MoE layer, from 0."""
        counts = self.num_experts
        return counts[min(moe_layer, len(counts) - 1)] if isinstance(counts, list) else counts

    def of_layer(self, moe_layer: int) -> ScMoEConfig:
        """What an MoE layer, from 0, follows: this section, or that of its base if it is never converted."""
        adapt = self.adapt
        if adapt is None or adapt.base is None or adapt.layers is None or moe_layer in adapt.layers:
            return self
        base: ScMoEConfig = section_of_base(self)
        return base

    def check_model(self, num_layers: int) -> None:
        """Rules that need the model's depth.

        Raises:
            ScMoEConfigError: a depth that moe_every does not divide, a pyramid of another length, or converted layers
                that the model does not have.
        """
        layers = self.moe_layers(num_layers)
        self._require(rules_of_depth(self, num_layers, layers))
        self.experts_of_layers(layers)

    def check_world(self, world_size: int, tensor_parallel_size: int = 1) -> None:
        """Rules that need the number of ranks.

        Raises:
            ScMoEConfigError: an expert-parallel size that does not fit the world size or the tensor-parallel one.
        """
        if world_size % (tp := tensor_parallel_size):
            rule = f"must divide the world size {world_size}; {more_ranks(tp)}"
            raise ScMoEConfigError(f"--tensor-model-parallel-size {tp}: {rule}")
        self._require(rules_of_world(self, world_size, tp))

    def over_tensor_parallel(self, ranks: int) -> ScMoEConfig:
        """`expert_tensor_parallelism` "partition" said by `expert_partition` and `expert_parallel_size`."""
        if self.expert_tensor_parallelism != "partition":
            return self
        sizes = {name: getattr(self, name) * ranks for name in ("expert_partition", "expert_parallel_size")}
        return self.model_copy(update={**sizes, "expert_tensor_parallelism": False})
