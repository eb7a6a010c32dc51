"""What benchmarks.quality.compare runs (a preset of quality.json), and what it has found so far (the record)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.run import active_parameters, forward_flops
from scmoe_ds.config.batch_sizes import batch_sizes
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.durable_files import write_whole
from scmoe_ds.data.tokenizer import pad_vocab_size
from scmoe_ds.errors import ArgumentError, ScMoEConfigError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.presets import PRESETS
from scmoe_ds.parallel.agreement import fingerprint
from scmoe_ds.programs.flags.gpt import build_parser, gpt_settings

RELATIONS = ("<", "≈")
_CORPUS_IDENTITY = ("sha256", "settings", "tokens")


class QualityError(ValueError):
    """Settings or a record that this benchmark cannot go on with; the message says what to change."""


@dataclass(frozen=True)
class Plan:
    """A preset with its variants.

    Attributes:
        preset: "environment", "corpus", "evaluation", "flags" and "deepspeed" of the settings file.
        sections: each variant's whole "scmoe" section.
        flags: each variant's own flags of pretrain_gpt_scmoe.py, over those of the preset.
        common: "references", "claims" and "equivalence_margin_nats", which the table reads.
    """

    name: str
    preset: dict[str, Any]
    sections: dict[str, dict[str, Any]]
    flags: dict[str, dict[str, Any]]
    common: dict[str, Any]

    def model_flags(self, variant: str | None = None) -> list[str]:
        """Of pretrain_gpt_scmoe.py, without data, seed and directories; None: those that all variants start from."""
        flags = []
        for name, value in {**self.preset["flags"], **self.flags.get(variant or "", {})}.items():
            flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return flags

    @property
    def tokens_per_iteration(self) -> int:
        """Of one process: all there is."""
        micro_batch_size, steps = batch_sizes(self.preset["deepspeed"], 1)
        return micro_batch_size * steps * int(self._arguments(None).seq_length)

    @property
    def tokens(self) -> int:
        """Training tokens of a run."""
        return self.tokens_per_iteration * int(self._arguments(None).train_iters)

    def deepspeed(self, variant: str) -> dict[str, Any]:
        """The DeepSpeed JSON of a variant."""
        return {**self.preset["deepspeed"], "scmoe": self.sections[variant]}

    def select(self, parts: Sequence[str]) -> list[str]:
        """Variants whose name has one of the parts; all without parts.

        Raises:
            QualityError: a part that is in no name.
        """
        for part in parts:
            if not any(part in name for name in self.sections):
                raise QualityError(
                    f"--only {part}: no variant has it in its name; there are {', '.join(self.sections)}"
                )
        return [name for name in self.sections if not parts or any(part in name for part in parts)]

    def identity(self, corpus: Mapping[str, Any]) -> dict[str, Any]:
        """What the runs of one record have in common, beside the variants."""
        return {"preset": self.name, **self.preset, "corpus": identity_of(corpus)}

    def fingerprint(self, corpus: Mapping[str, Any]) -> str:
        """Names the directory of checkpoints: those of other sizes must not be resumed."""
        return fingerprint([self.identity(corpus), self.sections, self.flags])

    def compute(self, variant: str, vocab_size: int) -> dict[str, float]:
        """Active parameters and forward floating-point operations per token."""
        args = self._arguments(variant)
        config = ScMoEConfig.from_deepspeed(self.deepspeed(variant))
        with torch.device("meta"):
            model = GPT(gpt_settings(args, pad_vocab_size(vocab_size)), config, args.seq_length)
        return {
            "active_parameters": active_parameters(model),
            "forward_flops_per_token": forward_flops(model),
            "parameters": sum(each.numel() for each in model.parameters()),
        }

    def variants(self, vocab_size: int) -> dict[str, dict[str, Any]]:
        """What the record says of each variant."""
        return {
            name: {"section": section, "flags": self.flags[name], **self.compute(name, vocab_size)}
            for name, section in self.sections.items()
        }

    def order(self, variants: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
        """Pairs of variant and seed in the order in which they run: whole seeds."""
        return [(variant, seed) for seed in seeds for variant in variants]

    def num_layers(self, variant: str) -> int:
        """Blocks of a variant."""
        return int(self._arguments(variant).num_layers)

    def _arguments(self, variant: str | None) -> Any:
        parser = build_parser()
        name = self.preset["flags"].get("preset")
        if name:
            parser.set_defaults(**PRESETS[name].arguments)
        return parser.parse_args(self.model_flags(variant))


def identity_of(corpus: Mapping[str, Any]) -> dict[str, Any]:
    """What makes it this corpus and no other."""
    return {key: corpus[key] for key in _CORPUS_IDENTITY}


def load_plan(path: Path, preset: str) -> Plan:
    """A preset of the settings file, checked. A file that "extends" another one has that one's settings where it says
    nothing; its variants are its own.

    Raises:
        QualityError: no such file or preset, a section that is no valid "scmoe" section, a claim about no variant.
    """
    whole = _read_settings(path)
    for key, kind in (("presets", dict), ("variants", dict), ("references", list), ("claims", list)):
        if not isinstance(whole.get(key), kind):
            raise QualityError(
                f'--settings {path}: "{key}" is missing or of another type; see quality.json beside this module'
            )
    if preset not in whole["presets"]:
        raise QualityError(f"--preset {preset}: {path} has {', '.join(whole['presets'])}")
    variants = {name: dict(own) for name, own in whole["variants"].items()}
    flags = {name: own.pop("flags", {}) for name, own in variants.items()}
    plan = Plan(
        preset,
        whole["presets"][preset],
        {name: {**whole["section"], **own} for name, own in variants.items()},
        flags,
        {key: whole[key] for key in ("references", "claims", "equivalence_margin_nats")},
    )
    for name, own in flags.items():
        if fixed := sorted({"seq-length", "train-iters"} & own.keys()):
            raise QualityError(f"{path}: variant {name}: --{fixed[0]} decides the data, which all variants share")
    for name in plan.sections:
        try:
            config = ScMoEConfig.from_deepspeed(plan.deepspeed(name))
            config.check_model(plan.num_layers(name))
        except (ScMoEConfigError, ArgumentError) as error:
            raise QualityError(f"{path}: variant {name}: {error}") from None
    named = {*whole["references"], *(claim[side] for claim in whole["claims"] for side in (0, 2))}
    if unknown := sorted(named - set(plan.sections)):
        raise QualityError(
            f"{path}: references or claims name {', '.join(unknown)}, which is no variant; there are "
            f"{', '.join(plan.sections)}"
        )
    if other := [relation for _, relation, *_ in whole["claims"] if relation not in RELATIONS]:
        raise QualityError(f"{path}: a claim says {other[0]!r}; it can say {' or '.join(RELATIONS)}")
    return plan


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(whole, dict):
            raise ValueError("not a JSON object")
        base_name = whole.pop("extends", None)
        if base_name is None:
            return whole
        base = _read_settings(path.parent / str(base_name))
    except QualityError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # also of a file that extends itself
        raise QualityError(f"--settings {path}: cannot be read ({error})") from None
    return {**_merged(base, whole), "variants": whole["variants"]}


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], own[key])
        for key in base.keys() & own.keys()
        if isinstance(base[key], dict) and isinstance(own[key], dict)
    }
    return {**base, **own, **both}


class Record:
    """A JSON file that is whole at any time: identity, corpus, variants and all runs, the failed ones too."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    @classmethod
    def read(cls, path: Path, benchmark: str) -> Record:
        """
        Args:
            benchmark: module name of the program that wrote it.

        Raises:
            QualityError: no such file, or another kind of file.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise QualityError(f"{path} cannot be read ({error})") from None
        if (
            not isinstance(content, dict)
            or not {"benchmark", "identity", "corpus", "variants", "runs"} <= content.keys()
        ):
            raise QualityError(f"{path} is not a record of {benchmark}")
        if content["benchmark"] != benchmark:
            raise QualityError(f"{path} is a record of {content['benchmark']}, not of {benchmark}")
        return cls(path, content)

    @classmethod
    def open(cls, path: Path, plan: Plan, corpus: dict[str, Any], benchmark: str) -> Record:
        """The record to go on with, or a new one.

        Raises:
            QualityError: the file is of other sizes, data or variants; runs of both cannot be compared.
        """
        identity = plan.identity(corpus)
        variants = plan.variants(corpus["vocab_size"])
        content: dict[str, Any] = {
            "benchmark": benchmark,
            "commands": [],
            "seeds": [],
            "identity": identity,
            "tokens": plan.tokens,
            "corpus": corpus,
            "variants": variants,
            "environments": [],
            "runs": [],
        }
        if path.exists():
            content = cls.read(path, benchmark).content
            for key, expected in identity.items():
                _require_same(path, key, content["identity"].get(key), expected)
            for name in variants.keys() & content["variants"].keys():
                for key in ("section", "flags"):
                    _require_same(path, f"variant {name}", content["variants"][name][key], variants[name][key])
            content["variants"] = {
                **variants,
                **{name: each for name, each in content["variants"].items() if name not in variants},
            }
        return cls(path, {**content, **plan.common})

    def want(self, seeds: Sequence[int], command: str) -> None:
        """Notes what was asked for, and by which command."""
        self.content["seeds"] = sorted({*self.content["seeds"], *seeds})
        if command not in self.content["commands"]:
            self.content["commands"].append(command)

    def lacks(self, variant: str, seed: int, retry_failed: bool = False) -> bool:
        """Whether the pair has not run yet, or, to be retried, has only failed."""
        states = {run["status"] for run in self.content["runs"] if (run["variant"], run["seed"]) == (variant, seed)}
        return not states or (retry_failed and "finished" not in states)

    def environment_number(self, found: dict[str, str]) -> int:
        """Place in "environments", to which it is added if it is new."""
        environments = self.content["environments"]
        if found not in environments:
            environments.append(found)
        return int(environments.index(found))

    def add(self, run: dict[str, Any]) -> None:
        """Notes a run and writes the file."""
        self.content["runs"].append(run)
        self.save()

    def save(self) -> None:
        """Writes the file: the old one or the new one is there at any time."""
        write_whole(self.path, to_json(self.content))


def to_json(content: Mapping[str, Any]) -> str:
    """JSON with a line for each run: hundreds of sequence losses would be a line each."""
    head = json.dumps({key: value for key, value in content.items() if key != "runs"}, indent=1, ensure_ascii=False)
    runs = ",\n".join("  " + json.dumps(run, ensure_ascii=False) for run in content["runs"])
    return f'{head[:-2]},\n "runs": [\n{runs}\n ]\n}}\n'


def _require_same(path: Path, name: str, found: Any, expected: Any) -> None:
    if found == expected:
        return
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in {**found, **expected}:
            _require_same(path, f"{name}.{key}", found.get(key), expected.get(key))
    raise QualityError(
        f"{path} is of another configuration: its {name} is {json.dumps(found)}, now it is "
        f"{json.dumps(expected)}; give another --output, or restore the setting"
    )
