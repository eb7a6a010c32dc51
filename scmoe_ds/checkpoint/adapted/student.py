"""A trained Hugging Face model in memory, as the ScMoE that surgery would write: any way, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scmoe_ds.checkpoint.adapted.source import SourceDirectory
from scmoe_ds.checkpoint.adapted.surgery import empty_parts, settings_of, start_of
from scmoe_ds.checkpoint.adapted.text import Text, TextSettings, trained_model
from scmoe_ds.checkpoint.autoep.tensor_slices import close
from scmoe_ds.errors import ArgumentError, CheckpointError
from scmoe_ds.replace.modeling_adapted import ShortcutParts, install


class HuggingFaceStudent:
    """The model, once in memory.

    Args:
        path: its directory.
        fields: of the "scmoe" section, as for `adapt_hugging_face`, without position and join.
        dtype: of the weights; None: as they are.
        device: where they go.
        text: on which the busiest experts are counted; None: nobody asks for them.

    Attributes:
        model: in evaluation mode.

    Raises:
        UserError: a source that cannot become a ScMoE, or that transformers cannot load.
    """

    def __init__(
        self,
        path: Path,
        fields: Mapping[str, Any],
        dtype: torch.dtype | None,
        device: torch.device,
        text: TextSettings | None = None,
    ) -> None:
        self.path, self._fields = path, dict(fields)
        try:
            source = self._source = SourceDirectory(path)
            scmoe = settings_of(source, fields)
            kind = scmoe["adapt"]["shared_expert"]
            if kind == "busiest" and text is None:
                raise ArgumentError("--shared-expert busiest: is measured on text; name a file by --text-file")
            if kind == "fit":
                raise ArgumentError("--shared-expert fit: --measure takes mean, busiest or none; use one of them")
            measured = Text(source, text) if text is not None and kind == "busiest" else None
            if measured is not None:
                measured.loss()
            # The source's layers all have the same parts, at whichever position.
            parts = empty_parts(source, {**scmoe, "position": "pos1", "first_layer_position": None, "join": "end"})
            self._started = {number: start_of(source, number, each, scmoe, measured) for number, each in parts.items()}
        finally:
            close()
        del measured
        self.model: Any = trained_model(path).to(device=device, dtype=dtype)

    def convert(self, way: Mapping[str, Any]) -> dict[int, ShortcutParts]:
        """Makes the model's MoE layers ScMoE in this way, whatever they were before.

        Args:
            way: position, join and first_layer_position.

        Returns:
            number of each MoE layer → its parts, which say whether it runs as ScMoE.

        Raises:
            CheckpointError: a position or join that the model cannot have.
            ScMoEConfigError: one that no model can have.
        """
        scmoe = settings_of(self._source, {**self._fields, **way})
        try:
            parts = install(self.model, scmoe)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        for number, each in parts.items():
            each.load_state_dict({_name(name): value for name, value in self._started[number].items()})
        return parts

    @property
    def shared_expert(self) -> tuple[bool, bool]:
        """Whether the source's MoE layers have one, and whether the ScMoE's have."""
        layers = self._layers()
        own = any("shared_expert" in name for name, _ in layers[0].mlp.named_children())
        return own, own or layers[0].shortcut.shared_expert is not None

    @property
    def experts(self) -> list[int]:
        """Routed experts of each MoE layer."""
        return [layer.mlp.experts.num_experts for layer in self._layers()]

    @property
    def top_k(self) -> tuple[int, int]:
        """Routed experts per token, of the source and of the ScMoE."""
        mlp = self._layers()[0].mlp
        routers: list[Any] = [each for each in (mlp, getattr(mlp, "gate", None)) if hasattr(each, "top_k")]
        own = routers[0].top_k
        return own, self._fields.get("top_k") or own

    def _layers(self) -> list[Any]:
        return [each for each in self.model.modules() if isinstance(getattr(each, "shortcut", None), ShortcutParts)]


def _name(name: str) -> str:
    """Of a weight among a layer's parts, from its name in the files."""
    return name.partition(".shortcut.")[2]
