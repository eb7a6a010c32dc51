"""Paths, data, tokenizers, checkpoints and values of all programs."""

from __future__ import annotations

import pytest

from scmoe_ds.programs.__main__ import PROGRAMS
from tests.programs.mistakes.workplace import DATA, TRAIN, expect

_NEITHER = "is neither a checkpoint nor a directory of them nor an export"
_BYTES = "--tokenizer-type ByteTokenizer"
_HF = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model"
_GPT2 = "--tokenizer-type GPT2BPETokenizer"
_SIMILARITY = "analyze similarity --output record.json"

DATA_ROWS: dict[str, tuple[str, str]] = {
    "data: missing": ("--data-path absent --split 8,1,1", r"absent\.bin and absent\.idx not found\. Give the path"),
    "data: with its extension": ("--data-path data.bin --split 8,1,1", r".* Give the path without extension: data"),
    "data: no index": ("--data-path lone --split 8,1,1", r"lone\.idx not found"),
    "data: plain text": ("--data-path text.txt --split 8,1,1", r"text\.txt\.bin .* not found.*scmoe preprocess"),
    "data: a directory": ("--data-path nothing --split 8,1,1", r"nothing\.bin and nothing\.idx not found"),
    "data: weight": (
        "--data-path -1 data 2 data --split 8,1,1",
        r"--data-path has weight -1: weights must be positive",
    ),
    "data: an empty variable": ('--data-path data --data-cache-path ""', r"--data-cache-path: its value is empty"),
    "data: cache": (f"{DATA} --data-cache-path /proc/x", r"cannot write the index cache in /proc/x: No such file"),
    "split: nothing to train on": ("--data-path data --split 0,1,0", r"data: the train split .* is 0 of 20 documents"),
    "split: nothing to validate on": (
        "--data-path data --split 999,1,0",
        r".*valid split.* or --eval-iters 0 for a run",
    ),
    "split: all zero": ("--data-path data --split 0,0,0", r"--split '0,0,0' is not a split: give the shares"),
    "split: four": ("--data-path data --split 1,1,1,1", r"--split '1,1,1,1' is not a split"),
    "split: words": ("--data-path data --split most,some,rest", r"--split 'most,some,rest' is not a split"),
    "sequence: longer than the data": (f"{DATA} --seq-length 99999", r"data: .* less than one sample: --seq-length"),
    "tokenizer: a name of the hub": (f"{DATA} {_HF} gpt2", r"--tokenizer-model gpt2 is not a local directory"),
    "tokenizer: an empty directory": (f"{DATA} {_HF} nothing", r"--tokenizer-model nothing holds no tokenizer"),
    "tokenizer: no merges": (f"{DATA} {_GPT2} --vocab-file vocab.json", r".*needs --merge-file, and none was given"),
    "tokenizer: files in each other's place": (
        f"{DATA} {_GPT2} --vocab-file merges.txt --merge-file vocab.json",
        r"--vocab-file merges\.txt and --merge-file vocab\.json do not load as GPT-2 BPE: .*belong together",
    ),
    "tokenizer: no end of a document": (
        f"{DATA} {_GPT2} --vocab-file vocab.json --merge-file merges.txt",
        r"--vocab-file vocab\.json has 1 tokens but no <\|endoftext\|>",
    ),
    "load: missing": (f"{DATA} --load absent", rf"--load absent {_NEITHER} \(no such directory\); correct the path"),
    "load: empty": (f"{DATA} --load nothing", rf"--load nothing {_NEITHER} \(it is empty\)"),
    "load: a Hugging Face model": (f"{DATA} --load hf", rf"--load hf {_NEITHER} \(it looks like a Hugging Face model"),
    "load: Megatron's": (f"{DATA} --load megatron", rf"--load megatron {_NEITHER} \(it looks like .* of Megatron"),
    "load: a file": (f"{DATA} --load saved/latest", r"--load saved/latest: is a file, not a directory"),
    "load: an empty variable": (f"{DATA} --load ''", r"--load: its value is empty, as of a shell variable"),
    "load: other heads": (
        f"{DATA} --load export --num-attention-heads 4",
        r".*num_attention_heads: 2 in the checkpoint",
    ),
    "load: another vocabulary": (
        f"{DATA} --load export --make-vocab-size-divisible-by 100",
        r".*vocab_size: 384 in the checkpoint, 300 in this run",
    ),
    "load: a longer sequence": (f"{DATA} --load saved --seq-length 32", r".*max_position_embeddings: 16 in the check"),
    "save: another run's": (f"{DATA} --save saved", r"--save saved: holds checkpoints of another run .*--auto-resume"),
    "save: no permission": (
        f"{DATA} --save /proc/x",
        r"--save /proc/x: cannot write there \(No such file or directory",
    ),
    "save: a file": (f"{DATA} --save data.bin", r"--save data\.bin: cannot write there"),
    "save: an empty variable": (f"{DATA} --save ''", r"--save: its value is empty"),
    "memory": (f"{DATA} --hidden-size 200000000", r"out of memory \(.*allocate.*\): lower train_micro_batch_size"),
    "flag: a switch with a value": (f"{DATA} --debug=1", r"--debug=1: takes no value; write --debug$"),
    "flag: an empty variable": (f"{DATA} --num-layers=", r"--num-layers: its value is empty.*; leave it out$"),
    "flag: no value": (
        f"{DATA} --save",
        r"--save: needs a value; one that begins with a dash is written --save=VALUE$",
    ),
    "flag and JSON": (f"{DATA} --lr 1", r"--lr asks for optimizer\.params\.lr = 1.0, but ds\.json has 0\.001; remove"),
}

ROWS: dict[str, tuple[str, str]] = {
    "preprocess: no file": (
        f"preprocess {_BYTES} --output-prefix out --input absent",
        r"--input absent does not exist",
    ),
    "preprocess: empty": (f"preprocess {_BYTES} --output-prefix out --input empty.txt", r"the input holds no text"),
    "preprocess: Latin-1": (f"preprocess {_BYTES} --output-prefix out --input latin.txt", r"latin\.txt is not UTF-8"),
    "preprocess: binary": (f"preprocess {_BYTES} --output-prefix out --input binary.txt", r"binary\.txt is not UTF-8"),
    "preprocess: another key": (
        f"preprocess {_BYTES} --output-prefix out --input other_key.jsonl",
        r"other_key\.jsonl, line 1: no key 'text'; the line has 'content'\. .*--json-keys",
    ),
    "preprocess: no JSON": (
        f"preprocess {_BYTES} --output-prefix out --input broken.jsonl",
        r"broken\.jsonl, line 2: not JSON .*name plain text files \.txt",
    ),
    "preprocess: a list": (
        f"preprocess {_BYTES} --output-prefix out --input list.jsonl",
        r".*line 1: a JSON list, but",
    ),
    "preprocess: a number": (
        f"preprocess {_BYTES} --output-prefix out --input number.jsonl",
        r".*'text' is of type int",
    ),
    "preprocess: compressed nonsense": (f"preprocess {_BYTES} --output-prefix out --input no.json.gz", r".*: not JSON"),
    "preprocess: cut": (f"preprocess {_BYTES} --output-prefix out --input cut.jsonl.gz", r".*cut\.jsonl\.gz"),
    "preprocess: nothing in it": (f"preprocess {_BYTES} --output-prefix out --input nothing", r".*nothing holds no"),
    "preprocess: unwritable": (f"preprocess {_BYTES} --output-prefix /proc/x/y --input text.txt", r".*/proc/x"),
    "generate: no model": ("generate --prompt a", r"--load: missing; --help shows an example"),
    "generate: nowhere": ("generate --load absent --prompt a", rf"absent {_NEITHER} \(no such directory\)"),
    "generate: Hugging Face": ("generate --load hf --prompt a", rf"hf {_NEITHER} \(it looks like a Hugging Face model"),
    "generate: nothing": ("generate --load saved", r"there is nothing to go on from: give --prompt"),
    "generate: empty": ("generate --load saved --prompt ''", r"prompt 1 is empty"),
    "generate: too long": (f"generate --load saved --prompt {'a' * 99}", r"prompt 1 has 99 tokens, but the model's"),
    "generate: temperature": ("generate --load saved --prompt a --temperature -1", r"--temperature -1\.0: must be at"),
    "generate: top-p": ("generate --load saved --prompt a --top-p 1.5", r"--top-p 1\.5: must be above 0 and at most 1"),
    "generate: no prompts": ("generate --load saved --prompt-file absent", r"--prompt-file absent cannot be read"),
    "generate: Latin-1": ("generate --load saved --prompt-file latin.txt", r"--prompt-file latin\.txt .*not UTF-8"),
    "copies: one rank": (
        "generate --load saved --prompt a --expert-copies 1",
        r"--expert-copies 1: one rank has all experts, .* start more ranks with --moe-expert-parallel-size",
    ),
    "copies: fewer than none": (
        "generate --load saved --prompt a --expert-copies -1",
        r"--expert-copies -1: must be at least 0",
    ),
    "copies: loads without copies": (
        "evaluate --load saved --text-file text.txt --expert-loads loads.json",
        r"--expert-loads goes with --expert-copies: say how many copies a rank shall keep",
    ),
    "copies: no file of loads": (
        "generate --load saved --prompt a --expert-copies 1 --expert-loads text.txt",
        r"--expert-loads text\.txt: is no file of loads; write one with --save-expert-loads",
    ),
    "copies: loads nowhere": (
        "generate --load saved --prompt a --save-expert-loads absent/loads.json",
        r"--save-expert-loads absent/loads\.json cannot be written: name a file in a directory that is there",
    ),
    "copies: loads onto a directory": (
        "generate --load saved --prompt a --save-expert-loads /",
        r"--save-expert-loads /",
    ),
    "copies: rows that drops leave out": (
        "generate --load absent --prompt a --expert-copies 1 --drop-rate 0.25",
        r"--drop-rate: does not go with copies of experts, as both change the routing rule of a layer; leave "
        r"--expert-copies out, or leave --drop-rate out",
    ),
    "copies: of offloaded experts": (
        "generate --load export --prompt a --experts offload --save-expert-loads loads.json",
        r"--save-expert-loads: does not go with offloaded experts, as both change the experts of a layer; "
        r"use --experts resident, or leave --save-expert-loads out$",
    ),
    "copies: loads beside low precision": (
        "generate --load export --prompt a --low-precision all --save-expert-loads loads.json",
        r"--low-precision all: does not go with counts of experts' loads, .* leave --save-expert-loads out, or",
    ),
    "generate: ranks": (
        "generate --load saved --prompt a --moe-expert-parallel-size 2",
        r"scmoe\.expert_parallel_size = 2: must divide the world size 1",
    ),
    "generate: cache": (
        "generate --load saved --prompt a --experts offload --expert-cache 0",
        r"--expert-cache 0: has no room for one expert",
    ),
    "generate: a rate of 1": (
        "generate --load export --prompt a --drop-rate 1",
        r"--drop-rate 1\.0: must be above 0 and below 1; 0\.25 leaves a quarter out",
    ),
    "generate: no thresholds": (
        "generate --load export --prompt a --drop-rate 0.25",
        r"export/sparsity\.json: there is no such file, so no threshold is known; make it with scmoe sparsify",
    ),
    "evaluate: drops and none": (
        "evaluate --load export --text-file text.txt --no-drop --drop-load-aware",
        r"--no-drop computes all: remove it, or --drop-load-aware",
    ),
    "evaluate: nothing": ("evaluate --load saved", r"one of --data-path --text-file --tasks is missing"),
    "evaluate: two texts": (
        "evaluate --load saved --text-file text.txt --data-path data",
        r"--data-path and --text-file: give one of them$",
    ),
    "dashboard: someone else's": (
        "dashboard hf",
        r"hf has no log\.jsonl: name the --save directory of a training run$",
    ),
    "evaluate: no text": ("evaluate --load saved --text-file absent", r"--text-file absent .*: No such file or dir"),
    "evaluate: directory": ("evaluate --load saved --text-file nothing", r"--text-file nothing .*: Is a directory$"),
    "evaluate: empty": ("evaluate --load saved --text-file empty.txt", r"--text-file empty\.txt has 0 token"),
    "evaluate: Latin-1": ("evaluate --load saved --text-file latin.txt", r"--text-file latin\.txt cannot be read as"),
    "evaluate: too long": (
        "evaluate --load saved --text-file text.txt --seq-length 4096",
        r"--seq-length 4096 exceeds the model's context of 16",
    ),
    "evaluate: another tokenizer": (
        f"evaluate --load saved --text-file text.txt {_HF} nothing",
        r"--tokenizer-model nothing holds no tokenizer",
    ),
    "evaluate: unwritable": (
        "evaluate --load saved --text-file text.txt --output /proc/x",
        r"--output /proc/x cannot be written \(No such file or directory\); the results are above",
    ),
    "analyze: no kind": ("analyze", r"missing: one of similarity"),
    "analyze: no model": (f"{_SIMILARITY} --text-file text.txt", r"--load or --hf-model is missing"),
    "analyze: no text": (f"{_SIMILARITY} --load saved", r"--data-path or --text-file or --images is missing"),
    "analyze: nowhere": (f"{_SIMILARITY} --load absent --text-file text.txt", rf"absent {_NEITHER}"),
    "analyze: hub": (
        f"{_SIMILARITY} --hf-model gpt2 --text-file text.txt",
        r"--hf-model gpt2 is not a local directory",
    ),
    "analyze: short": (f"{_SIMILARITY} --load saved --text-file empty.txt", r".*has 0 tokens, less than one sequence"),
    "analyze: a figure's name": (
        "analyze similarity --load saved --text-file text.txt --output a.png",
        r"--output a\.png: must end in \.json",
    ),
    "analyze: no record": (
        "analyze feasibility --similarity absent --calibration absent --output-prefix page",
        r"--similarity absent cannot be read as JSON: No such file or directory",
    ),
    "convert: no kind": ("convert", r"missing: one of export, partition"),
    "convert: misspelt": ("convert expotr saved out", r".*expotr"),
    "convert: one part": ("convert partition saved out --parts 1 --method partial", r"--parts 1: must be at least 2"),
    "convert: uneven parts": (
        "convert partition saved out --parts 7 --method complete",
        r"--parts 7: must divide the \d+ neurons of an expert",
    ),
    "convert: parts onto a run": ("convert partition saved saved --method partial", r"saved is not empty"),
    "convert: nowhere": ("convert export absent out", rf"absent {_NEITHER} \(no such directory\)"),
    "convert: over a run": ("convert export saved saved", r"saved is not empty; name another directory"),
    "convert: onto a file": ("convert export saved data.bin", r"data\.bin: the export was not written \(File exists\)"),
    "sparsify: no text": ("sparsify --load saved --output out", r"--text-file: missing; --help shows an example"),
    "sparsify: an empty text": (
        "sparsify --load saved --output out --text-file empty.txt",
        r"--text-file empty\.txt has 0 tokens, less than one sequence of 16; give more text",
    ),
    "sparsify: little text": (
        "sparsify --load saved --output out --text-file text.txt --max-tokens 999",
        r"--text-file text\.txt: 992 tokens are too few to calibrate thresholds; give 1024 or more",
    ),
    "sparsify: nowhere": ("sparsify --load absent --output out --text-file text.txt", rf"absent {_NEITHER}"),
    "sparsify: dense": (
        "sparsify --load hf --output out --text-file text.txt",
        r"--load hf: .*GPT2LMHeadModel has no MoE layer, so there are no experts to sort; name a MoE model",
    ),
    "sparsify: all": (
        "sparsify --load saved --output out --text-file text.txt --rate 1",
        r"--rate 1: must be above 0 and below 1",
    ),
    "sparsify: no W3": (
        "sparsify --load saved --output out --text-file text.txt --measure gate-up",
        r"--measure gate-up: multiplies with W3 x, but these experts have GELU and no W3; use abs-gate or gate",
    ),
    "sparsify: under a file": (
        "sparsify --load saved --output text.txt/out --text-file text.txt",
        r"--output text\.txt/out: cannot be made, .*/text\.txt is no directory or cannot be written; name another",
    ),
    "sparsify: over a run": (
        "sparsify --load saved --output saved --text-file text.txt",
        r"--output saved: is not empty; name another",
    ),
    "adapt: a ScMoE": ("adapt saved --output out", r'saved: is a ScMoE already \(architecture "scmoe"\); go on'),
    "adapt: nowhere": ("adapt absent --output out", rf"absent {_NEITHER} \(no such directory\)"),
    "adapt: over a run": ("adapt saved --output saved", r"--output saved: is not empty; name another"),
    "adapt: no text": (
        "adapt saved --output out --shared-expert busiest",
        r"--shared-expert busiest: is measured on text; name a file by --text-file",
    ),
    "check: nothing": ("check", r"--deepspeed_config.* missing"),
    "check: another card": (
        "check --deepspeed_config ds.json --preset gpt2-moe-small --card A8",
        r"--card A8: must be one of A100, A100-40GB, A30, A800",
    ),
    "plan: nothing": ("plan", r"--cluster: missing; name a description, as those in clusters/, or a --profile"),
    "plan: nowhere": ("plan --cluster absent.json --preset gpt2-moe-small", r"absent\.json: cannot be read \(No such"),
    "plan: no description": ("plan --cluster text.txt --preset gpt2-moe-small", r"text\.txt: line 1, .*: is no JSON"),
    "probe: no time": ("probe --seconds 0", r"--seconds 0: must be from 1 to 3600"),
    "report: nothing": ("report", r"--deepspeed_config.* missing"),
    "scmoe: misspelt": ("generat", r"generat: no such program; did you mean \"generate\"\?"),
    "swin: nothing": ("pretrain-swin", r"--deepspeed_config.* missing"),
}


@pytest.mark.parametrize("case", DATA_ROWS)
def test_a_run_that_does_not_start(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    flags, message = DATA_ROWS[case]
    expect(f"{TRAIN} {flags}", message, capfd)


@pytest.mark.parametrize("case", ROWS)
def test_a_program_that_does_not_start(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    expect(*ROWS[case], capfd)


def test_every_program_has_its_mistakes() -> None:
    assert {command.split()[0] for command, _ in ROWS.values()} >= PROGRAMS.keys() - {"pretrain", "dashboard"}
    assert len(DATA_ROWS) + len(ROWS) >= 66
