"""Each folder imports only what it may, and no two files import each other: read from the source."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_optim
from lightning_optim import OptimCallback, Policy

ROOT = Path(lightning_optim.__file__).parent
WALL = "lightning_optim.runtime.lightning"
ROOMS = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} - {"base", "runtime"}
LIGHTNING = {"lightning", "pytorch_lightning", "torchmetrics"}
ALL = ROOMS | {"base", "runtime", "plotting", "version", ""}
# What may be imported, by folder or file of the package; the package's own `__init__` has the name "".
ALLOWED: dict[str, set[str]] = {
    "base": {"base"},
    "runtime": {"base", "runtime"},
    "plotting": {"base"},
    "version": set(),
    **{room: {"base", "runtime", "plotting", room} for room in ROOMS},
    "ensembling": {"base", "runtime", "plotting", "ensembling", "resume"},
    "cli": ALL,
    "__main__": {"cli"},
    "": ALL,
}


def module_of(path: Path) -> str:
    parts = ("lightning_optim", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def place_of(module: str) -> str:
    """Return the folder of a module, or the name of a file beside the folders."""
    return module.split(".")[1] if "." in module else ""


@functools.cache
def imports_of(module: str, lazy: bool = True) -> frozenset[str]:
    """Return the modules that a file imports, also for type checkers alone; those in functions only if ``lazy``."""
    return frozenset(imported(ast.parse(MODULES[module].read_text()), module, lazy))


def imported(node: ast.AST, module: str, lazy: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module} has a relative import"
            whole = {f"{child.module}.{alias.name}" for alias in child.names}
            yield from {name if name in MODULES else str(child.module) for name in whole}
        elif lazy or not (isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_type_checkers(child)):
            yield from imported(child, module, lazy)


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_for_type_checkers(module: str) -> set[str]:
    blocks = [node for node in ast.walk(ast.parse(MODULES[module].read_text())) if is_for_type_checkers(node)]
    return {name for block in blocks for name in imported(block, module, lazy=True)}


@functools.cache
def reached_from(module: str) -> frozenset[str]:
    """Return everything that is imported on the way, in the package and out of it."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imports_of(waiting.pop()) - reached:
            reached.add(name)
            if name in MODULES:
                waiting.append(name)
    return frozenset(reached)


def defines(module: str, base: type) -> bool:
    """Return True if a file has the source of a subclass; a public class calls the package its module."""
    classes = [value for value in vars(importlib.import_module(module)).values() if isinstance(value, type)]
    names = {node.name for node in ast.parse(MODULES[module].read_text()).body if isinstance(node, ast.ClassDef)}
    return any(issubclass(cls, base) and cls.__name__ in names for cls in classes)


def outsiders(modules: frozenset[str]) -> set[str]:
    return {name.split(".")[0] for name in modules if name not in MODULES}


POLICIES = [name for name in MODULES if defines(name, Policy)]
CALLBACKS = [name for name in MODULES if defines(name, OptimCallback)]


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_imports_what_it_may(module: str) -> None:
    allowed = ALLOWED[place_of(module)]
    other = {name for name in imports_of(module) if name in MODULES and place_of(name) not in allowed}
    assert not other, f"{module} imports {sorted(other)}; it may import {sorted(allowed)}"


def test_no_two_files_import_each_other() -> None:
    """Neither when they run, nor in functions, nor for type checkers."""
    graph = {name: {one for one in imports_of(name) if one in MODULES} for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_type_checkers_import_no_more_of_the_package(module: str) -> None:
    ours = {name for name in imports_for_type_checkers(module) if name.split(".")[0] == "lightning_optim"}
    assert not ours, f"{module} imports {sorted(ours)} for type checkers alone: name a protocol instead"


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_installed_with_the_package(module: str) -> None:
    """At the top of a file: torch, lightning, torchmetrics and the standard library; the rest where it is used."""
    tops = {name.split(".")[0] for name in imports_of(module, lazy=False)}
    # Lightning and torchmetrics bring numpy, but neither jsonargparse nor matplotlib: these are extras.
    allowed = {"torch", "torchmetrics", "lightning_utilities", "fsspec", "lightning_optim", *sys.stdlib_module_names}
    assert tops <= allowed, tops - allowed


@pytest.mark.parametrize("module", POLICIES)
def test_policies_know_no_trainer(module: str) -> None:
    """A policy, and all that it imports, is torch, `base/` and policies of its room."""
    reached = reached_from(module)
    assert not outsiders(reached) & LIGHTNING
    assert {place_of(name) for name in reached if name in MODULES} <= {"base", place_of(module)}


@pytest.mark.parametrize("module", [name for name in MODULES if place_of(name) == "base"])
def test_base_imports_torch_alone(module: str) -> None:
    assert outsiders(reached_from(module)) <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(WALL)])
def test_only_the_wall_imports_lightning(module: str) -> None:
    found = outsiders(imports_of(module)) & {"lightning", "pytorch_lightning"}
    assert not found, f"{module} imports {found}: import it from {WALL}"


@pytest.mark.parametrize("module", CALLBACKS)
def test_callbacks_hold_no_policy(module: str) -> None:
    """A policy says what, a callback says when: they are different files."""
    assert module not in POLICIES


def test_the_reader_sees_imports() -> None:
    assert "lightning.pytorch" in imports_of(WALL)
    assert "lightning_optim.runtime.session" in imports_of("lightning_optim.runtime.callback")
    assert "lightning.pytorch" in reached_from("lightning_optim.gradients.gradient_clipping")
    assert "matplotlib.axes" in imports_for_type_checkers("lightning_optim.plotting")
    assert {"averaging", "ensembling", "gradients", "regularization", "resume", "stopping"} <= ROOMS
    assert len(POLICIES) >= 5
    assert len(CALLBACKS) >= 5
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"one": {"other"}, "other": {"one"}}).prepare()


def test_no_public_name_is_a_module() -> None:
    """An imported submodule becomes an attribute of the package, and would hide a public name."""
    modules = {module.split(".")[1] for module in MODULES if "." in module}
    assert not modules & set(lightning_optim.__all__)
    assert not [name for name in lightning_optim.__all__ if inspect.ismodule(getattr(lightning_optim, name))]
