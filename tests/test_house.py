"""Imports of the package point one way, down the list of its rooms, and run in no circle."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "scmoe_ds"
FLOORS = [
    ["programs"],
    ["check", "probe"],
    ["evaluation", "analysis"],
    ["training", "inference"],
    ["sparse"],
    ["engine", "checkpoint"],
    ["models"],
    ["replace"],
    ["simulate"],
    ["planner"],
    ["offload"],
    ["moe"],
    ["overlap"],
    ["comm"],
    ["config", "data"],
    ["trace", "parallel"],
    ["errors", "compat", "compat_transformers", "deepspeed_version", "figure_style"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LOOSE = {"__init__", "errors", "compat", "compat_transformers", "deepspeed_version", "figure_style"}
LONGEST_FILE, LONGEST_FUNCTION = 300, 60


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name behind `scmoe_ds.`."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): ast.parse(path.read_text("utf-8")) for name, path in paths.items()}


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the package that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scmoe_ds."):
            module = (node.module or "").removeprefix("scmoe_ds.")
            found |= {f"{module}.{each.name}" if f"{module}.{each.name}" in known else module for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "scmoe_ds":
            found |= {each.name for each in node.names if each.name in known}
        elif isinstance(node, ast.Import):
            found |= {each.name.removeprefix("scmoe_ds.") for each in node.names if each.name.startswith("scmoe_ds.")}
    return found


TREES = modules()
GRAPH = {name: imports(tree, set(TREES)) for name, tree in TREES.items()}


def test_every_module_has_a_room() -> None:
    loose = {name for name in TREES if "." not in name and (PACKAGE / f"{name}.py").is_file()}
    assert loose <= LOOSE
    assert {name.split(".")[0] for name in TREES} - {"__init__"} <= FLOOR.keys()


def test_imports_point_down() -> None:
    def goes_up(name: str, target: str) -> bool:
        room, other = name.split(".")[0], target.split(".")[0]
        return room != other and FLOOR[other] <= FLOOR[room]

    pairs = [(name, target) for name, targets in GRAPH.items() for target in targets if name != "__init__"]
    assert [f"{name} -> {target}" for name, target in pairs if goes_up(name, target)] == []


def test_the_simulation_needs_the_planner_alone() -> None:
    """A cluster is planned on a laptop, without torch and DeepSpeed."""
    rooms = {
        target.split(".")[0] for name, targets in GRAPH.items() if name.startswith("simulate") for target in targets
    }
    assert rooms <= {"simulate", "planner", "errors"}


def test_no_imports_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in GRAPH.get(name, set()):
                visit(target, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_only_comm_launches_the_collectives_of_layers_and_models() -> None:
    def launches(node: ast.AST) -> bool:
        is_dist = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist"
        return is_dist and node.attr.startswith(
            ("all_", "broadcast", "reduce", "gather", "scatter", "batch_", "barrier")
        )

    rooms = {name: tree for name, tree in TREES.items() if name.split(".")[0] in ("moe", "models")}
    assert [name for name, tree in rooms.items() if any(map(launches, ast.walk(tree)))] == []


def test_no_file_is_longer_than_a_reader_likes() -> None:
    # These are copied into directories of weights, a whole model in one file, as transformers has them.
    counted = [path for path in PACKAGE.rglob("*.py") if path.name not in ("modeling_scmoe.py", "modeling_adapted.py")]
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in counted}
    assert [f"{path.name}: {count}" for path, count in lines.items() if count > LONGEST_FILE] == []


def test_no_function_is_longer_than_a_screen() -> None:
    functions = [
        (f"{name}.{node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    assert [f"{name}: {count}" for name, count in functions if count > LONGEST_FUNCTION] == []


def test_files_that_are_no_modules_are_installed() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text("utf-8")
    listed = ast.literal_eval(re.findall(r"^scmoe_ds = (\[.*\])$", text, re.MULTILINE)[0])
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".so")}
    assert others == {PACKAGE / name for name in listed}


def test_isinstance_asks_no_protocol() -> None:
    """From Python 3.12 on it finds no submodule of a module, and says no to a protocol that has one."""
    assert [name for name, tree in TREES.items() if "runtime_checkable" in ast.dump(tree)] == []


PYTHONS_OWN = {"_exit", "_current_frames", "_replace"} | set(
    "_ArgumentGroup _AppendAction _SubParsersAction _subparsers _actions _option_string_actions _action_groups "
    "_group_actions _get_positional_actions _print_message".split()
)
"""Of the standard library; NamedTuple, and argparse for flags and groups, offer no other names."""

OVERRIDES = {"data.megatron_classes": {"_build_megatron_dataset_splits"}}
"""A subclass overrides private methods of megatron-core in its body, and calls one of its siblings."""


def own_names() -> set[str]:
    """What the package itself defines: functions, classes, variables and attributes of self."""
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return (
        {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        | {node.attr for node in attributes if ast.unparse(node.value) in ("self", "ctx")}
    )


def test_private_names_of_others_stand_in_compat() -> None:
    own = own_names() | PYTHONS_OWN

    def private_names(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Attribute):
            return [node.attr]
        if isinstance(node, ast.ImportFrom):
            return [each.name for each in node.names]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            return [each.value for each in node.args[1:2] if isinstance(each, ast.Constant)]
        return []

    found = [
        f"{module}: {name}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        for name in private_names(node)
        if name.startswith("_") and not name.endswith("__") and name not in own | OVERRIDES.get(module, set())
    ]
    assert [each for each in found if not each.startswith(("compat: ", "compat_transformers: "))] == []
    assert any(each.startswith("compat: ") for each in found)
