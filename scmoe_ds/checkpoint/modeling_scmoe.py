"""A GPT with shortcut-connected mixture-of-experts (ScMoE, arXiv 2404.05019), in one file, with torch and transformers.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

The model is a row of pairs: a few Transformer blocks, the last of which has the MoE. In an ordinary MoE the routed
experts read the current block. In a ScMoE they read a preceding one, through a shortcut, and the current block has a
shared expert. What lies between tap and join does not depend on the routed experts, so that their communication can run
beside it:

    tap ─► gate ── dispatch ──► routed experts ── combine ──► join
     │                                                          │
     └──► mlp ──► attention ──► shared expert ──────────────────┘

This file computes one operator after the other, on one device; `Pair.forward` is the picture above. scmoe_ds, which has
written it, trains with the experts on several ranks and with the overlap. The numbers are those of `scmoe generate`: no
token is dropped for an expert's capacity and gates have no noise, in training neither. Training here leaves out a
router's z-loss and the steps of its correction bias.

Shape suffixes: B batch, S sequence, L tokens in the cache and new ones, T tokens (B * S), D hidden, E experts,
K experts per token, N query heads, G key/value heads, H head size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of transformers calls keys and values of the tokens that came before."""


class ScMoEConfig(PretrainedConfig):
    """Shape and style of the model.

    Args:
        num_experts: routed experts of an MoE, or one number per MoE (a pyramid).
        moe_architecture: "scmoe" (eq. 7); "dgmoe" (eq. 23): the same experts read both blocks, without a shared expert;
            "topk" and "shared_expert": the experts read the current block.
        moe_every: blocks of a pair.
        position, first_layer_position: where the shortcut is taken in the preceding block: "pos1" its output, "pos2"
            behind its attention, "pos3" its input; None: the first pair is as the others.
        shortcut_distance: how many blocks before the one with the MoE the shortcut is taken.
        join: "end": the MoE's output joins the stream at the end of its block; "late": the routed part joins behind
            the next block's attention, so that its communication can go on beside that, too.
        shortcut_norm: "own", or "shared": that of the operator behind the tap (LongCat).
        merge: of shared and routed experts: "add" (eq. 7), "cg1" (eq. 14-15) or "cg2" (eq. 16-17).
        gate_softmax: among which experts the weights add up to 1: "all", "chosen", or "renormalised": all, then divided
            by the sum of the chosen ones.
        router: None: DeepSpeed's gate, a softmax; or "score_func" ("softmax" or "sigmoid"), "route_norm" (whether the
            weights add up to "route_scale"), "num_expert_groups", "num_limited_groups" and "group_score_func" ("max" or
            "top2_sum": the experts are chosen within the best groups), "has_bias" (it corrects the choice).
        moe_intermediate_size, shared_expert_intermediate_size: widths of routed and shared experts; None: as the MLP's.
        post_norm: a norm behind the merge.
        pairs_per_moe: consecutive pairs that share one MoE.
        scmoe_layers: pairs that are ScMoE, from 0, in a model that was converted in part; None: all are alike.
        other_layers: fields of this configuration that differ in its other pairs.
        norm_placement: "pre": x + f(norm(x)); "post": norm(x + f(x)).
        residual_scale: factor on each f.
    """

    model_type = "scmoe_gpt"
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 1024,
        normalization: str = "LayerNorm",
        swiglu: bool = False,
        position_embedding: str = "learned_absolute",
        rotary_base: float = 10000.0,
        add_bias_linear: bool = True,
        tie_word_embeddings: bool = True,
        hidden_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        layernorm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        norm_placement: str = "pre",
        residual_scale: float = 1.0,
        moe_architecture: str = "scmoe",
        moe_every: int = 2,
        num_experts: int | list[int] = 8,
        num_experts_per_tok: int = 1,
        position: str = "pos2",
        first_layer_position: str | None = None,
        shortcut_distance: int = 1,
        shortcut_norm: str = "own",
        merge: str = "cg1",
        gate_softmax: str = "all",
        router: dict[str, Any] | None = None,
        moe_intermediate_size: int | None = None,
        shared_expert_intermediate_size: int | None = None,
        join: str = "end",
        post_norm: bool = False,
        pairs_per_moe: int = 1,
        scmoe_layers: list[int] | None = None,
        other_layers: dict[str, Any] | None = None,
        router_aux_loss_coef: float = 0.01,
        use_cache: bool = True,
        **others: Any,
    ) -> None:
        fields = {name: value for name, value in locals().items() if name not in ("self", "others", "__class__")}
        for name in ("gpt", "scmoe", "model", "tokenizer", "format"):
            others.pop(name, None)  # what `--load` of scmoe_ds reads in the same file
        fields["num_key_value_heads"] = num_key_value_heads or num_attention_heads
        for name, value in fields.items():
            setattr(self, name, value)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)

    def of_pair(self, pair: int) -> ScMoEConfig:
        """What a pair follows: this configuration, unless the pair is none of the converted ones."""
        if self.scmoe_layers is None or pair in self.scmoe_layers:
            return self
        other = copy.copy(self)
        for name, value in self.other_layers.items():
            setattr(other, name, value)
        return other

    @property
    def has_shortcut(self) -> bool:
        """Whether routed experts read a preceding block."""
        return self.moe_architecture in ("scmoe", "dgmoe")

    def tap(self, pair: int) -> int:
        """Before which operator of a pair the shortcut is taken, from 0. A block has two: attention and MLP."""
        position = (self.first_layer_position if pair == 0 else None) or self.position
        block = self.moe_every - 1 - (self.shortcut_distance if self.moe_every > 1 else 1)  # -1: before this pair
        return 2 * block + {"pos1": 2, "pos2": 1, "pos3": 0}[position]

    def experts(self, pair: int) -> int:
        """Routed experts of a pair."""
        return self.num_experts[pair] if isinstance(self.num_experts, list) else self.num_experts


@dataclass
class Context:
    """What all blocks of a forward pass know of its tokens.

    Attributes:
        turns: cosine and sine of the rotary positions, [B, S, 1, H] fp32 each; None: positions are learned.
        seen_B1SL: bool, which tokens each one sees; None: itself and all before it.
        used_T: bool, tokens that are no padding; None: all.
        cache: keys and values of the tokens before.
    """

    turns: tuple[Tensor, Tensor] | None
    seen_B1SL: Tensor | None
    used_T: Tensor | None
    cache: Any


class Attention(nn.Module):
    """Causal self-attention; several query heads may share key and value."""

    def __init__(self, config: ScMoEConfig, layer: int) -> None:
        super().__init__()
        N, G = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.heads, self.head_size = layer, [N, G, G], config.hidden_size // N
        self.dropout, D, bias = config.attention_dropout, config.hidden_size, config.add_bias_linear
        self.query_key_value = nn.Linear(D, sum(self.heads) * self.head_size, bias)
        self.output = nn.Linear(N * self.head_size, D, bias)

    def forward(self, hidden_BSD: Tensor, context: Context) -> Tensor:
        B, S, _ = hidden_BSD.shape
        heads_BSNH = self.query_key_value(hidden_BSD).view(B, S, sum(self.heads), self.head_size)
        query, key, value = heads_BSNH.split(self.heads, dim=2)
        if context.turns is not None:
            query, key = turn(query, *context.turns), turn(key, *context.turns)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        if context.cache is not None:
            key, value = context.cache.update(key, value, self.layer)
        mixed_BNSH = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=context.seen_B1SL,
            is_causal=context.seen_B1SL is None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.heads[0] != self.heads[1],
        )
        return self.output(mixed_BNSH.transpose(1, 2).reshape(B, S, -1))


def turn(heads_BSNH: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions on the two halves of each head (LLaMA's layout), in fp32."""
    first, second = heads_BSNH.float().chunk(2, dim=-1)
    return (torch.cat([first, second], -1) * cosine + torch.cat([-second, first], -1) * sine).to(heads_BSNH.dtype)


class MLP(nn.Module):
    """GELU or SwiGLU; the form of a plain MLP, a shared expert and a routed expert."""

    def __init__(self, config: ScMoEConfig, width: int | None = None) -> None:
        super().__init__()
        width, bias, self.swiglu = width or config.intermediate_size, config.add_bias_linear, config.swiglu
        self.input = nn.Linear(config.hidden_size, 2 * width if self.swiglu else width, bias)
        self.output = nn.Linear(width, config.hidden_size, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.input(hidden)
        if not self.swiglu:
            return self.output(F.gelu(inner))
        gate, up = inner.chunk(2, dim=-1)
        return self.output(F.silu(gate) * up)


class MoE(nn.Module):
    """Routed experts behind a gate, and a shared expert where the architecture has one. It holds no norm.

    Submodules have the names of DeepSpeed's MoE, with which scmoe_ds trains.
    """

    def __init__(self, config: ScMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.k, self.softmax, self.router = config.num_experts_per_tok, config.gate_softmax, config.router
        gate = nn.ModuleDict({"wg": nn.Linear(config.hidden_size, num_experts, bias=False)})
        if self.router is not None and self.router["has_bias"]:
            gate.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32))
        members = nn.ModuleList([MLP(config, config.moe_intermediate_size) for _ in range(num_experts)])
        self.deepspeed_moe = nn.ModuleDict({"gate": gate, "experts": nn.ModuleDict({"deepspeed_experts": members})})
        self.merge = config.merge
        if config.moe_architecture in ("scmoe", "shared_expert"):
            self.mlp = MLP(config, config.shared_expert_intermediate_size)
            if self.merge != "add":
                self.coefficient = nn.Linear(config.hidden_size, {"cg1": 1, "cg2": 2}[self.merge])

    def route(
        self, hidden: Tensor, used_T: Tensor | None, exclude_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 2-3, in fp32: the experts of each token [T, K] (-1: none), their weights [T, K], the balancing loss."""
        with torch.autocast(hidden.device.type, enabled=False):
            tokens_TD = hidden.reshape(-1, hidden.shape[-1]).float()
            logits_TE = F.linear(tokens_TD, self.deepspeed_moe["gate"]["wg"].weight.float())
        sigmoid = self.router is not None and self.router["score_func"] == "sigmoid"
        score_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
        expert_TK = self.choose(score_TE.detach(), exclude_T)
        if self.router is None and self.softmax == "chosen":
            weight_TK = logits_TE.gather(1, expert_TK).softmax(-1)
        else:
            weight_TK = score_TE.gather(1, expert_TK)
        if self.softmax == "renormalised" if self.router is None else self.router["route_norm"]:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        if self.router is not None:
            weight_TK = weight_TK * self.router["route_scale"]
        if sigmoid:  # the balancing loss takes shares
            score_TE = score_TE / score_TE.sum(1, keepdim=True)
        if used_T is not None:
            expert_TK = expert_TK.masked_fill(~used_T.unsqueeze(1), -1)
        return expert_TK, weight_TK, self.balancing_loss(score_TE, expert_TK, used_T)

    def choose(self, score_TE: Tensor, exclude_T: Tensor | None) -> Tensor:
        """[T, K] the experts that score best; with a router by corrected scores, within the groups that score best."""
        if self.router is not None and self.router["has_bias"]:
            score_TE = score_TE + self.deepspeed_moe["gate"].e_score_correction_bias
        if exclude_T is not None:  # it stays in the softmax
            experts_E = torch.arange(score_TE.shape[1], device=score_TE.device)
            score_TE = score_TE.masked_fill(exclude_T.unsqueeze(1) == experts_E, float("-inf"))
        if self.router is not None and self.router["num_expert_groups"]:
            score_TGX = score_TE.unflatten(1, (self.router["num_expert_groups"], -1))
            best = 1 if self.router["group_score_func"] == "max" else 2
            group_TG = score_TGX.topk(best, dim=2).values.sum(2)
            chosen = group_TG.topk(self.router["num_limited_groups"], dim=1).indices
            closed_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, chosen, False)
            score_TE = score_TGX.masked_fill(closed_TG.unsqueeze(2), float("-inf")).flatten(1)
        return score_TE.topk(self.k, dim=1).indices

    def balancing_loss(self, probability_TE: Tensor, expert_TK: Tensor, used_T: Tensor | None) -> Tensor:
        """Mean probability times share of the choices, summed over experts; 1 where both are even. Of DeepSpeed's two
        choices the first ones count."""
        E = probability_TE.shape[1]
        if used_T is not None:
            probability_TE = probability_TE * used_T.unsqueeze(1)
        tokens = len(probability_TE) if used_T is None else used_T.sum().clamp(min=1)
        counted = expert_TK[:, :1] if self.k == 2 and self.router is None else expert_TK
        counts_E = torch.stack([(counted == expert).sum() for expert in range(E)])
        return E * (probability_TE.sum(0) / tokens * counts_E / tokens).sum() / counted.shape[1]

    def routed(self, hidden: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The sum of each token's experts, weighted."""
        tokens_TD = hidden.reshape(-1, hidden.shape[-1])
        output_TD = torch.zeros_like(tokens_TD, dtype=torch.float32)
        for number, expert in enumerate(self.deepspeed_moe["experts"]["deepspeed_experts"]):
            token, choice = (expert_TK == number).nonzero(as_tuple=True)
            if len(token) or torch.is_grad_enabled():  # in training each expert has a gradient, zeros too
                output_TD.index_add_(0, token, weight_TK[token, choice].unsqueeze(1) * expert(tokens_TD[token]))
        return output_TD.to(hidden.dtype).view(hidden.shape)

    def parts(self, hidden: Tensor, routed: Tensor) -> tuple[Tensor | None, Tensor]:
        """What shared and routed experts have in the layer's output, their sum; `hidden` is the current block's."""
        if not hasattr(self, "mlp"):
            return None, routed
        shared = self.mlp(hidden)
        if self.merge == "add":
            return shared, routed  # eq. 7
        logits = self.coefficient(hidden)
        if self.merge == "cg1":
            return torch.sigmoid(logits) * shared, routed  # eq. 14-15
        coefficient = logits.softmax(-1)  # eq. 16-17, in the order of DeepSpeed's weights
        return shared * coefficient[..., 1:], routed * coefficient[..., 0:1]


class Block(nn.Module):
    """Attention and an MLP, or an MoE, which the pair calls."""

    def __init__(self, config: ScMoEConfig, layer: int, moe: MoE | None, owns_moe: bool) -> None:
        super().__init__()
        self.pre, self.scale = config.norm_placement == "pre", config.residual_scale
        self.dropout = config.hidden_dropout
        self.attention_norm, self.mlp_norm = norm_of(config), norm_of(config)
        self.attention = Attention(config, layer)
        if moe is None:
            self.mlp = MLP(config)
        elif owns_moe:
            self.moe = moe
        else:  # an earlier pair's
            self.__dict__["moe"] = moe

    def read(self, hidden: Tensor, norm: nn.Module) -> Tensor:
        """What the sub-layer of a norm reads."""
        return norm(hidden) if self.pre else hidden

    def add(self, hidden: Tensor, update: Tensor, norm: nn.Module) -> Tensor:
        """Adds what the sub-layer of a norm returned."""
        hidden = hidden + self.scaled(update)
        return hidden if self.pre else norm(hidden)

    def scaled(self, update: Tensor) -> Tensor:
        """With scale and dropout, as it is added."""
        return F.dropout(self.scale * update, self.dropout, self.training)

    def attend(self, hidden: Tensor, context: Context) -> Tensor:
        """Eq. 8 and 10."""
        return self.add(hidden, self.attention(self.read(hidden, self.attention_norm), context), self.attention_norm)

    def feed(self, hidden: Tensor, context: Context) -> Tensor:
        """Eq. 9."""
        return self.add(hidden, self.mlp(self.read(hidden, self.mlp_norm)), self.mlp_norm)


def norm_of(config: ScMoEConfig) -> nn.Module:
    """LayerNorm or RMSNorm."""
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layernorm_epsilon)


class Pair(GradientCheckpointingLayer):
    """A few blocks, the last of which has the MoE."""

    def __init__(self, config: ScMoEConfig, number: int, shared_moe: MoE | None) -> None:
        super().__init__()
        config = config.of_pair(number)
        size, own = config.moe_every, shared_moe is None
        moe = MoE(config, config.experts(number)) if own else shared_moe
        moes = [None] * (size - 1) + [moe]
        self.blocks = nn.ModuleList(
            [Block(config, number * size + place, each, own) for place, each in enumerate(moes)]
        )
        self.tap = config.tap(number) if config.has_shortcut else None
        self.is_double = config.moe_architecture == "dgmoe"
        self.late_parts = config.join == "late"  # of the last pair, too: a norm behind the merge reads each by itself
        self.joins_late = config.join == "late" and (number + 1) * size < config.num_hidden_layers
        self.shortcut_norm = norm_of(config) if config.has_shortcut and config.shortcut_norm == "own" else None
        self.post_norm = norm_of(config) if config.post_norm else None

    def forward(
        self, hidden: Tensor, context: Context, late: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The residual stream behind the pair, the MoE's balancing loss, and what joins the next pair's stream late.
        `late` is that of the pair before."""
        operators = [operator for block in self.blocks for operator in (block.attend, block.feed)][:-1]
        last, moe = self.blocks[-1], self.blocks[-1].moe
        for number, operator in enumerate(operators):
            if number == self.tap:
                shortcut = self.read_shortcut(hidden)
                expert_TK, weight_TK, loss = moe.route(shortcut, context.used_T)
                routed = moe.routed(shortcut, expert_TK, weight_TK)
            hidden = operator(hidden, context)
            if number == 0 and late is not None:
                hidden = hidden + late
        current = last.read(hidden, last.mlp_norm)
        if self.tap is None:  # no shortcut: the experts read the current block
            expert_TK, weight_TK, loss = moe.route(current, context.used_T)
            routed = moe.routed(current, expert_TK, weight_TK)
        if self.is_double:  # eq. 23: the current block's expert is another than the preceding one's
            other_TK, weight_TK, other_loss = moe.route(current, context.used_T, exclude_T=expert_TK[:, 0])
            routed, loss = moe.routed(current, other_TK, weight_TK) + routed, (loss + other_loss) / 2
        parts = [part for part in moe.parts(current, routed) if part is not None]
        if not self.late_parts:
            parts = [sum(parts)]
        if self.post_norm is not None:
            parts = [self.post_norm(part) for part in parts]
        late = last.scaled(parts.pop()) if self.joins_late else None
        for part in parts:
            hidden = last.add(hidden, part, last.mlp_norm)
        return hidden, loss, late

    def read_shortcut(self, hidden: Tensor) -> Tensor:
        """The tapped value through the shortcut's own norm, or as the operator behind the tap reads it."""
        if self.shortcut_norm is not None:
            return self.shortcut_norm(hidden)
        block = self.blocks[self.tap // 2]
        return block.read(hidden, block.mlp_norm if self.tap % 2 else block.attention_norm)


class ScMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model."""

    config_class = ScMoEConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Pair"]  # noqa: RUF012
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"\.base_coefficient\."]  # noqa: RUF012  # scmoe_ds: how layers ran before
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__(config)
        V, D = config.vocab_size, config.hidden_size
        self.embedding = nn.Embedding(V, D)
        learned = config.position_embedding == "learned_absolute"
        self.positions = nn.Embedding(config.max_position_embeddings, D) if learned else None
        pairs: list[Pair] = []
        for number in range(config.num_hidden_layers // config.moe_every):
            pairs.append(Pair(config, number, pairs[-1].blocks[-1].moe if number % config.pairs_per_moe else None))
        self.runs = nn.ModuleList(pairs)
        self.final_norm = norm_of(config)
        self.head = None if config.tie_word_embeddings else nn.Linear(D, V, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """None where the head is the embedding."""
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """
        Args:
            input_ids: [B, S]; or inputs_embeds, [B, S, D].
            attention_mask: [B, L], 0 for padding on either side, which is routed to no expert; L counts the tokens of
                the cache, too.
            position_ids: [B, S]; default: each token's place among those that the mask leaves.
            cache, past_key_values: two names for the same, by the version of transformers.
            labels: [B, S], -100 where no loss is computed. They are shifted here. In training the loss has the
                balancing loss in it, times `router_aux_loss_coef`.
            logits_to_keep: how many logits, from the last token on, or which; 0: all.
        """
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and not self.training and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        context, position_BS = self.context(hidden, attention_mask, position_ids, cache)
        if self.positions is not None:
            hidden = hidden + self.positions(position_BS)
        hidden, losses, late = F.dropout(hidden, self.config.hidden_dropout, self.training), [], None
        for pair in self.runs:
            hidden, loss, late = pair(hidden, context, late)
            losses.append(loss)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = F.linear(self.final_norm(hidden[:, keep]), weight)
        aux_loss, loss = torch.stack(losses).sum(), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training:
                items = kwargs.get("num_items_in_batch")  # of all micro-batches: Trainer adds up their losses
                share = 1 if items is None else (labels[..., 1:] != -100).sum() / items
                loss = loss + self.config.router_aux_loss_coef * share * aux_loss
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **{CACHE: cache})

    def context(
        self, hidden_BSD: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any
    ) -> tuple[Context, Tensor]:
        """What the blocks know of the tokens, and the tokens' positions [B, S]."""
        (B, S, _), device = hidden_BSD.shape, hidden_BSD.device
        before = 0 if cache is None else int(cache.get_seq_length())
        real_BL = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.to(device) != 0
        if position_ids is not None:
            position_BS = position_ids
        elif real_BL is not None:
            position_BS = (real_BL.cumsum(1) - 1).clamp(min=0)[:, -S:]
        else:
            position_BS = torch.arange(before, before + S, device=device).expand(B, S)
        seen = None
        if real_BL is not None or before:
            place_L = torch.arange(before + S, device=device)
            place_S1 = place_L[before:].unsqueeze(1)
            seen = (place_L <= place_S1)[None, None]
            if real_BL is not None:  # a token of padding sees itself: the softmax of nothing would be NaN
                seen = seen & (real_BL[:, None, None] | (place_L == place_S1))
        turns = None
        if self.positions is None:
            size = self.config.hidden_size // self.config.num_attention_heads
            exponent = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
            angle = position_BS.float()[..., None, None] * self.config.rotary_base**-exponent
            turns = angle.cos().repeat(1, 1, 1, 2), angle.sin().repeat(1, 1, 1, 2)
        return Context(turns, seen, None if real_BL is None else real_BL[:, -S:].reshape(-1), cache), position_BS
