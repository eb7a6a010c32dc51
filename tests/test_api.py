"""The public interface: described argument by argument, named by the pages, quick to import; README's example runs."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import scmoe_ds
from scmoe_ds import errors
from scmoe_ds.inference.copies import copy_experts, read_loads
from scmoe_ds.inference.dropping import attach_dropping
from scmoe_ds.inference.load import load_trained
from scmoe_ds.inference.low_precision import use_low_precision
from scmoe_ds.moe.routed import RoutedTokens

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "ds_configs/README.md",
    ROOT / "examples/README.md",
]
METHODS = [
    *(getattr(scmoe_ds.ScMoE, name) for name in ("begin", "shared", "finish", "forward")),
    scmoe_ds.ScMoEConfig.from_deepspeed,
    RoutedTokens.run_experts,
]
INFERENCE = [load_trained, attach_dropping, use_low_precision, copy_experts, read_loads]
CALLABLES = [getattr(scmoe_ds, name) for name in scmoe_ds.__all__ if name != "ScMoEConfigError"]


def args_section(text: str) -> list[str]:
    """Names in the "Args:" of a docstring, in order."""
    body = re.search(r"^Args:\n((?:(?: {4}.*)?\n)*)", inspect.cleandoc(text) + "\n", re.MULTILINE)
    lines = re.findall(r"^ {4}(\w[\w, ]*): \S", body[1], re.MULTILINE) if body else []
    return [name.strip() for line in lines for name in line.split(",")]


@pytest.mark.parametrize("each", [*CALLABLES, *METHODS, *INFERENCE], ids=lambda each: each.__qualname__)
def test_the_docstring_names_exactly_the_parameters(each: Any) -> None:
    parameters = [name for name in inspect.signature(each).parameters if name != "self"]
    assert sorted(args_section(each.__doc__)) == sorted(parameters)


@pytest.mark.parametrize("each", [*CALLABLES, *METHODS, *INFERENCE], ids=lambda each: each.__qualname__)
def test_every_parameter_and_result_has_a_type(each: Any) -> None:
    target = each.__init__ if inspect.isclass(each) and each is not scmoe_ds.ScMoEConfig else each
    signature = inspect.signature(target)
    untyped = [name for name, each in signature.parameters.items() if name != "self" and each.annotation is each.empty]
    assert untyped == [] and signature.return_annotation is not signature.empty


def test_what_can_fail_says_so() -> None:
    raising = [
        scmoe_ds.ScMoE,
        scmoe_ds.initialize,
        scmoe_ds.replace_moe_layers,
        scmoe_ds.moe_from_dense,
        *METHODS[:4:2],
    ]
    assert [each.__qualname__ for each in raising if "Raises:" not in each.__doc__] == []


def test_pages_name_only_what_the_package_offers() -> None:
    """`scmoe_ds.name` on a page is in `__all__`, or the path of a module and its attribute."""
    missing = []
    for page in PAGES:
        for path in set(re.findall(r"(?<![\w./:\"-])scmoe_ds\.([A-Za-z_][\w.]*\w)", page.read_text(encoding="utf-8"))):
            first, *rest = path.split(".")
            if first in scmoe_ds.__all__ or path in ("__all__", "schema.json"):
                continue
            if not is_module_or_attribute(".".join(["scmoe_ds", first, *rest])):
                missing.append(f"{page.name}: scmoe_ds.{path}")
    assert missing == []


def is_module_or_attribute(path: str) -> bool:
    """Whether the longest module in the path has the rest of it: a function, a class or a class's method."""
    names = path.split(".")
    for cut in range(len(names), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(names[:cut]))
        except ImportError:
            continue
        for name in names[cut:]:
            found = getattr(found, name, None)
        return found is not None
    return False


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("scmoe_ds.sparse.sparsity_file", True),
        ("scmoe_ds.sparse.sparsity_file.Sparsity.read", True),
        ("scmoe_ds.sparse.sparsity_file.Sparsity.raed", False),
        ("scmoe_ds.sparse.sparsity_flie.Sparsity", False),
        ("scmoe_ds.inference.dropping.attach_dropping", True),
    ],
)
def test_a_path_on_a_page_is_followed_to_its_end(path: str, there: bool) -> None:
    assert is_module_or_attribute(path) == there


def test_dir_and_help_show_the_interface() -> None:
    assert set(scmoe_ds.__all__) <= set(dir(scmoe_ds))
    assert [name for name in scmoe_ds.__all__ if name not in (scmoe_ds.__doc__ or "")] == []


def test_every_error_is_described_and_found_in_one_place() -> None:
    found = [each for each in vars(errors).values() if inspect.isclass(each) and each.__module__ == errors.__name__]
    assert all(each.__doc__ for each in found) and scmoe_ds.ScMoEConfigError in found
    assert all(
        issubclass(each, (errors.UserError, errors.ExchangeError)) for each in found if issubclass(each, Exception)
    )


def test_import_is_lazy_and_quiet() -> None:
    code = "import sys, scmoe_ds; print([name for name in ('torch', 'deepspeed', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_readmes_example_runs_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    whole = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "scmoe": {"num_experts": 8},
    }
    (tmp_path / "ds.json").write_text(json.dumps(whole))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    engine, hidden, losses = names["engine"], torch.randn(2, 12, 64), []
    for _ in range(3):
        loss = (engine(hidden) - hidden).square().mean() + 0.01 * engine.module.l_aux
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
