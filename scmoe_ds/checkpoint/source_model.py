"""The trained model that a ScMoE is made of: what it is, and what may become of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scmoe_ds.checkpoint import description as fields
from scmoe_ds.checkpoint.export import open_weights
from scmoe_ds.checkpoint.parsing import parse
from scmoe_ds.checkpoint.reshard import Weights
from scmoe_ds.checkpoint.surgery import Surgery
from scmoe_ds.config.adapt_section import AdaptConfig, BaseConfig, base_of
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import CheckpointError, ScMoEConfigError
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.vision_language_settings import reads_images
from scmoe_ds.parallel.agreement import run_together

_SHARED_WIDTH = "moe_shared_expert_intermediate_size"
_OF_THE_SCMOE = {
    "architecture",
    "position",
    "first_layer_position",
    "shortcut_distance",
    "top_k",
    "merge",
    "shortcut_norm",
    "join",
    _SHARED_WIDTH,
}
"""Fields that decide on tensors or function, and that the surgery may change."""


@dataclass(frozen=True)
class SourceModel:
    """A trained GPT of this package without a shortcut.

    Attributes:
        weights: its whole parameters, read one at a time.
        settings, config: its shape and its section.
        description: of its checkpoint or export.
    """

    weights: Weights
    settings: GPTSettings
    config: ScMoEConfig
    description: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path, contents: bool = True) -> SourceModel:
        """Collective.

        Args:
            path: a checkpoint, a directory of them (its latest), or an export.
            contents: compare all files with their checksums; otherwise only their sizes.

        Raises:
            CheckpointError: on every rank: none of these, damaged, or a model that cannot become a ScMoE.
        """
        weights, description = open_weights(path, contents)
        return run_together(lambda: cls._of(path, weights, description))

    @classmethod
    def _of(cls, path: Path, weights: Weights, description: Mapping[str, Any]) -> SourceModel:
        parsed = parse(description, weights.path)
        if not isinstance(parsed.settings, GPTSettings) or reads_images(parsed.settings):
            kind = "vision-language model" if isinstance(parsed.settings, GPTSettings) else "Swin"
            raise CheckpointError(f"{path}: is a checkpoint of a {kind}; only text models can be adapted")
        architecture, join = parsed.config.architecture, parsed.config.join
        if parsed.config.has_shortcut:
            partly = parsed.config.adapt is not None and parsed.config.adapt.layers is not None
            what = "a ScMoE in part" if partly else "a ScMoE" if architecture == "scmoe" else "a DGMoE"
            raise CheckpointError(
                f'{path}: is {what} already (architecture "{architecture}"); go on training it with --load, or name '
                "the model that it was made of"
            )
        if join == "late":
            raise CheckpointError(
                f'{path}: was trained with scmoe.join = "late"; only a model whose MoEs join at the end of their block '
                "can be adapted"
            )
        return cls(weights, parsed.settings, parsed.config, description)

    @property
    def has_shared_expert(self) -> bool:
        """Whether its MoE layers have one."""
        return base_of(self.config).architecture == "overlapped_shared_expert"

    def student(self, changes: Mapping[str, Any], layers: Sequence[int] | None = None) -> ScMoEConfig:
        """The section of the ScMoE that it becomes; a partly converted one knows its base.

        Args:
            changes: fields of the section that are not as in the source.
            layers: MoE layers to convert; None: all.

        Raises:
            ScMoEConfigError: settings that contradict each other, or layers that the model does not have.
        """
        old, every = self.config, list(range(self.config.moe_layers(self.settings.num_layers)))
        section = old.model_dump(mode="json") | {
            "architecture": "scmoe",
            "position": "pos1" if old.moe_every == 1 else "pos2",
            "first_layer_position": None,
            "shortcut_distance": 1,
            "shortcut_norm": "own",
            "merge": base_of(old).merge if self.has_shared_expert else "cg1",
            "overlap": {},
            **changes,
        }
        if not self.has_shared_expert:
            section[_SHARED_WIDTH] = old.moe_ffn_hidden_size
        if layers is not None and sorted(layers) != every:
            section["adapt"] = {"base": base_of(old).model_dump(), "layers": list(layers)}
        config = ScMoEConfig.from_deepspeed({"scmoe": section})
        self.check(self.settings, config)
        return config

    def with_base(self, config: ScMoEConfig) -> ScMoEConfig:
        """A section whose `adapt` has this model's base. Fields that the section leaves out and that decide on the
        weights are the source's.

        Raises:
            ScMoEConfigError: another base, or fields that contradict the source's.
        """
        return with_base_of(config, self.config, base_of(self.config), self.weights.path)

    def surgery(
        self,
        config: ScMoEConfig,
        busiest: Sequence[int] | None = None,
        fitted: Mapping[str, Tensor] | None = None,
    ) -> Surgery:
        """The weights of the ScMoE of a section; see `Surgery`."""
        return Surgery(self.weights, self.settings, self.config, config, busiest, fitted)

    def check(self, settings: GPTSettings, config: ScMoEConfig) -> None:
        """Whether a ScMoE can be made of this model.

        Raises:
            CheckpointError: the ScMoE differs in more than surgery can change.
            ScMoEConfigError: layers that the model does not have, or a shared expert that has nothing to start from.
        """
        config.check_model(settings.num_layers)
        path, shared = self.weights.path, _SHARED_WIDTH
        kept = {f"scmoe.{name}" for name in _OF_THE_SCMOE} | {fields.ADAPTED}
        kept -= {f"scmoe.{shared}"} if self.has_shared_expert else set()
        then, now = (
            {key: value for key, value in fields.describe_model(*each)["model"].items() if key not in kept}
            | {"scmoe.router": each[1].router, "scmoe.gate_softmax": each[1].gate_softmax}
            for each in ((self.settings, self.config), (settings, config))
        )
        if changed := [f"{key} {then[key]!r} → {now[key]!r}" for key in now if then.get(key) != now[key]]:
            raise CheckpointError(
                f"{path}: cannot become this ScMoE, which differs in more than shortcut, top_k and merge "
                f"({'; '.join(changed)}); set that as in the source"
            )
        if config.shortcut_norm == "own" and settings.norm_placement != "pre":
            raise CheckpointError(
                f"{path} is a post-norm model: it has no norm that the shortcut's own norm could copy; set "
                'scmoe.shortcut_norm to "shared"'
            )
        width = settings.ffn_hidden_size
        widths = [getattr(config, name) or width for name in (shared, "moe_ffn_hidden_size")]
        if not self.has_shared_expert and widths[0] != widths[1]:
            raise ScMoEConfigError(
                f"scmoe.{shared} = {getattr(config, shared)}: {path} has no shared expert, and that of the ScMoE "
                f"starts from routed ones; set {widths[1]}"
            )
        self._check_shared_expert(None if config.adapt is None else config.adapt.shared_expert)

    def _check_shared_expert(self, start: str | None) -> None:
        asked = f'scmoe.adapt.shared_expert = "{start}"'
        if start is not None and self.has_shared_expert:
            raise ScMoEConfigError(f"{asked}: {self.weights.path} has shared experts, which are kept; remove the field")
        if start == "none":
            raise ScMoEConfigError(
                f'{asked}: a ScMoE of this package\'s GPT always has a shared expert; set "mean", "busiest" or "fit"'
            )


def with_base_of(config: ScMoEConfig, old: ScMoEConfig, base: BaseConfig, path: Path) -> ScMoEConfig:
    """See `SourceModel.with_base`.

    Args:
        old: section of the source, or of a ScMoE that was made of it: the fields that are taken are the same.
        base: how the source's layers run.
        path: of the model whose section `old` is, for the message.
    """
    adapt = config.adapt or AdaptConfig()
    if adapt.base not in (None, base):
        raise ScMoEConfigError(
            f"scmoe.adapt.base = {_text(adapt.base)}: the layers of {path} are {_text(base)}; remove the field, it is "
            "filled in"
        )
    kept = {*fields.BINDING_SECTION_FIELDS, "router", "gate_softmax"} - _OF_THE_SCMOE
    section = old.model_dump(mode="json", include=kept) | {"top_k": base.top_k}
    if base.architecture == "overlapped_shared_expert":
        section |= {"merge": base.merge, _SHARED_WIDTH: getattr(old, _SHARED_WIDTH)}
    else:
        section[_SHARED_WIDTH] = old.moe_ffn_hidden_size
    section |= config.model_dump(mode="json", exclude_unset=True)
    section["adapt"] = adapt.model_copy(update={"base": base}).model_dump(mode="json")
    return ScMoEConfig.from_deepspeed({"scmoe": section})


def _text(base: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in base.model_dump().items())
