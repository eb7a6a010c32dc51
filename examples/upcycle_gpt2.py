"""A dense Hugging Face GPT-2 whose MLPs become ScMoE layers, trained on the text of Python's own reference manual.

    python examples/upcycle_gpt2.py
    deepspeed --num_gpus 2 examples/upcycle_gpt2.py 2      # experts on two ranks

With a trained model, take transformers.GPT2LMHeadModel.from_pretrained("gpt2") and its tokenizer instead of a model
that is made here and trained on bytes for a few seconds.
"""

import pydoc_data.topics
import sys

import torch
import transformers

import scmoe_ds

BATCH, LENGTH, DENSE_STEPS, STEPS = 8, 64, 20, 60
RANKS_PER_LAYER = next((int(each) for each in sys.argv[1:] if each.isdigit()), 1)
TEXT = torch.tensor(list("".join(pydoc_data.topics.topics.values()).encode()))
CONFIG = {
    "train_micro_batch_size_per_gpu": BATCH,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "scmoe": {
        "architecture": "scmoe",
        "position": "pos2",
        "moe_every": 2,
        "num_experts": 4,
        "expert_parallel_size": RANKS_PER_LAYER,
        "overlap": {"calibration_steps": 0},
    },
}


def batch(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    starts = torch.randint(len(TEXT) - LENGTH, (BATCH,), generator=generator).tolist()
    return torch.stack([TEXT[start : start + LENGTH] for start in starts])


def dense_model() -> transformers.GPT2LMHeadModel:
    """Stands for the model that somebody has trained; the same on every rank."""
    torch.manual_seed(0)
    shape = transformers.GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=128, n_layer=4, n_head=4)
    shape.resid_pdrop = shape.embd_pdrop = shape.attn_pdrop = 0.0
    model = transformers.GPT2LMHeadModel(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(DENSE_STEPS):
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if torch.distributed.get_rank() == 0:
        print(f"dense, step {DENSE_STEPS}: loss {loss.item():.2f}", flush=True)
    return model


scmoe_ds.connect()  # before the layers are made: which experts a rank makes depends on the rank
model = scmoe_ds.moe_from_dense(dense_model(), scmoe_ds.ScMoEConfig.from_deepspeed(CONFIG), noise=0.01)
engine, *_ = scmoe_ds.initialize(model=model, config=CONFIG)
rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
recent = []
for step in range(1, STEPS + 1):
    tokens = batch(DENSE_STEPS + step * ranks + rank).to(engine.device)
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss + 0.01 * scmoe_ds.load_balancing_loss(engine))
    engine.step()
    recent = [*recent[-9:], loss.item()]
    if step % 10 == 0 and rank == 0:
        print(f"ScMoE, step {step}: mean loss of ten steps {sum(recent) / len(recent):.2f}", flush=True)
torch.distributed.destroy_process_group()
