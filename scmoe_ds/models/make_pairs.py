"""The pairs of a GPT: those of one architecture, or those of an adapted model.

An adapted model was trained with other pairs, its base (`scmoe.adapt.base`). A pair that is to be converted holds both:
the ScMoE and, over the same blocks, its base. A pair that stays as it is is the base's alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.moe.layer import MoE

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.blocks import make_blocks
from scmoe_ds.models.converted import ConvertedPair
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.pairs import PipelinedPair, PlainPair, SharedExpertPair, ShortcutPair, StagedPair
from scmoe_ds.models.parallel_layers import Group
from scmoe_ds.models.recompute import Recompute
from scmoe_ds.moe.conversion import Conversion


def make_pair(
    settings: GPTSettings,
    config: ScMoEConfig,
    num_experts: int,
    position: str,
    sequence: int,
    group: Group = None,
    shared_moe: MoE | None = None,
    following: str | None = None,
) -> PlainPair | StagedPair:
    """The pair that `config.architecture` names.

    Args:
        position: of the shortcut, if there is one: "pos1", "pos2" or "pos3".
        sequence: tokens per sequence, for the FLOPs behind the "auto" slot.
        group: the tensor-parallel ranks.
        shared_moe: an earlier pair's MoE layer, which this pair uses too.
        following: the next pair's position; None: this pair is the last one.
    """
    blocks = make_blocks(settings, config, num_experts, group, shared_moe)
    if not config.is_scheduled:
        return PlainPair(blocks, config)
    own = {"pipelined_topk": PipelinedPair, "overlapped_shared_expert": SharedExpertPair}
    adapted = config.adapt is not None and config.adapt.base is not None
    kind: type[StagedPair] = own.get(config.architecture, ConvertedPair if adapted else ShortcutPair)
    return kind(blocks, settings, config, position, sequence, following)


def make_pairs(
    settings: GPTSettings,
    config: ScMoEConfig,
    sequence: int,
    group: Group = None,
    recompute: Recompute | None = None,
) -> list[PlainPair | StagedPair]:
    """All pairs of a GPT, in order. Arguments as for `models.gpt.GPT`."""
    pairs: list[PlainPair | StagedPair] = []
    numbers = config.experts_of_layers(config.moe_layers(settings.num_layers))
    sections = [config.of_layer(layer) for layer in range(len(numbers))]
    for layer, (section, num_experts) in enumerate(zip(sections, numbers, strict=True)):
        position = (config.first_layer_position if layer == 0 else None) or config.position
        shared_moe = pairs[-1].last.moe if layer % config.pairs_per_moe else None
        following = config.position if layer + 1 < len(numbers) else None
        pair = make_pair(settings, section, num_experts, position, sequence, group, shared_moe, following)
        if isinstance(pair, StagedPair) and pair.late_window is not None and not sections[layer + 1].has_shortcut:
            pair.late_window = pair.late_window._replace(after_dispatch=False)
        pair.recompute = recompute
        pairs.append(pair)
    return pairs


def conversion_of(pairs: Sequence[PlainPair | StagedPair]) -> Conversion:
    """The pairs that can run in both ways."""
    return Conversion({number: pair for number, pair in enumerate(pairs) if isinstance(pair, ConvertedPair)})
