"""A small vision-language model with ScMoE layers learns to read handwritten digits, forwards and backwards.

python examples/vision_language.py --save checkpoints/vision_language
deepspeed --num_accelerators 2 examples/vision_language.py --expert-parallel-size 2

A question is twelve images of digits, then bytes: "read? 371402958716." Each image is four patches, so that seven of
ten tokens are patches. The model is our GPT; a linear projection puts patches among its tokens, and the MoE layers are
told which tokens these are (docs/vision_language.md). Needs scikit-learn for the images. Three minutes on a core.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import scmoe_ds
from scmoe_ds import checkpoint
from scmoe_ds.checkpoint import tokenizer_files
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.digit_questions import IMAGE_SIZE, PATCH_TOKEN, VOCAB_SIZE, DigitQuestions
from scmoe_ds.data.sampler import pretraining_batches
from scmoe_ds.data.tokenizer import ByteTokenizer
from scmoe_ds.evaluation.answers import score_answers
from scmoe_ds.inference.generate import Request, TextGenerator
from scmoe_ds.inference.sampling import Sampling
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.vision_language import VisionLanguageGPT
from scmoe_ds.models.vision_language_settings import VisionLanguageSettings
from scmoe_ds.training.loop import Trainer
from scmoe_ds.training.settings import TrainingSettings

MODEL = VisionLanguageSettings(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=80,
    init_method_std=0.12,
    patch_token=PATCH_TOKEN,
    image_size=IMAGE_SIZE,
    patch_size=4,
)


def train(engine: Any, whole: dict[str, Any], iterations: int, seed: int, save: str | None) -> None:
    """Trains an engine of a VisionLanguageGPT in the package's own loop: its data sets may have images."""
    batch, ranks = engine.train_micro_batch_size_per_gpu(), torch.distributed.get_world_size()
    data = DigitQuestions(iterations * batch * ranks, MODEL.patches, seed)
    held_out = DigitQuestions(4 * batch * ranks, MODEL.patches, seed, held_out=True)
    settings = TrainingSettings(iterations, batch, 1, data.length, seed, 50, eval_interval=300, eval_iters=4, save=save)
    description = checkpoint.describe(MODEL, engine.module.config, ranks, whole)
    description[tokenizer_files.KEY] = tokenizer_files.record(tokenizer_files.describe(ByteTokenizer()), {})
    Trainer(engine, data, held_out, settings, description).run()


def show_answers(engine: Any, seed: int) -> None:
    """How well the model answers questions about images that it has not seen, and some of its answers."""
    held_out = DigitQuestions(480, MODEL.patches, seed, held_out=True)
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    batches = pretraining_batches(
        held_out, micro_batch_size=16, data_parallel_rank=rank, data_parallel_size=ranks, consumed_samples=0
    )
    found = score_answers(engine.module.eval(), batches)
    questions = [held_out.question(number) for number in range(4)]
    texts = TextGenerator(engine.module).generate(
        [question.prompt for question in questions],
        Request(len(questions[0].answer), Sampling(temperature=0)),
        images=[question.images for question in questions],
    )
    if rank:
        return
    for question, text in zip(questions, texts, strict=True):
        print(f"{question.text} {bytes(min(token, 255) for token in text.tokens).decode(errors='replace')}")
    print(f"held out: {found.questions} questions, loss {found.loss:.4g} nats per token of an answer")
    print(f"  {100 * found.right_tokens:.1f} % of the digits, {100 * found.right:.1f} % of the answers right")


def main() -> None:
    """Training, then what the model answers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--train-iters", type=int, default=1500)
    parser.add_argument("--expert-parallel-size", type=int, default=1)
    parser.add_argument("--save")
    parser.add_argument("--deepspeed_config", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    whole = json.loads(args.deepspeed_config.read_text())
    whole["scheduler"]["params"]["total_num_steps"] = max(args.train_iters, 61)
    whole["scmoe"]["expert_parallel_size"] = args.expert_parallel_size
    scmoe_ds.connect()
    model = VisionLanguageGPT(MODEL, ScMoEConfig.from_deepspeed(whole))
    initialize_parameters(model, args.seed, MODEL.init_method_std, MODEL.num_layers)
    engine, *_ = scmoe_ds.initialize(model=model, config=whole)
    train(engine, whole, args.train_iters, args.seed, args.save)
    show_answers(engine, args.seed)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
