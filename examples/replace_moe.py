"""A model with DeepSpeed MoE layers that becomes one with ScMoE layers: 40 lines of model, one call.

python examples/replace_moe.py
deepspeed --num_gpus 2 examples/replace_moe.py 2      # experts on two ranks
"""

import sys

import torch
from deepspeed.moe.layer import MoE
from torch import nn

import scmoe_ds

WIDTH, WORDS, LENGTH = 64, 32, 24
RANKS_PER_LAYER = next((int(each) for each in sys.argv[1:] if each.isdigit()), 1)
CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "scmoe": {"replace": True, "position": "pos2", "overlap": {"calibration_steps": 0}},
}


class FeedForward(nn.Module):
    """An MLP, or DeepSpeed's MoE of such MLPs."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.net = mlp if num_experts == 1 else MoE(WIDTH, mlp, num_experts, ep_size=RANKS_PER_LAYER, k=2)
        self.l_aux = torch.zeros(())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if isinstance(self.net, MoE):
            hidden, self.l_aux, _ = self.net(hidden)
            return hidden
        return self.net(hidden)


class Block(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.feed = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), FeedForward(num_experts)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(hidden)
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1], device=hidden.device)
        hidden = hidden + self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return hidden + self.feed(self.norm2(hidden))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.blocks = nn.ModuleList([Block(num_experts) for num_experts in (1, 4, 1, 4)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            hidden = block(hidden)
        loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())
        return loss + 0.01 * sum(block.feed.l_aux for block in self.blocks)


scmoe_ds.connect()
torch.manual_seed(0)
engine, *_ = scmoe_ds.initialize(model=Model(), config=CONFIG)
torch.manual_seed(1 + torch.distributed.get_rank())
for step in range(1, 61):  # every sequence counts, modulo 32, in steps of its own
    start, stride = torch.randint(WORDS, (8, 1)), torch.randint(1, 4, (8, 1))
    loss = engine(((start + stride * torch.arange(LENGTH)) % WORDS).to(engine.device))
    engine.backward(loss)
    engine.step()
    if step % 10 == 0 and torch.distributed.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}", flush=True)
torch.distributed.destroy_process_group()
