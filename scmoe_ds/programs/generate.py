"""Generates text with a trained GPT: one process, or several under the deepspeed launcher.

scmoe generate --load checkpoints/gpt --prompt "def main():" --max-new-tokens 200 --temperature 0.8
deepspeed --num_gpus 8 --module scmoe_ds.programs.generate --load export --moe-expert-parallel-size 8 --prompt "def "
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence

import torch.distributed as dist

from scmoe_ds.data.reader import read_document
from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.errors import ArgumentError, DataError, GenerationError
from scmoe_ds.inference.generate import Completion, GenerationTimes, Request, TextGenerator
from scmoe_ds.inference.model import calibrators
from scmoe_ds.inference.sampling import Sampling
from scmoe_ds.programs.flags.checks import check_text
from scmoe_ds.programs.flags.generate import build_parser
from scmoe_ds.programs.load import check_flags, load
from scmoe_ds.programs.run import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Generates; returns the exit code."""
    return run_program("scmoe generate", argv, generate, parse)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str], Sampling]:
    """The flags, the prompts and how to sample.

    Raises:
        ArgumentError: a setting that its user can correct.
        SystemExit: argparse's own findings, and --help.
    """
    args = build_parser().parse_args(argv)
    check_flags(args)
    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        try:
            # Not splitlines, which also divides at form feeds and other characters of a text.
            prompts += [
                line.removesuffix("\r") for line in read_document(args.prompt_file).removesuffix("\n").split("\n")
            ]
        except (OSError, DataError) as error:
            raise ArgumentError(f"--prompt-file {args.prompt_file} cannot be read as UTF-8 text: {error}") from None
    if not prompts and not args.interactive:
        raise ArgumentError("there is nothing to go on from: give --prompt, --prompt-file or --interactive")
    if "" in prompts:
        raise ArgumentError(f"prompt {prompts.index('') + 1} is empty; give at least one character to go on from")
    if "" in args.stop:
        raise ArgumentError("--stop '': is empty; name a text that ends a completion")
    for flag, texts in (("--prompt", args.prompt), ("--stop", args.stop)):
        for text in texts:
            check_text(flag, text)
    return args, prompts, sampling


def generate(args: argparse.Namespace, prompts: list[str], sampling: Sampling) -> None:
    """One job in a process group that exists."""
    loaded, decisions = load(args)
    tokenizer = loaded.tokenizer
    request = Request(args.max_new_tokens, sampling, (tokenizer.eod,), tuple(args.stop), tokenizer.vocab_size)
    tokens = [tokenizer.tokenize(prompt) for prompt in prompts]
    length = max(map(len, tokens), default=loaded.trained.settings.max_position_embeddings)
    rows = min(args.batch_size, max(len(prompts), 1))
    serving = calibrators(loaded.model, loaded.config, loaded.layout, rows, length)
    trace = (args.scmoe_trace, args.scmoe_trace_dir)
    generator = TextGenerator(loaded.model, serving, args.batch_size, tokenizer, *trace)
    if prompts:
        # Several texts at once would mix on the terminal: those are printed when all are done.
        stream = _Stream(prompts[0]) if len(prompts) == 1 and dist.get_rank() == 0 else None
        completions = generator.generate(tokens, request, stream)
        if stream is not None:
            stream.end(completions[0])
        elif dist.get_rank() == 0:
            for completion, prompt in zip(completions, prompts, strict=True):
                _Stream(prompt).end(completion)
    if args.interactive:
        _talk(generator, tokenizer, request)
    generator.passes.trace.close()
    told = decisions.told()
    if dist.get_rank() == 0:
        chosen = [line for each in serving.values() for line in each.summary()]
        print(*chosen, _speed(generator.times), *told, sep="\n", file=sys.stderr)
    decisions.save(args)


def _talk(generator: TextGenerator, tokenizer: Tokenizer, request: Request) -> None:
    """Prompts from rank 0's terminal, each on its own, until its input ends."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is not UTF-8 is told, and the next prompt read
    while True:
        line: list[str | None] = [None]
        if dist.get_rank() == 0:
            with contextlib.suppress(EOFError):
                line[0] = input("\nprompt> " if sys.stdin.isatty() else "")
        dist.broadcast_object_list(line)
        if line[0] is None:
            return
        if not line[0]:
            continue
        stream = _Stream(line[0]) if dist.get_rank() == 0 else None
        try:
            check_text("prompt>", line[0])
            (completion,) = generator.generate([tokenizer.tokenize(line[0])], request, stream)
        except (ArgumentError, GenerationError) as error:  # on all ranks alike; the next prompt may do
            if stream is not None:
                print(error, file=sys.stderr)
            continue
        if stream is not None:
            stream.end(completion)


class _Stream:
    """Prints a prompt and its completion as it grows."""

    def __init__(self, prompt: str) -> None:
        self._prompt, self._printed = prompt, -1  # characters of the completion; -1: not even the prompt

    def __call__(self, completion: Completion) -> None:
        """Another token of the text."""
        if self._printed < 0:
            print(self._prompt, end="")
            self._printed = 0
        print(completion.text[self._printed :], end="", flush=True)
        self._printed = len(completion.text)

    def end(self, completion: Completion) -> None:
        """The whole completion."""
        self(completion)
        print(flush=True)


def _speed(times: GenerationTimes) -> str:
    prefill = f"prefill {times.prefill_tokens} tokens in {1e3 * times.prefill_s:.0f} ms"
    if not times.decode_steps:
        return prefill
    step = 1e3 * times.decode_s / times.decode_steps
    return (
        f"{prefill} · decode {times.decode_tokens} tokens in {times.decode_s:.2f} s, "
        f"{times.decode_tokens / times.decode_s:.1f} tokens per second, {step:.1f} ms per step"
    )


if __name__ == "__main__":
    sys.exit(main())
