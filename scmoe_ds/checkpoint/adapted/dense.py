"""Makes of the directory of a dense Hugging Face model one of its MoE sibling, of the same function.

    Llama, Mistral → Mixtral    every expert is the MLP
    Qwen3 → Qwen3-MoE           every expert is the MLP
    Qwen2 → Qwen2-MoE           shared expert (whose gate gives 1/2): the MLP; experts: the MLP, half of its output

The weights of a token's experts add up to 1, so that without noise the function is the dense one, up to the rounding
of that sum. Routers start at random.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from scmoe_ds.checkpoint.adapted.source import config_of
from scmoe_ds.checkpoint.autoep.shards import carry, one_sentence
from scmoe_ds.checkpoint.autoep.tensor_slices import LazyTensor, close, tensors_in
from scmoe_ds.checkpoint.safetensors_files import INDEX_FILE
from scmoe_ds.errors import ArgumentError, CheckpointError, one_line
from scmoe_ds.replace.origin import CONFIG_FILE

_SHARD_BYTES = 5 * 10**9
_QWEN = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}


@dataclass(frozen=True)
class Sibling:
    """The MoE family of a dense one.

    Attributes:
        kind: its model_type.
        block: what it calls the MoE layer.
        matrices: the MLP's names to an expert's.
        has_shared: whether it has a shared expert with a gate.
        every: whether only some blocks may have an MoE.
    """

    kind: str
    block: str = "mlp"
    matrices: Mapping[str, str] = field(default_factory=lambda: _QWEN)
    has_shared: bool = False
    every: bool = True


_MIXTRAL = Sibling("mixtral", "block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}, every=False)
SIBLINGS = {
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
    "qwen2": Sibling("qwen2_moe", has_shared=True),
    "qwen3": Sibling("qwen3_moe"),
}


class DenseDirectory:
    """A dense model, read lazily.

    Args:
        path: its directory.
        experts, top_k: of every MoE layer; routed experts per token.
        moe_every: the last of so many blocks gets an MoE.
        noise: standard deviation of the noise on each expert's weights, relative to their root mean square.
        seed: of noise and routers.

    Raises:
        UserError: a family without a sibling, or settings that the sibling does not have.
    """

    def __init__(
        self, path: Path, experts: int, top_k: int, moe_every: int = 1, noise: float = 0.0, seed: int = 0
    ) -> None:
        self.path, self.experts, self.top_k, self.moe_every = path, experts, top_k, moe_every
        self.noise, self.seed = noise, seed
        try:
            self.config = transformers.AutoConfig.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: transformers knows no such config.json ({one_line(error)})") from None
        sibling = SIBLINGS.get(self.config.model_type)
        if sibling is None:
            raise CheckpointError(
                f"--experts {experts}: {path} is a {self.config.model_type}, and only {', '.join(SIBLINGS)} have an "
                "MoE sibling that is known here; remove the flag for a model with an MoE; of other dense ones, "
                "scmoe_ds.moe_from_dense makes MoE layers in your own program"
            )
        self.sibling = sibling
        self._check()
        self.tensors = tensors_in(path)

    def _check(self) -> None:
        config = self.config
        if self.experts < 2:
            raise ArgumentError(f"--experts {self.experts}: an MoE has at least 2")
        if not 1 <= self.top_k <= self.experts:
            raise ArgumentError(f"--top-k {self.top_k}: use 1 … {self.experts}, the number of experts")
        if self.noise < 0:
            raise ArgumentError(f"--noise {self.noise}: must be at least 0")
        if self.moe_every > 1 and not self.sibling.every:
            raise ArgumentError(f"--position: every block of {self.sibling.kind} has an MoE; use pos1")
        windows = set(getattr(config, "layer_types", None) or ())
        mixed = self.sibling.kind in ("mixtral", "qwen3_moe") and len(windows) > 1
        biased = self.sibling.kind == "mixtral" and getattr(config, "attention_bias", False)
        for found, what in (
            (biased, "attention_bias"),
            (getattr(config, "mlp_bias", False), "mlp_bias"),
            (mixed, "layer_types of several kinds"),
        ):
            if found:
                raise CheckpointError(
                    f"{self.path}: {config.model_type} has {what}, which its sibling {self.sibling.kind} has not; "
                    "scmoe_ds.moe_from_dense makes MoE layers of it in your own program"
                )

    def write(self, out: Path) -> None:
        """Writes the sibling's directory, which does not exist yet, one block in memory at a time."""
        out.mkdir(parents=True)
        weight_map: dict[str, str] = {}
        held: dict[str, Tensor] = {}
        number = 0
        for name, tensor in self._weights():
            if held and sum(each.nbytes for each in held.values()) + tensor.nbytes > _SHARD_BYTES:
                number, held = number + 1, _flushed(held, out, number + 1)
            held[name] = tensor.contiguous()
            weight_map[name] = _file(number + 1)
        _flushed(held, out, number + 1)
        index = {"metadata": {}, "weight_map": weight_map}
        (out / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        (out / CONFIG_FILE).write_text(json.dumps(self._config(), indent=2) + "\n", encoding="utf-8")
        carry(self.path, out)

    def _config(self) -> dict[str, Any]:
        before = self.config.to_dict()
        dropped = ("model_type", "architectures", "transformers_version", "_name_or_path")
        width = self.config.intermediate_size
        more: dict[str, Any] = {"num_experts_per_tok": self.top_k}
        if self.sibling.kind == "mixtral":
            more |= {"num_local_experts": self.experts}
        else:
            more |= {"num_experts": self.experts, "moe_intermediate_size": width, "norm_topk_prob": True}
            more |= {"decoder_sparse_step": self.moe_every, "mlp_only_layers": []}
        if self.sibling.has_shared:
            more["shared_expert_intermediate_size"] = width
        values = {**{name: value for name, value in before.items() if name not in dropped}, **more}
        config = transformers.AutoConfig.for_model(self.sibling.kind, **values)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
        return {**config.to_dict(), "architectures": [kind]}

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, lazy in self.tensors.items():
            begin, mlp, matrix = name.removesuffix(".weight").rpartition(".mlp.")
            place = begin.rpartition("layers.")[2]
            if not mlp or (int(place) + 1) % self.moe_every:
                yield name, lazy[...]
            else:
                yield from self._of_mlp(f"{begin}.{self.sibling.block}", int(place), matrix, lazy)

    def _of_mlp(self, block: str, place: int, matrix: str, lazy: LazyTensor) -> Iterator[tuple[str, Tensor]]:
        """What becomes of one matrix of an MLP."""
        weight, own = lazy[...], self.sibling.matrices[matrix]
        share = 0.5 if self.sibling.has_shared and matrix == "down_proj" else 1.0
        order = list(self.sibling.matrices).index(matrix)
        for expert in range(self.experts):
            seed = ((self.seed * 1_000_003 + place) * 1_000_003 + expert) * 3 + order
            yield f"{block}.experts.{expert}.{own}.weight", _noisy(weight * share, self.noise, seed)
        if matrix != "gate_proj":
            if self.sibling.has_shared:
                yield f"{block}.shared_expert.{matrix}.weight", weight
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        router = torch.randn(self.experts, weight.shape[1], generator=generator) * self.config.initializer_range
        yield f"{block}.gate.weight", router.to(weight.dtype)
        if self.sibling.has_shared:
            yield f"{block}.shared_expert.gate_proj.weight", weight
            yield f"{block}.shared_expert_gate.weight", weight.new_zeros(1, weight.shape[1])


@contextmanager
def as_moe(path: Path, out: Path, fields: Mapping[str, Any], experts: int | None, noise: float) -> Iterator[Path]:
    """The directory of an MoE model: a source's own, or a dense one's sibling, which is removed afterwards.

    Args:
        out: beside which the sibling is written.
        fields: `position` (pos2 and pos3 need a dense block before each MoE) and `top_k` (null: 2) are read.
        experts: of each MoE layer; None: the source has them.
        noise: see `DenseDirectory`.

    Raises:
        UserError: a dense source without `experts`, or an MoE with them.
    """
    kind = str(config_of(path)["model_type"])
    if experts is None:
        if kind in SIBLINGS:
            raise ArgumentError(
                f"{path}: {kind} has no MoE; --experts N makes the experts of a {SIBLINGS[kind].kind} of its MLPs"
            )
        yield path
        return
    top_k = 2 if fields.get("top_k") is None else fields["top_k"]
    every = 1 if fields.get("position") in (None, "pos1") else 2
    dense = DenseDirectory(path, experts, top_k, every, noise)
    with ExitStack() as stack:
        with one_sentence(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            directory = stack.enter_context(tempfile.TemporaryDirectory(dir=out.parent))
            moe = Path(directory) / path.resolve().name  # of "." it has one
            dense.write(moe)
            close()
        yield moe


def _noisy(weight: Tensor, noise: float, seed: int) -> Tensor:
    if not noise:
        return weight.clone()
    generator = torch.Generator().manual_seed(seed % 2**63)
    random = torch.randn(weight.shape, generator=generator).to(weight)
    return weight.add(random, alpha=noise * float(weight.float().square().mean().sqrt()))


def _file(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def _flushed(held: dict[str, Tensor], out: Path, number: int) -> dict[str, Tensor]:
    save_file(held, out / _file(number), metadata={"format": "pt"})
    return {}
