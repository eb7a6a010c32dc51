"""What is measured of a trained model on text: its loss, and how many tokens each expert gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.checkpoint.adapted.fit import fit_shared_experts
from scmoe_ds.checkpoint.adapted.source import SourceDirectory
from scmoe_ds.errors import CheckpointError, DataError, one_line
from scmoe_ds.parallel.process import device
from scmoe_ds.replace.modeling_adapted import ShortcutParts, blocks_of, install, moe_blocks

WINDOW, MOST_TOKENS = 512, 1 << 15
"""Tokens of a sequence, and of all together, if nothing else is said."""


@dataclass(frozen=True)
class TextSettings:
    """A text file, and how much of it is read.

    Attributes:
        file: UTF-8.
        seq_length, batch_size: tokens of a sequence, sequences of a batch.
        max_tokens: of all together.
    """

    file: Path
    seq_length: int | None = None
    batch_size: int = 8
    max_tokens: int | None = None


def trained_model(path: Path) -> Any:
    """The model of a directory, in evaluation mode. Raises a CheckpointError if transformers does not load it."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … by file
        raise CheckpointError(f"{path}: transformers does not load it ({one_line(error, 300)})") from None


class Text:
    """A trained model on a text file, on the accelerator if there is one. It is in memory until this object is gone.

    Args:
        source: its directory, with its tokenizer.
        settings: the file, and how much of it is read.

    Attributes:
        tokens: how many are read.

    Raises:
        DataError: a file that cannot be read or is too short.
        CheckpointError: the directory has no tokenizer, or transformers does not load the model.
    """

    def __init__(self, source: SourceDirectory, settings: TextSettings) -> None:
        self._ids, self._batch_size = _windows(source, settings).to(device()), settings.batch_size
        self.tokens = self._ids.numel()
        self.model = trained_model(source.path).to(device())
        self._counts: dict[int, Tensor] = {}

    def loss(self) -> float:
        """Mean over tokens of the model as it is; counts each expert's tokens."""
        blocks = blocks_of(self.model)
        layers = [self.model.get_submodule(f"{name}.mlp.experts") for name, _ in moe_blocks(blocks)]
        none = torch.zeros((), dtype=torch.long, device=self._ids.device)
        self._counts = {number: none.repeat(each.num_experts) for number, each in enumerate(layers)}
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
        self._convert(scmoe, state)
        return self._loss()

    def fit(self, scmoe: Mapping[str, Any], state: dict[str, Tensor]) -> None:
        """Fits the added shared experts among the new weights, in place."""
        parts = self._convert(scmoe, state)
        fit_shared_experts(self.model, scmoe["merge"], self._ids.split(self._batch_size))
        for number, each in parts.items():
            name = next(name for name in state if name.endswith(f"{self._begin(number)}shared_expert.down_proj.weight"))
            assert each.shared_expert is not None
            state[name] = each.shared_expert.down_proj.weight.detach().to(state[name])

    def _convert(self, scmoe: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[int, ShortcutParts]:
        parts = install(self.model, scmoe)
        for number, each in parts.items():
            begin = self._begin(number)
            each.load_state_dict({name.partition(begin)[2]: value for name, value in state.items() if begin in name})
        return parts

    def _begin(self, number: int) -> str:
        """What the names of a layer's new weights have in the files, after whatever comes before."""
        return f"layers.{moe_blocks(blocks_of(self.model))[number][1]}.shortcut."

    def busiest(self, number: int) -> int:
        """The expert of an MoE layer that gets most tokens."""
        return int(self._counts[number].argmax())

    def of_busiest(self, number: int) -> str:
        """A line about it."""
        counts = self._counts[number]
        share = float(counts.max() / self.tokens)
        return f"MoE layer {number}: expert {self.busiest(number)} of {len(counts)} gets {share:.1%} of the tokens"

    def _loss(self) -> float:
        total = 0.0
        with torch.no_grad():
            for batch in self._ids.split(self._batch_size):
                total += float(self.model(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch)
        return total / len(self._ids)

    def _count(self, number: int, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        counts = self._counts[number]
        counts += torch.bincount(chosen.flatten(), minlength=len(counts))[: len(counts)]


def _windows(source: SourceDirectory, settings: TextSettings) -> Tensor:
    """[number of sequences, tokens of each]."""
    from transformers import AutoTokenizer

    file, most = settings.file, settings.max_tokens or MOST_TOKENS
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"--text-file {file}: cannot be read ({one_line(error)}); name a text file in UTF-8") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path)
    except Exception as error:  # OSError, ValueError, …; the tokenizers package raises Exception itself
        raise CheckpointError(
            f"{source.path}: has no tokenizer for --text-file ({one_line(error)}); add its files"
        ) from None
    context = getattr(source.model.config, "max_position_embeddings", None) or WINDOW
    if (settings.seq_length or 2) > context:
        raise DataError(f"--seq-length {settings.seq_length}: the model's context has {context} tokens")
    ids = torch.tensor(tokenizer(text[: 16 * most], add_special_tokens=False)["input_ids"][:most])
    window = min(settings.seq_length or min(WINDOW, context), len(ids))
    if window < 2:
        raise DataError(f"--text-file {file}: holds {len(ids)} tokens; name a longer text")
    if int(ids.max()) >= source.model.config.vocab_size:
        raise DataError(
            f"{source.path}: its tokenizer has ids up to {int(ids.max())}, the model {source.model.config.vocab_size} "
            "tokens; they are not of one model"
        )
    return ids[: len(ids) // window * window].view(-1, window)
