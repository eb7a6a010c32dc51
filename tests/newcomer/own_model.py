"""A newcomer's own model. None of its names is known to anybody: a tower of storeys, each with calm, look and think."""

import torch
from deepspeed.moe.layer import MoE
from torch import nn

import scmoe_ds

WIDTH, SIGNS, LENGTH = 32, 16, 12
CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "scmoe": {"replace": True, "tap": "{previous}.calm_two:input", "overlap": {"calibration_steps": 0}},
}


class Storey(nn.Module):
    def __init__(self, has_experts: bool) -> None:
        super().__init__()
        self.calm_one, self.calm_two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.look = nn.GRU(WIDTH, WIDTH, batch_first=True)
        think = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.think = MoE(WIDTH, think, num_experts=4, k=2) if has_experts else think
        self.balance = torch.zeros(())

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        stream = stream + self.look(self.calm_one(stream))[0]
        thought = self.think(self.calm_two(stream))
        if isinstance(thought, tuple):
            thought, self.balance, _ = thought
        return stream + thought


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Embedding(SIGNS, WIDTH), nn.Linear(WIDTH, SIGNS)
        self.storeys = nn.ModuleList([Storey(False), Storey(True), Storey(False), Storey(True)])

    def forward(self, signs: torch.Tensor) -> torch.Tensor:
        stream = self.read(signs[:, :-1])
        for storey in self.storeys:
            stream = storey(stream)
        loss = nn.functional.cross_entropy(self.write(stream).flatten(0, 1), signs[:, 1:].flatten())
        return loss + 0.01 * sum(storey.balance for storey in self.storeys)


scmoe_ds.connect()
torch.manual_seed(0)
engine, *_ = scmoe_ds.initialize(model=Tower(), config=CONFIG)
torch.manual_seed(1)
for step in range(1, 41):  # each row counts on from a sign of its own
    signs = (torch.randint(SIGNS, (8, 1)) + torch.arange(LENGTH)) % SIGNS
    loss = engine(signs.to(engine.device))
    engine.backward(loss)
    engine.step()
    if step in (1, 40):
        print(f"step {step}: loss {loss.item():.3f}", flush=True)
