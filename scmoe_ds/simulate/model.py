"""Sizes of a model with MoE layers, whoever wrote it. JSON files hold the same fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST = 10**9
MOST_LAYERS = 10_000
"""Ten times as deep as any; their places are a list."""
Count = Annotated[int, Field(ge=1, le=MOST, strict=True)]
Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS, strict=True)]
CountOrNone = Annotated[int, Field(ge=0, le=MOST, strict=True)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Experts(_Frozen):
    """The MoE of a block.

    Attributes:
        num_experts: routed ones.
        hidden: width inside one routed expert.
        top_k: routed experts per token.
        shared_hidden: width inside the shared expert that the model has of its own; 0: none.
        shared_gate: whether a sigmoid weights it, as in Qwen2-MoE.
    """

    num_experts: Count
    hidden: Count
    top_k: Count = 1
    shared_hidden: CountOrNone = 0
    shared_gate: bool = False

    @model_validator(mode="after")
    def _rules(self) -> Experts:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k = {self.top_k} cannot exceed the number of experts ({self.num_experts})")
        if self.shared_gate and not self.shared_hidden:
            raise ValueError("shared_gate = true weights a shared expert; set shared_hidden, or remove it")
        return self


class Stage(_Frozen):
    """Blocks of one width: all of a GPT, one stage of a Swin.

    Attributes:
        layers: blocks.
        hidden: width of a token's row.
        tokens: per sample.
        span: tokens that a token attends to: the sequence, or its window.
        causal: whether half of them are masked.
        heads, kv_heads, head_dim: of the attention.
        value_dim: of a head's values, where they are narrower than its queries (MLA); 0: head_dim.
        attention_parameters: of one attention, where it has others than the usual four matrices (MLA, norms of queries
            and keys, biases of some); 0: the usual.
        mlp_hidden: width inside the MLP of a block without an MoE.
        gated: SwiGLU, three matrices, in MLP and experts alike; False: GELU, two.
        bias: whether products add a bias.
        norm: LayerNorm, with a weight and a bias, or RMSNorm, with a weight alone.
        moe_layers: numbers of the blocks with an MoE, from 0 within the stage.
        experts: of these; None where moe_layers is empty.
    """

    layers: Layers
    hidden: Count
    tokens: Count
    span: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    mlp_hidden: CountOrNone
    causal: bool = True
    gated: bool = False
    bias: bool = True
    norm: Literal["layer", "rms"] = "layer"
    value_dim: CountOrNone = 0
    attention_parameters: CountOrNone = 0
    moe_layers: tuple[CountOrNone, ...] = ()
    experts: Experts | None = None

    @model_validator(mode="after")
    def _rules(self) -> Stage:
        places, behind = self.moe_layers, [each for each in self.moe_layers if each >= self.layers]
        rules = {
            "experts are of no block; add moe_layers": self.experts is not None and not places,
            "moe_layers have no sizes; add experts": self.experts is None and bool(places),
            f"moe_layers has {behind}; the stage has blocks 0 … {self.layers - 1}": bool(behind),
            "moe_layers must ascend, each once": list(places) != sorted(set(places)),
            "mlp_hidden must be at least 1 where a block has no MoE": len(places) < self.layers and not self.mlp_hidden,
            f"heads = {self.heads} must be divisible by kv_heads = {self.kv_heads}": self.heads % self.kv_heads > 0
            and self.kv_heads % self.heads > 0,
            f"span = {self.span} cannot exceed tokens = {self.tokens}": self.span > self.tokens,
            "value_dim is of an MLA; add its attention_parameters": bool(self.value_dim)
            and not self.attention_parameters,
        }
        for rule, broken in rules.items():
            if broken:
                raise ValueError(rule)
        return self


class Model(_Frozen):
    """A model.

    Attributes:
        vocabulary: rows of the embedding and columns of the head; classes of an image model, which has no embedding.
        tied: whether embedding and head are one matrix.
        images: whether samples are images: a step is counted in samples, not tokens, and there is no embedding. Blocks
            are those of SwinV2: attention in windows, norms behind the branches, four tokens become one from stage to
            stage.
        patch: values of an image that become one token.
        positions: rows of a learned position embedding; 0: rotary ones.
        dropout: share that is dropped of what a branch adds to the residual stream.
        autoep: whether it is a Hugging Face model, whose MoE layers DeepSpeed's AutoEP distributes; False: a GPT or a
            Swin of this package. It decides which methods and layouts can run.
        source: of the sizes, for the page.
    """

    name: str
    stages: tuple[Stage, ...]
    vocabulary: Count
    tied: bool = True
    images: bool = False
    patch: CountOrNone = 0
    positions: CountOrNone = 0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    autoep: bool = False
    source: str = ""

    @model_validator(mode="after")
    def _rules(self) -> Model:
        if not self.stages:
            raise ValueError("stages must have at least one; a GPT has one")
        widths = [stage.hidden for stage in self.stages]
        if not self.images and len({(stage.hidden, stage.tokens) for stage in self.stages}) > 1:
            raise ValueError(f"stages of a text model have one width and one number of tokens, not widths {widths}")
        if self.images and not self.patch:
            raise ValueError("patch is missing: how many values of an image become one token")
        return self

    @property
    def moe_layers(self) -> int:
        """How many blocks have an MoE."""
        return sum(len(stage.moe_layers) for stage in self.stages)
