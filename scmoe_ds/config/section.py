"""The "scmoe" section of a DeepSpeed JSON: fields, defaults, rules and the errors that explain them.

DeepSpeed ignores top-level keys that it does not know, so the section travels in the same file as the
optimizer, precision and ZeRO settings. Everything that a single look at the file (and, later, at the model and
the world size) can rule out is ruled out here, before a process group exists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, Union

from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from scmoe_ds.config.deepspeed_json import load_deepspeed_json
from scmoe_ds.config.deepspeed_keys import unquoted
from scmoe_ds.config.deepspeed_settings import check_settings
from scmoe_ds.config.limits import MOST_CHUNKS
from scmoe_ds.config.messages import explain, fail, nearest
from scmoe_ds.errors import ScMoEConfigError

Architecture = Literal["scmoe", "topk", "shared_expert", "dgmoe", "pipelined_topk", "overlapped_shared_expert"]
Position = Literal["pos1", "pos2", "pos3"]
Merge = Literal["add", "cg1", "cg2"]
Dispatch = Literal["exact", "padded"]
GateSoftmax = Literal["deepspeed", "all", "chosen", "kept"]
FORMER_GATE_SOFTMAX: dict[str, GateSoftmax] = {"before_topk": "deepspeed", "after_topk": "kept"}
"""Names of before, for what they did."""
Auto = Literal["auto"]


class _Section(DeepSpeedConfigModel):
    """DeepSpeed's config model without its "auto" filter: here "auto" is a value, valid only where declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        super().__init__(strict=True, **data)

    @field_validator("*", mode="before")
    @classmethod
    def _no_quiet_conversions(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read "8" and true as the integers 8 and 1; in a hand-written file they are slips.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("is true or false where a number or a name is wanted")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("is too large")
        if isinstance(value, str) and unquoted(value) is not None:
            raise ValueError("is a string; write the number without quotes")
        return value


class OverlapConfig(_Section):
    """`scmoe.overlap`: when the routed experts are computed."""

    enabled: bool = Field(True, strict=True, description="false: the same operators with blocking communication.")
    expert_slot: Union[int, list[int], Auto] = Field(
        "auto",
        description="Before which backbone operator the experts run: 1 … number of operators + 1 (after the last); "
        "a list gives each chunk its own, in ascending order.",
    )
    num_chunks: Union[int, Auto] = Field(
        "auto", description="Pieces that the routed tokens are cut into, so that experts also hide communication."
    )
    calibration_steps: int = Field(
        5, ge=0, strict=True, description='Micro-batches that are timed for "auto"; 0: the slot halves the FLOPs.'
    )
    calibration_file: Union[str, None] = Field(
        None, description="JSON of measured times: read if it exists, otherwise written after the calibration."
    )

    @field_validator("expert_slot", "num_chunks")
    @classmethod
    def _positive_or_auto(cls, value: int | str | list[int]) -> int | str | list[int]:
        numbers = value if isinstance(value, list) else [value]
        if not numbers or any(isinstance(number, int) and number < 1 for number in numbers):
            raise ValueError('must be at least 1, or "auto"')
        if isinstance(value, list) and value != sorted(value):
            raise ValueError("the chunks run in order: their slots must ascend")
        return value

    @field_validator("num_chunks")
    @classmethod
    def _few(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value > MOST_CHUNKS:
            raise ValueError(f"more than {MOST_CHUNKS} chunks never paid; use fewer")
        return value


class ScMoEConfig(_Section):
    """The validated `"scmoe"` section. Frozen; one instance describes all MoE layers of a model.

    Raises:
        ScMoEConfigError: through `from_deepspeed`, `check_model` and `check_world`.
    """

    architecture: Architecture = Field(
        "scmoe",
        description="scmoe (paper eq. 7), or a baseline: topk, shared_expert (DeepSpeed's own layers), dgmoe (eq. 23), "
        "pipelined_topk, overlapped_shared_expert (this package's layers, with all overlap that they allow).",
    )
    position: Position = Field("pos2", description="Where the shortcut is taken in the preceding block.")
    first_layer_position: Union[Position, None] = Field(None, description="Another position for the first MoE layer.")
    shortcut_distance: int = Field(
        1, ge=1, strict=True, description="How many blocks before the MoE block the shortcut is taken (1: the paper's)."
    )
    moe_every: int = Field(2, ge=1, strict=True, description="MoE frequency 1/moe_every; 1 is every block.")
    pairs_per_moe: int = Field(
        1, ge=1, strict=True, description="Consecutive pairs of blocks that share one MoE; dgmoe only (DGMoE-Share: 2)."
    )
    num_experts: Union[int, list[int]] = Field(8, description="Routed experts, or one number per MoE layer (pyramid).")
    top_k: Union[int, Auto] = Field(
        "auto",
        description="Routed experts per token. auto: 2 for top-k architectures, else 1: as much computation in all.",
    )
    merge: Merge | Auto = Field(
        "auto",
        description="How shared and routed outputs are added (paper eq. 6-7, 14-17); "
        "auto: cg1, for overlapped_shared_expert DeepSpeed's cg2.",
    )
    expert_parallel_size: int = Field(1, ge=1, strict=True, description="Ranks that share one set of experts.")
    expert_tensor_parallelism: bool = Field(
        False,
        strict=True,
        description="Split each expert over tensor parallel ranks (no effect without tensor parallelism).",
    )
    capacity_factor: float = Field(2.0, gt=0, description="Tokens per expert in training, relative to an even split.")
    eval_capacity_factor: float = Field(2.0, gt=0, description="The same in evaluation.")
    min_capacity: int = Field(4, ge=0, strict=True, description="Least number of tokens that each expert accepts.")
    drop_tokens: bool = Field(True, strict=True, description="false: every token reaches its experts.")
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
    overlap: OverlapConfig = Field(default_factory=OverlapConfig)

    @classmethod
    def from_deepspeed(cls, config: str | os.PathLike[str] | Mapping[str, Any]) -> ScMoEConfig:
        """Reads and validates the section of a DeepSpeed JSON.

        Args:
            config: a path, or the parsed JSON.

        Raises:
            ScMoEConfigError: an unreadable file, no section, an unknown key (with the nearest valid one), a value
                that breaks a rule, or a DeepSpeed setting outside of the section that ScMoE cannot run with.
        """
        whole = load_deepspeed_json(config)
        lines = check_settings(whole)
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
            hint = f' (is "{near}" a slip?)' if near else ""
            raise ScMoEConfigError(
                f'no "scmoe" section in the DeepSpeed JSON{hint}: add "scmoe": {{}} to use the defaults'
            )
        section = whole["scmoe"]
        if not isinstance(section, Mapping):
            raise fail("scmoe", section, "must be a JSON object")
        try:
            return cls(**section)
        except ValidationError as error:
            raise ScMoEConfigError(
                explain(error, section, {"": cls.model_fields, "overlap": OverlapConfig.model_fields})
            ) from None

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, section: Any) -> Any:
        return in_present_words(section) if isinstance(section, Mapping) else section

    @model_validator(mode="after")
    def _rules(self) -> ScMoEConfig:
        if self.top_k == "auto":
            # Frozen models are set through __dict__; the field is an int for everyone who reads it afterwards.
            self.__dict__["top_k"] = 2 if self.architecture in ("topk", "pipelined_topk") else 1
        if self.merge == "auto":
            self.__pydantic_fields_set__.discard("merge")  # a replaced Residual MoE then keeps its own
            self.__dict__["merge"] = "cg2" if self.architecture == "overlapped_shared_expert" else "cg1"
        for path, rule, broken in self._broken_rules():
            if broken:
                value: Any = self
                for key in path.split("."):
                    value = getattr(value, key)
                raise fail(f"scmoe.{path}", value, rule)
        return self

    def _broken_rules(self) -> list[tuple[str, str, bool]]:
        """(field, rule with remedy, is it broken) for every rule that spans fields."""
        counts = self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
        k, ep, slot, chunks = self.top_k, self.expert_parallel_size, self.overlap.expert_slot, self.overlap.num_chunks
        assert isinstance(k, int)
        positions = {"position": self.position, "first_layer_position": self.first_layer_position or "pos1"}
        taps = self.has_shortcut
        rules = [
            ("num_experts", "needs at least one number, one per MoE layer", not counts),
            ("num_experts", "each number must be at least 1", any(n < 1 for n in counts)),
            ("num_experts", f"must be divisible by scmoe.expert_parallel_size = {ep}", any(n % ep for n in counts)),
            ("top_k", "must be at least 1", k < 1),
            ("top_k", f"cannot exceed the number of experts ({min(counts, default=0)})", k > min(counts, default=k)),
            (
                "top_k",
                "dgmoe routes one expert from each of two layers; set 1",
                self.architecture == "dgmoe" and k != 1,
            ),
            (
                "num_experts",
                "dgmoe's two choices are distinct experts; it needs at least 2",
                self.architecture == "dgmoe" and min(counts, default=2) < 2,
            ),
            (
                "pairs_per_moe",
                "only dgmoe has no part of a MoE that belongs to one pair; set 1",
                self.pairs_per_moe > 1 and self.architecture != "dgmoe",
            ),
            (
                "num_experts",
                f"pairs that share a MoE (pairs_per_moe = {self.pairs_per_moe}) have one number of experts",
                isinstance(self.num_experts, list)
                and any(n != counts[i - i % self.pairs_per_moe] for i, n in enumerate(counts)),
            ),
            (
                "noisy_gate_policy",
                "DeepSpeed applies RSample with top_k 1 only; use Jitter or null",
                self.noisy_gate_policy == "RSample" and k > 1,
            ),
            (
                "shortcut_distance",
                f"the shortcut starts within the run of moe_every = {self.moe_every} blocks; "
                f"use at most {max(self.moe_every - 1, 1)}",
                self.shortcut_distance > max(self.moe_every - 1, 1),
            ),
        ]
        rules += [
            (
                field,
                "with an MoE in every block (moe_every = 1) the preceding block has no plain MLP to overlap; "
                "use pos1, which already gives the longest window",
                taps and self.moe_every == 1 and position != "pos1",
            )
            for field, position in positions.items()
        ]
        if self.is_scheduled and slot != "auto":
            last = min(self.num_operators(p) for p in {self.position, self.first_layer_position or self.position}) + 1
            highest = slot[-1] if isinstance(slot, list) else slot
            # A replaced layer's backbone is the model's own: its first forward pass shows the operators.
            rules.append(
                (
                    "overlap.expert_slot",
                    f"the backbone has {last - 1} operators here; use 1 … {last}",
                    not self.replace and isinstance(highest, int) and highest > last,
                )
            )
            rules.append(
                (
                    "overlap.expert_slot",
                    f"gives each chunk its slot, but num_chunks = {chunks}; remove one",
                    isinstance(slot, list) and chunks not in ("auto", len(slot)),
                )
            )
        return rules

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

    def experts_per_layer(self, num_layers: int) -> list[int]:
        """Number of routed experts of each MoE layer."""
        layers = self.moe_layers(num_layers)
        return list(self.num_experts) if isinstance(self.num_experts, list) else [self.num_experts] * layers

    def check_model(self, num_layers: int) -> None:
        """Rules that need the model's depth.

        Raises:
            ScMoEConfigError: a depth that moe_every does not divide, or a pyramid of another length.
        """
        if num_layers % self.moe_every:
            raise fail("scmoe.moe_every", self.moe_every, f"must divide --num-layers {num_layers}")
        if self.moe_layers(num_layers) % self.pairs_per_moe:
            raise fail(
                "scmoe.pairs_per_moe",
                self.pairs_per_moe,
                f"must divide the {self.moe_layers(num_layers)} pairs of --num-layers {num_layers}",
            )
        if isinstance(self.num_experts, list) and len(self.num_experts) != self.moe_layers(num_layers):
            raise fail(
                "scmoe.num_experts",
                self.num_experts,
                f"needs {self.moe_layers(num_layers)} numbers, one per MoE layer of {num_layers} layers",
            )

    def check_world(self, world_size: int, tensor_parallel_size: int = 1) -> None:
        """Rules that need the number of ranks.

        Raises:
            ScMoEConfigError: an expert-parallel size that does not fit the world size or the tensor-parallel one.
        """
        ep, tp = self.expert_parallel_size, tensor_parallel_size
        if world_size % tp:
            raise ScMoEConfigError(
                f"--tensor-model-parallel-size {tp}: must divide the world size {world_size}; "
                "change it or the number of processes"
            )
        if world_size % ep:
            raise fail(
                "scmoe.expert_parallel_size",
                ep,
                f"must divide the world size {world_size}; change it or the number of processes",
            )
        if self.expert_tensor_parallelism and world_size // tp % ep:
            raise fail(
                "scmoe.expert_parallel_size",
                ep,
                f"with expert_tensor_parallelism it must divide the {world_size // tp} data-parallel ranks; "
                "change it, or set expert_tensor_parallelism to false",
            )
        if not self.expert_tensor_parallelism and ep % tp and tp % ep:
            raise fail(
                "scmoe.expert_parallel_size", ep, f"it or --tensor-model-parallel-size {tp} must divide the other"
            )


def in_present_words(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section in which former names mean what they did: JSON files and checkpoints of before keep their numbers."""
    former = section.get("gate_softmax")
    if not isinstance(former, str) or former not in FORMER_GATE_SOFTMAX:
        return dict(section)
    ignored = section.get("architecture") in ("topk", "shared_expert")  # DeepSpeed's own layers did not read it
    return {**section, "gate_softmax": "deepspeed" if ignored else FORMER_GATE_SOFTMAX[former]}
