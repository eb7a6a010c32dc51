"""Fine-tunes a Qwen3-MoE on a text file. All ranks share the experts, and their communication runs beside computation.

python examples/finetune_qwen3_moe.py                                    # a tiny random model on this file's bytes
deepspeed --num_gpus 8 examples/finetune_qwen3_moe.py text.txt Qwen3-30B-A3B
"""

import sys
from pathlib import Path

import torch
import transformers

import scmoe_ds

GIVEN = [word for word in sys.argv[1:] if not word.startswith("--")]  # the launcher adds --local_rank
TEXT, DIRECTORY = Path((GIVEN or [__file__])[0]), (GIVEN[1:] or [None])[0]
TINY = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 8, "vocab_size": 256}
TINY |= {"num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
scmoe_ds.connect()
ranks = torch.distributed.get_world_size()
CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "bf16": {"enabled": torch.cuda.is_available()},
    "zero_optimization": {"stage": 1},
    "expert_parallel": {"enabled": True, "autoep_size": ranks, "preset_model": "qwen3_moe"},
    "scmoe": {},
}
if DIRECTORY:
    model = scmoe_ds.from_pretrained(DIRECTORY, CONFIG)
    ids = transformers.AutoTokenizer.from_pretrained(DIRECTORY)(TEXT.read_text())["input_ids"]
else:
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TINY))
    ids = list(TEXT.read_bytes())
rows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
arguments = transformers.TrainingArguments(
    "finetuned", deepspeed=CONFIG, bf16=torch.cuda.is_available(), learning_rate=1e-3 if DIRECTORY is None else 1e-5,
    max_steps=60, logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
data, callbacks = [{"input_ids": row, "labels": row} for row in rows], [scmoe_ds.ScMoECallback()]
trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
trainer.train()
trainer.save_model()  # AutoModelForCausalLM.from_pretrained("finetuned") loads it
for entry in trainer.state.log_history if torch.distributed.get_rank() == 0 else []:
    print("\n".join(f"step {entry['step']}: {key} {entry[key]}" for key in entry if key == "loss"), flush=True)
torch.distributed.destroy_process_group()
