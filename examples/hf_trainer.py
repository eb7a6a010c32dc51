"""Hugging Face's Trainer on a dense GPT-2 whose MLPs become ScMoE layers.

python examples/hf_trainer.py
deepspeed --num_gpus 2 examples/hf_trainer.py 2      # experts on two ranks
"""

import sys
import tempfile

import torch
import transformers

import scmoe_ds

LENGTH, SEQUENCES, STEPS = 32, 480, 60
CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 1},
    "scmoe": {"num_experts": 4, "expert_parallel_size": next((int(arg) for arg in sys.argv[1:] if arg.isdigit()), 1)},
}


def dense_model() -> transformers.GPT2LMHeadModel:
    """Stands for a model that somebody has trained; the same on every rank."""
    torch.manual_seed(0)
    shape = transformers.GPT2Config(
        vocab_size=64, n_positions=LENGTH, n_embd=64, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    shape.resid_pdrop = shape.embd_pdrop = shape.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(shape)


def sequence(number: int) -> dict[str, torch.Tensor]:
    """Numbers that count up, modulo 64."""
    tokens = (number * 7 + torch.arange(LENGTH)) % 64
    return {"input_ids": tokens, "labels": tokens}


scmoe_ds.connect()  # before the layers are made: which experts a rank makes depends on the rank
section = scmoe_ds.ScMoEConfig.from_deepspeed({"scmoe": CONFIG["scmoe"]})
model = scmoe_ds.moe_from_dense(dense_model(), section, noise=0.01)
with tempfile.TemporaryDirectory() as directory:
    arguments = transformers.TrainingArguments(
        output_dir=directory,
        deepspeed=CONFIG,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    data = [sequence(number) for number in range(SEQUENCES)]
    callbacks = [scmoe_ds.ScMoECallback()]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
if torch.distributed.get_rank() == 0:
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {entry['loss']}", flush=True)
torch.distributed.destroy_process_group()
