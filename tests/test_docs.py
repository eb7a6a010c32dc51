"""What the pages name exists: links, anchors, paths, modules, the site's navigation and the API's identifiers."""

from __future__ import annotations

import argparse
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from scmoe_ds.programs.flags.registry import PROGRAMS, parser_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
RECORDS = {path.with_suffix(".md") for ending in ("json", "html") for path in RESULTS.glob(f"*.{ending}")}
"""Pages that a program wrote keep the command that made them."""
PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "ds_configs/*.md", "examples/*.md", "benchmarks/results/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path not in RECORDS
]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
TOP = "benchmarks|clusters|docs|ds_configs|examples|lab|scmoe_ds|tests"


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" not in link and not (target.is_file() and (not anchor or anchor in anchors(target))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_paths_and_modules_exist(name: str) -> None:
    """Of the repository, as commands and sentences name them; a page of ds_configs/ names its own files without it."""
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(rf"(?<![\w./-])(?:{TOP})/[\w./-]*\w", text)
    modules = re.findall(r"(?:-m|--module) ((?:benchmarks|examples|lab|scmoe_ds)\.[\w.]*\w)", text)
    imported = re.findall(r"^from (scmoe_ds\.[\w.]+) import (.+)$", text, re.MULTILINE)
    missing = [path for path in paths if not (ROOT / path).exists()]
    files = re.findall(r"`((?!megatron/)(?:\w+/)+\w+\.py)`", text)  # those of a room without the package
    missing += [file for file in files if not ((ROOT / file).exists() or (ROOT / "scmoe_ds" / file).exists())]
    missing += [
        module
        for module in modules
        if not ((base := ROOT / module.replace(".", "/")).with_suffix(".py").exists() or base.is_dir())
    ]
    missing += [each for module, each in named(imported) if not hasattr(importlib.import_module(module), each)]
    assert missing == []


def named(imported: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Module and name of every import that a page shows."""
    return [(module, each) for module, names in imported for each in names.split(", ")]


@pytest.mark.parametrize("name", NAMES)
def test_lists_show_as_lists_on_the_site(name: str) -> None:
    """Its Markdown wants a blank line before a list or table, and takes a wrapped line that begins with "2. " for one."""
    text = re.sub(r"^```.*?^```$", "\n", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    before = r"^(?!- |\d+\. |\||#| ).+\n"
    assert re.findall(before + r"(?:- |\d+\. |\|).*", text, re.MULTILINE) == []


OTHERS = set(
    "--hostfile --launcher_args --master_addr --master_port --no_ssh --node_rank --num_gpus --quiet --mca --shm-size "
    "--split-sentences --standard --only --minutes --rehearse --adapted --models --rows --share --text --text-models".split()
)
"""Flags of DeepSpeed's launcher; of mpirun, docker, Megatron's preprocess_data.py, and benchmarks."""


def test_flags_and_programs_that_pages_name_exist() -> None:
    """Within sentences and tables; tests/docs runs whole commands. One page is about flags that do not exist here."""
    known = OTHERS.union(*map(flags_of, map(parser_of, PROGRAMS)))
    missing = []
    for name in NAMES:
        if name.startswith("benchmarks/") or name in ("CHANGELOG.md", "docs/from_megatron_deepspeed.md"):
            continue
        for text in re.findall(r"`([^`\n]+)`", (ROOT / name).read_text(encoding="utf-8")):
            missing += [f"{name}: {flag}" for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", text) if flag not in known]
            program = re.match(r"scmoe ([a-z][\w-]*)", text)
            missing += [f"{name}: {text}"] if program and program[1] not in PROGRAMS else []
    assert missing == []


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a program and of its sub-commands."""
    found: set[str] = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found.update(*map(flags_of, action.choices.values()))
    return found


def test_pages_of_the_site_exist() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = re.findall(r"[\w/]+\.md", navigation)
    assert sorted(pages) == sorted(NAMES)


def test_the_api_has_what_the_package_offers() -> None:
    import scmoe_ds

    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {f"scmoe_ds.{name}" for name in scmoe_ds.__all__} <= {*named, "scmoe_ds.__version__"}
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name)
