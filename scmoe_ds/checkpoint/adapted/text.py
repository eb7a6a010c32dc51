"""What is measured of a trained model on text: its loss, and how many tokens each expert gets."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.checkpoint.adapted.source import SourceDirectory
from scmoe_ds.errors import CheckpointError, DataError, one_line
from scmoe_ds.replace.modeling_adapted import blocks_of, install, moe_blocks

WINDOW, MOST_TOKENS = 512, 1 << 15
"""Tokens of a sequence, and of all together."""


class Text:
    """A trained model on a text file. The model is in memory until this object is gone.

    Args:
        source: its directory, with its tokenizer.
        file: UTF-8.

    Attributes:
        tokens: how many are read.

    Raises:
        DataError: a file that cannot be read or is too short.
        CheckpointError: the directory has no tokenizer.
    """

    def __init__(self, source: SourceDirectory, file: Path) -> None:
        self._ids = _windows(source, file)
        self.tokens = self._ids.numel()
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(source.path).eval()
        self._counts: dict[int, Tensor] = {}

    def loss(self) -> float:
        """Mean over tokens of the model as it is; counts each expert's tokens."""
        blocks = blocks_of(self.model)
        layers = [self.model.get_submodule(f"{name}.mlp.experts") for name, _ in moe_blocks(blocks)]
        self._counts = {number: torch.zeros(each.num_experts, dtype=torch.long) for number, each in enumerate(layers)}
        hooks = [
            each.register_forward_pre_hook(partial(self._count, number), with_kwargs=True)
            for number, each in enumerate(layers)
        ]
        try:
            return self._loss()
        finally:
            for hook in hooks:
                hook.remove()

    def loss_of(self, scmoe: Mapping[str, Any], state: Mapping[str, Tensor]) -> float:
        """The same of the ScMoE with these new weights."""
        parts = install(self.model, scmoe)
        blocks = moe_blocks(blocks_of(self.model))
        for number, each in parts.items():
            begin = f"layers.{blocks[number][1]}.shortcut."
            found = {name.partition(begin)[2]: value for name, value in state.items() if begin in name}
            each.load_state_dict(found)
        return self._loss()

    def busiest(self, number: int) -> int:
        """The expert of an MoE layer that gets most tokens."""
        return int(self._counts[number].argmax())

    def of_busiest(self, number: int) -> str:
        """A line about it."""
        counts = self._counts[number]
        share = float(counts.max() / counts.sum())
        return f"MoE layer {number}: expert {self.busiest(number)} of {len(counts)} gets {share:.1%} of the tokens"

    def _loss(self) -> float:
        total = 0.0
        with torch.no_grad():
            for window in self._ids:
                batch = window[None]
                total += float(self.model(input_ids=batch, labels=batch, use_cache=False).loss)
        return total / len(self._ids)

    def _count(self, number: int, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        counts = self._counts[number]
        counts += torch.bincount(chosen.flatten(), minlength=len(counts))[: len(counts)]


def _windows(source: SourceDirectory, file: Path) -> Tensor:
    """[number of sequences, tokens of each]."""
    from transformers import AutoTokenizer

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"--text {file}: cannot be read ({one_line(error)}); name a text file in UTF-8") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{source.path}: has no tokenizer for --text ({one_line(error)}); add its files"
        ) from None
    most = min(WINDOW, getattr(source.model.config, "max_position_embeddings", None) or WINDOW)
    ids = torch.tensor(tokenizer(text[: 16 * MOST_TOKENS], add_special_tokens=False)["input_ids"][:MOST_TOKENS])
    window = min(most, len(ids))
    if window < 2:
        raise DataError(f"--text {file}: holds {len(ids)} tokens; name a longer text")
    if int(ids.max()) >= source.model.config.vocab_size:
        raise DataError(
            f"{source.path}: its tokenizer has ids up to {int(ids.max())}, the model {source.model.config.vocab_size} "
            "tokens; they are not of one model"
        )
    return ids[: len(ids) // window * window].view(-1, window)
