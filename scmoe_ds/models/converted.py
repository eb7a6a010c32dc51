"""The pair of an adapted model that runs as ScMoE or, over the same blocks, as its base: as it ran in the source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from scmoe_ds.config.adapt_section import section_of_base
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.blocks import Block
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.pairs import PipelinedPair, SharedExpertPair, ShortcutPair, StagedPair
from scmoe_ds.moe.converted import ConvertedMoE
from scmoe_ds.moe.routed import RoutedTokens
from scmoe_ds.overlap.executor import PairOutput, Step


class ConvertedPair(ShortcutPair):
    """A ScMoE's pair, which can run as its base, too: a `Convertible`.

    Attributes:
        base: the pair as it was, over the same blocks; not one of the modules of this one.
    """

    base: StagedPair

    def __init__(
        self,
        blocks: Sequence[Block],
        settings: GPTSettings,
        config: ScMoEConfig,
        position: str,
        sequence: int,
        following: str | None,
    ) -> None:
        super().__init__(blocks, settings, config, position, sequence, following)
        section = section_of_base(config)
        kind = _PipelinedBase if section.architecture == "pipelined_topk" else _SharedExpertBase
        base = kind(blocks, settings, section, position, sequence, following)
        base.post_norm = self.post_norm
        self.__dict__["base"] = base
        self._converted = True

    @property
    def converted(self) -> bool:
        """How passes that begin from now on run; see `Convertible`."""
        return self._converted

    @converted.setter
    def converted(self, converted: bool) -> None:
        self._converted = converted
        self._converted_layer.run_as_base(not converted)

    @property
    def running(self) -> StagedPair:
        return self if self.converted else self.base

    def forward(self, hidden: Tensor, used_token: Tensor | None = None, late: Step | None = None) -> PairOutput:
        """As `StagedPair.forward`, of the pair that runs now."""
        if self.converted:
            return super().forward(hidden, used_token, late)
        self.base.recompute = self.recompute
        output: PairOutput = self.base(hidden, used_token, late)
        return output

    def begin(self, *args: Any) -> RoutedTokens:
        # A pass that is repeated for its backward repeats how it ran.
        self._converted_layer.run_as_base(False)
        return super().begin(*args)

    @property
    def _converted_layer(self) -> ConvertedMoE:
        assert isinstance(self.layer, ConvertedMoE)
        return self.layer


class _AsBase(StagedPair):
    def begin(self, *args: Any) -> RoutedTokens:
        assert isinstance(self.layer, ConvertedMoE)
        self.layer.run_as_base(True)
        return super().begin(*args)


class _PipelinedBase(_AsBase, PipelinedPair):
    pass


class _SharedExpertBase(_AsBase, SharedExpertPair):
    pass
