"""An independent pair of blocks: explicit formulas, loops over tokens, no code of the package.

Reads a run's parameters by name and nothing else of it. fp32 or fp64, one process, GELU MLPs, LayerNorm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    inner = x @ w[f"{name}.input.weight"].T + w[f"{name}.input.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return inner @ w[f"{name}.output.weight"].T + w[f"{name}.output.bias"]


def attention(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    S, D = x.shape[1:]
    size = D // heads
    joint = x @ w[f"{name}.query_key_value.weight"].T + w[f"{name}.query_key_value.bias"]
    out = []
    for head in range(heads):
        q, k, v = (joint[..., part * D + head * size : part * D + (head + 1) * size] for part in range(3))
        scores = q @ k.transpose(1, 2) / math.sqrt(size)
        future = torch.ones(S, S).triu(1).bool()
        out.append(torch.softmax(scores.masked_fill(future, float("-inf")), -1) @ v)
    return torch.cat(out, -1) @ w[f"{name}.output.weight"].T + w[f"{name}.output.bias"]


def choose(
    logits: Tensor,
    k: int,
    capacity_factor: float,
    min_capacity: int,
    drop: bool,
    order: Tensor | None = None,
    softmax: str = "deepspeed",
    used: list[bool] | None = None,
):
    """[(expert, weight) per kept choice] per token, and the load-balancing loss.

    k = 1 drops at random: an expert keeps the tokens with the largest numbers of `order` [used tokens, E].
    k = 2 drops by arrival: all first choices in token order, then all second choices.
    k > 2 drops by probability: an expert keeps the tokens that it is most probable for.

    Args:
        softmax: a token's weights add up to 1 over "all" experts, the "chosen" or the "kept" ones; "deepspeed": "all"
            for k = 1, "kept" for more.
        used: which tokens are none of padding; the others choose nothing and count nowhere.
    """
    T, E = logits.shape
    tokens = [t for t in range(T) if used is None or used[t]]
    U = len(tokens)
    probability = torch.softmax(logits, -1)
    ranked = {t: sorted(range(E), key=lambda e: -probability[t, e].item())[:k] for t in tokens}
    capacity = min(max(math.ceil(U / E * capacity_factor * k), min_capacity), U) if drop else U
    kept: list[list[int]] = [[] for _ in range(T)]
    for e in range(E):
        arrivals = [(t, rank) for rank in range(k) for t in tokens if ranked[t][rank] == e]
        if k == 1 and order is not None:
            arrivals.sort(key=lambda arrival: -order[tokens.index(arrival[0]), e].item())
        if k > 2:
            arrivals.sort(key=lambda arrival: -probability[arrival[0], e].item())
        for t, _ in arrivals[:capacity]:
            kept[t].append(e)
    if softmax == "deepspeed":
        softmax = "all" if k == 1 else "kept"
    choices = []
    for t in range(T):
        among = {"all": range(E), "chosen": ranked.get(t, ()), "kept": kept[t]}[softmax]
        total = sum(probability[t, e] for e in among)
        choices.append([(e, probability[t, e] / total) for e in kept[t]])
    if not U:
        return choices, 0 * probability.sum()
    counted = k if k > 2 else 1  # for two experts DeepSpeed balances first choices
    share = [sum(ranked[t][:counted].count(e) for t in tokens) / U / counted for e in range(E)]
    return choices, (probability[tokens].mean(0) * torch.tensor(share, dtype=logits.dtype)).sum() * E


def routed(x: Tensor, w: Weights, name: str, choices) -> Tensor:
    """Eq. 1, one token and one expert at a time."""
    flat = x.reshape(-1, x.shape[-1])
    rows = []
    for t, chosen in enumerate(choices):
        row = torch.zeros_like(flat[t])
        for e, weight in chosen:
            row = row + weight * mlp(flat[t], w, f"{name}.deepspeed_moe.experts.deepspeed_experts.{e}")
        rows.append(row)
    return torch.stack(rows).view_as(x)


def merged(merge: str, shared: Tensor, routed_output: Tensor, x: Tensor, w: Weights, name: str) -> Tensor:
    if merge == "add":
        return shared + routed_output
    logits = x @ w[f"{name}.coefficient.weight"].T + w[f"{name}.coefficient.bias"]
    if merge == "cg1":
        return shared / (1 + torch.exp(-logits)) + routed_output
    e = torch.exp(logits - logits.max(-1, keepdim=True).values)
    coefficient = e / e.sum(-1, keepdim=True)
    return coefficient[..., :1] * routed_output + coefficient[..., 1:] * shared


def pair(hidden: Tensor, w: Weights, *, heads: int, position: str, merge: str, gate: dict, num_blocks: int = 2):
    """Output and load-balancing loss of a run whose shortcut is taken in the block before the last (eq. 7-10).

    Args:
        gate: keyword arguments of `choose`.
    """
    last = num_blocks - 1
    tap = hidden  # Pos-1 with an MoE in every block
    for block in range(last):
        name = f"blocks.{block}"
        before = hidden
        after_attention = before + attention(
            layer_norm(before, w, f"{name}.attention_norm"), w, f"{name}.attention", heads
        )
        hidden = after_attention + mlp(layer_norm(after_attention, w, f"{name}.mlp_norm"), w, f"{name}.mlp")
        tap = {"pos1": hidden, "pos2": after_attention, "pos3": before}[position]
    name = f"blocks.{last}"
    tokens = layer_norm(tap, w, "shortcut_norm")
    logits = tokens.reshape(-1, tokens.shape[-1]) @ w[f"{name}.moe.deepspeed_moe.gate.wg.weight"].T
    choices, l_aux = choose(logits, **gate)
    hidden = hidden + attention(layer_norm(hidden, w, f"{name}.attention_norm"), w, f"{name}.attention", heads)
    x = layer_norm(hidden, w, f"{name}.mlp_norm")
    output = merged(merge, mlp(x, w, f"{name}.moe.mlp"), routed(tokens, w, f"{name}.moe", choices), x, w, f"{name}.moe")
    return hidden + output, l_aux


def double_gated_pair(hidden: Tensor, w: Weights, *, heads: int, position: str, moe: str = "blocks.1.moe"):
    """Output and load-balancing loss of a DGMoE run of two blocks without drops (eq. 23): two top-1 choices per token,
    of two experts.

    Args:
        moe: prefix of gate and experts, which may be those of another run.
    """
    after_attention = hidden + attention(
        layer_norm(hidden, w, "blocks.0.attention_norm"), w, "blocks.0.attention", heads
    )
    through = after_attention + mlp(layer_norm(after_attention, w, "blocks.0.mlp_norm"), w, "blocks.0.mlp")
    tap = {"pos1": through, "pos2": after_attention, "pos3": hidden}[position]
    before = layer_norm(tap, w, "shortcut_norm")
    through = through + attention(layer_norm(through, w, "blocks.1.attention_norm"), w, "blocks.1.attention", heads)
    output, l_aux = double_gated(before, layer_norm(through, w, "blocks.1.mlp_norm"), w, moe)
    return through + output, l_aux


def double_gated(before: Tensor, now: Tensor, w: Weights, moe: str):
    """Eq. 23 and the load-balancing loss: one expert for each of a token's two representations."""
    gate = w[f"{moe}.deepspeed_moe.gate.wg.weight"].T
    rows, probabilities, picks = [], ([], []), ([], [])
    for early, late in zip(before.reshape(-1, before.shape[-1]), now.reshape(-1, now.shape[-1]), strict=True):
        chosen = None
        row = torch.zeros_like(late)
        for place, token in enumerate((early, late)):
            probability = torch.softmax(token @ gate, -1)
            ranked = sorted(range(len(probability)), key=lambda e, p=probability: -p[e].item())
            expert = ranked[1] if ranked[0] == chosen else ranked[0]
            row = row + probability[expert] * mlp(token, w, f"{moe}.deepspeed_moe.experts.deepspeed_experts.{expert}")
            probabilities[place].append(probability)
            picks[place].append(expert)
            chosen = expert
        rows.append(row)
    losses = []
    for probability, picked in zip(probabilities, picks, strict=True):
        share = torch.bincount(torch.tensor(picked), minlength=gate.shape[1]) / len(picked)
        losses.append((torch.stack(probability).mean(0) * share).sum() * gate.shape[1])
    return torch.stack(rows).view_as(now), torch.stack(losses).mean()


def late_joining(
    hidden: Tensor,
    w: Weights,
    *,
    pairs: int,
    blocks: int,
    heads: int,
    gate: dict,
    tap: int | None,
    merge: str = "add",
    shared_norm: bool = False,
    double: bool = False,
    shared: bool = True,
    scale: float = 1.0,
):
    """Output and load-balancing losses of pairs whose routed outputs join behind the next pair's first attention.

    Args:
        tap: how many sub-layers of a pair come before its tap; None: the experts read the current layer.
        merge: gives the weights of the two parts, which join one by one.
        shared_norm: the tapped value goes through the norm of the sub-layer behind the tap.
        double: DGMoE, both of whose choices join late.
        shared: whether there is a shared expert.
        scale: of every branch that is added.
    """
    late, losses = torch.zeros_like(hidden), []
    for number in range(pairs):
        own = {name.removeprefix(f"{number}."): each for name, each in w.items() if name.startswith(f"{number}.")}
        values = [hidden]
        for block in range(blocks):
            name, x = f"blocks.{block}", values[-1]
            x = x + scale * attention(layer_norm(x, own, f"{name}.attention_norm"), own, f"{name}.attention", heads)
            values.append(x + late if block == 0 else x)
            if block < blocks - 1:
                x = values[-1]
                values.append(x + scale * mlp(layer_norm(x, own, f"{name}.mlp_norm"), own, f"{name}.mlp"))
        name = f"blocks.{blocks - 1}"
        x = layer_norm(values[-1], own, f"{name}.mlp_norm")
        norm = "shortcut_norm"
        if shared_norm:
            norm = f"blocks.{tap // 2}.{'mlp_norm' if tap % 2 else 'attention_norm'}"
        tokens = x if tap is None else layer_norm(values[tap], own, norm)
        moe = f"{name}.moe"
        if double:
            output, l_aux = double_gated(tokens, x, own, moe)
        else:
            logits = tokens.reshape(-1, tokens.shape[-1]) @ own[f"{moe}.deepspeed_moe.gate.wg.weight"].T
            choices, l_aux = choose(logits, **gate)
            output = routed(tokens, own, moe, choices)
        losses.append(l_aux)
        nothing = torch.zeros_like(output)
        known = merged(merge, mlp(x, own, f"{moe}.mlp"), nothing, x, own, moe) if shared else nothing
        output = merged(merge, nothing, output, x, own, moe) if shared else output
        if "post_norm.weight" in own:
            known, output = (
                layer_norm(known, own, "post_norm") if shared else nothing,
                layer_norm(output, own, "post_norm"),
            )
        hidden, late = values[-1] + scale * known, scale * output
    return hidden + late, losses


def dropped(
    x: Tensor, w: Weights, name: str, choices, skip: float, halve: float, swiglu: bool
) -> tuple[Tensor, tuple[int, int, int]]:
    """1T-Drop and 2T-Drop, one token and one expert at a time: outputs [T, D], and how many choices there were, how
    many whole experts have computed, and how many major halves.

    Args:
        choices: of `choose`; with one choice per token its weight must be the probability.
        skip, halve: thresholds of 2T-Drop.
    """
    rows, counts = [], [0, 0, 0]
    for t, chosen in enumerate(choices):
        row, total = torch.zeros_like(x[t]), sum(weight for _, weight in chosen)
        for e, weight in chosen:
            criterion = float(weight if len(chosen) == 1 else weight / total)
            counts[0] += 1
            if criterion < skip:
                continue
            counts[2 if criterion < halve else 1] += 1
            prefix = f"{name}.experts.deepspeed_experts.{e}"
            inner = x[t] @ w[f"{prefix}.input.weight"].T + w[f"{prefix}.input.bias"]
            if swiglu:
                gate, up = inner[: len(inner) // 2], inner[len(inner) // 2 :]
                inner = gate / (1 + torch.exp(-gate)) * up
            else:
                inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            if criterion < halve:
                inner = torch.cat([inner[: len(inner) // 2], torch.zeros(len(inner) // 2, dtype=inner.dtype)])
            row = row + weight * (inner @ w[f"{prefix}.output.weight"].T + w[f"{prefix}.output.bias"])
        rows.append(row)
    return torch.stack(rows), (counts[0], counts[1], counts[2])
