"""Hugging Face's Trainer on a dense GPT-2 whose MLPs become ScMoE layers.

python examples/hf_trainer.py
deepspeed --num_gpus 2 examples/hf_trainer.py 2      # experts on two ranks

Trainer calls deepspeed.initialize itself, so three things are done here that scmoe_ds.initialize would do: the layers
are made before the Trainer, the experts get parameter groups of their own, and the schedule is set in the section
instead of being timed. Save with DeepSpeed's checkpoints: Trainer's `model.safetensors` holds rank 0's experts alone.
"""

import sys
import tempfile

import torch
import transformers
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

import scmoe_ds

LENGTH, SEQUENCES, STEPS = 32, 480, 60
SECTION = {
    "num_experts": 4,
    "expert_parallel_size": next((int(each) for each in sys.argv[1:] if each.isdigit()), 1),
    "overlap": {"expert_slot": 2, "num_chunks": 1, "calibration_steps": 0},
}
CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 1},
}


class MoETrainer(transformers.Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # compute_loss gives a micro-batch's mean. Without this, Trainer would add these up over the accumulation steps.
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, *_):
        groups = split_params_into_different_moe_groups_for_optimizer(scmoe_ds.parameter_groups(self.model))
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.args.learning_rate)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = outputs.loss + 0.01 * scmoe_ds.load_balancing_loss(model)
        return (loss, outputs) if return_outputs else loss


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
model = scmoe_ds.moe_from_dense(dense_model(), scmoe_ds.ScMoEConfig.from_deepspeed({"scmoe": SECTION}), noise=0.01)
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
    trainer = MoETrainer(model, arguments, train_dataset=[sequence(number) for number in range(SEQUENCES)])
    trainer.train()
if torch.distributed.get_rank() == 0:
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {entry['loss']}", flush=True)
torch.distributed.destroy_process_group()
