"""What a reader of the pages has: text, a tokenizer, data sets, images, models, checkpoints and a hostfile."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import ByteLevelBPETokenizer

from lab.moe_families import tiny
from scmoe_ds.inference.load import load_trained
from scmoe_ds.models.identity import identity
from tests.docs.pages import ROOT
from tests.docs.smaller import GPT, SWIN, smaller_json
from tests.helpers.shell import run

END = "<|endoftext|>"
WORDS = "the model reads a text and says which word comes next because it has seen many of them before".split()
HELLASWAG = {
    "activity_label": "Reading",
    "ctx_a": "She opens the book.",
    "ctx_b": "she",
    "endings": ["reads.", "flies.", "melts.", "barks."],
    "label": "0",
    "ind": 0,
    "split_type": "indomain",
    "source_id": "a",
}


def make_readers_own() -> None:
    """Fills the working directory."""
    _texts_and_tokenizers()
    _data_sets()
    _images()
    _hugging_face()
    _tasks()
    Path("hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    small = Path(smaller_json("ds_configs/gpt_small_cpu.json"))
    for name in ("ds.json", "X.json"):
        shutil.copy(small, name)
    offloaded = json.loads(small.read_text())
    offloaded["scmoe"]["offload_experts"] = {"device": "cpu", "buffer_count": 4}
    Path("offload.json").write_text(json.dumps(offloaded))
    _checkpoints()
    _times()


def _texts_and_tokenizers() -> None:
    draw = random.Random(1)
    texts = [f"texts/{number % 3}/{number}.txt" for number in range(30)]
    for name in (*texts, "book.txt", "wikitext.test.tokens", "prompts.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        count, length = {"book.txt": (60, 9), "prompts.txt": (3, 1)}.get(name, (6, 9))
        lines = [" ".join(draw.choices(WORDS, k=length)) for _ in range(count)]
        Path(name).write_text("\n".join(lines) + "\n")
    own = ByteLevelBPETokenizer()
    own.train(["book.txt"], vocab_size=300, special_tokens=[END], show_progress=False)
    own.save_model(".")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(name, f"gpt2-{name}")
    for name in ("models/llama-2-tokenizer", "models/llama", "models/gpt2", "models/qwen3_moe"):
        transformers.PreTrainedTokenizerFast(tokenizer_object=own._tokenizer, eos_token=END).save_pretrained(name)


def _data_sets() -> None:
    """Of bytes: their ids are below the size of any vocabulary."""
    lines = Path("book.txt").read_text().splitlines()
    Path("shards.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    for prefix in ("data/corpus", "my_corpus", "data/slimpajama", "data/slimpajama_llama"):
        assert run(["scmoe", "preprocess", "--input", "shards.jsonl", "--output-prefix", prefix, "--append-eod"]) == 0


def _images() -> None:
    draw = np.random.default_rng(1)
    for parent in ("images", "data/imagenet"):
        for part in ("train", "val"):
            for label in ("cat", "dog"):
                path = Path(parent, part, label)
                path.mkdir(parents=True)
                for number in range(4):
                    Image.fromarray(draw.integers(0, 255, (16, 16, 3), np.uint8)).save(path / f"{number}.png")


def _hugging_face() -> None:
    torch.manual_seed(1)
    small = {"vocab_size": 384, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 16}
    config = transformers.LlamaConfig(**small, num_hidden_layers=2, intermediate_size=24)
    transformers.LlamaForCausalLM(config).save_pretrained("models/llama")
    gpt2 = transformers.GPT2Config(vocab_size=384, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained("models/gpt2")
    tiny("qwen3_moe", vocab_size=384).save_pretrained("models/qwen3_moe")


def _tasks() -> None:
    import lm_eval

    Path("tasks").mkdir()
    Path("hellaswag.jsonl").write_text(4 * (json.dumps(HELLASWAG) + "\n"))
    data = Path("hellaswag.jsonl").resolve()
    for name in ("hellaswag_local", "hellaswag", "piqa"):
        Path(f"tasks/{name}.yaml").write_text(
            f"include: {lm_eval.__path__[0]}/tasks/hellaswag/hellaswag.yaml\ntask: {name}\ndataset_path: json\n"
            f"dataset_kwargs:\n  data_files:\n    train: {data}\n    validation: {data}\n"
        )


def _times() -> None:
    """As `scmoe report` of two ranks leaves them for the model of checkpoints/gpt; one rank has nothing to time."""
    times = json.loads((ROOT / "tests/fixtures/before_0_1/times.json").read_text())
    of_the_model = identity(load_trained("checkpoints/gpt").model)
    Path("times.json").write_text(json.dumps([{**each, "identity": of_the_model} for each in times]))


def _checkpoints() -> None:
    flags = f"{GPT} --save-interval 1 --eval-iters 0 --data-path data/corpus_text_document".split()
    for name, section in (
        ("gpt", {}),
        ("top2", {"architecture": "topk", "top_k": 2}),
        ("residual_moe", {"architecture": "shared_expert"}),
    ):
        whole = json.loads(Path("ds.json").read_text())
        if section:
            whole["scmoe"].pop("position")
            whole["scmoe"].pop("merge")
        whole["scmoe"] |= section
        Path("own.json").write_text(json.dumps(whole))
        assert (
            run(["scmoe", "pretrain", *flags, "--deepspeed_config", "own.json", "--save", f"checkpoints/{name}"]) == 0
        )
    for name in ("scmoe", "quick_start", "run"):
        shutil.copytree("checkpoints/gpt", f"checkpoints/{name}")
    assert run(["scmoe", "convert", "export", "checkpoints/gpt", "export"]) == 0
    swin = [
        *SWIN.split(),
        "--num-classes",
        "10",
        "--dataset",
        "digits",
        "--num-channels",
        "1",
        "--save",
        "checkpoints/swin",
    ]
    config = smaller_json("ds_configs/swin_digits_cpu.json")
    assert run(["scmoe", "pretrain-swin", *swin, "--deepspeed_config", config]) == 0
