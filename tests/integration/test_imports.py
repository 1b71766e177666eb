"""Who imports whom, read from the source: policies know no Lightning, rooms know no other room."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch

import lightning_optim
from lightning_optim import OptimCallback, Policy

ROOT = Path(lightning_optim.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
ROOMS = FOLDERS - {"base", "runtime"}
ALSO = {"ensembling": {"resume"}}  # A room that may import another: members ask whether a resume is exact.
PUBLIC = {"lightning_optim", "lightning_optim.cli"}  # which may import all rooms


def module_of(path: Path) -> str:
    parts = ("lightning_optim", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


WALL = "lightning_optim.runtime.lightning"


def folder_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else None


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


@functools.cache
def imports_of(module: str, lazy: bool = True) -> frozenset[str]:
    """The modules that a file imports when it runs, not what only a type checker reads; in functions if ``lazy``."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in whole}
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return frozenset(found)


@functools.cache
def reached_from(module: str) -> frozenset[str]:
    """Everything that is imported on the way, in the package and out of it."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        for name in imports_of(waiting.pop()) - reached:
            reached.add(name)
            if name in MODULES:
                waiting.append(name)
    return frozenset(reached)


def defines(module: str, base: type) -> bool:
    classes = vars(importlib.import_module(module)).values()
    return any(isinstance(cls, type) and issubclass(cls, base) and cls.__module__ == module for cls in classes)


@pytest.mark.parametrize("module", MODULES)
def test_no_room_imports_another(module: str) -> None:
    if module not in PUBLIC:
        room = room_of(module)
        rooms = {room_of(name) for name in imports_of(module)} - {None, room} - ALSO.get(room or "", set())
        assert not rooms, f"{module} imports {rooms}"


@pytest.mark.parametrize("module", MODULES)
def test_what_is_imported_is_installed_with_the_package(module: str) -> None:
    """At the top of a file: torch, lightning, torchmetrics and the standard library; the rest where it is used."""
    tops = {name.split(".")[0] for name in imports_of(module, lazy=False)}
    # Lightning and torchmetrics bring numpy and jsonargparse's absence; matplotlib is an extra.
    allowed = {"torch", "lightning", "torchmetrics", "lightning_optim", *sys.stdlib_module_names}
    assert tops <= allowed, tops - allowed


@pytest.mark.parametrize("module", [name for name in MODULES if defines(name, Policy)])
def test_policies_know_no_lightning(module: str) -> None:
    """Neither they, nor anything that they import."""
    assert not {name for name in reached_from(module) if name.split(".")[0] in ("lightning", "torchmetrics")}
    outside = {name for name in imports_of(module) if name in MODULES and room_of(name) is None}
    other = {name for name in outside if folder_of(name) != "base"}
    assert not other, f"{module} imports {other}"


@pytest.mark.parametrize("module", [name for name in MODULES if folder_of(name) == "base"])
def test_base_imports_torch_alone(module: str) -> None:
    reached = reached_from(module)
    assert not {name for name in reached if name.split(".")[0] in ("lightning", "torchmetrics")}
    assert {folder_of(name) for name in reached if name in MODULES} <= {"base"}


@pytest.mark.parametrize("module", [name for name in MODULES if folder_of(name) == "runtime"])
def test_runtime_imports_base_and_itself(module: str) -> None:
    assert {folder_of(name) for name in imports_of(module) if name in MODULES} <= {"base", "runtime"}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_wall_imports_lightning(module: str) -> None:
    if not module.startswith(WALL):
        found = {name for name in imports_of(module) if name.split(".")[0] in ("lightning", "pytorch_lightning")}
        assert not found, f"{module} imports {found}: import it from {WALL}"


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) and defines(name, OptimCallback)])
def test_callbacks_hold_no_policy(module: str) -> None:
    """A policy says what, a callback says when: they are different files."""
    assert not defines(module, Policy)


def test_the_reader_sees_imports() -> None:
    assert "lightning.pytorch" in imports_of(WALL)
    assert "lightning_optim.runtime.session" in imports_of("lightning_optim.runtime.callback")
    assert "lightning.pytorch" in reached_from("lightning_optim.gradients.gradient_clipping")
    assert {"averaging", "gradients", "regularization", "stopping"} <= ROOMS
    assert len([name for name in MODULES if defines(name, Policy)]) >= 5


def test_no_public_name_is_a_module() -> None:
    """A submodule that is imported becomes an attribute of the package, and would hide what has its name."""
    modules = {module.split(".")[1] for module in MODULES if "." in module}
    assert not modules & set(lightning_optim.__all__)
    assert not [name for name in lightning_optim.__all__ if inspect.ismodule(getattr(lightning_optim, name))]


def test_gradients_of_an_optimizer() -> None:
    """Only of parameters that have one, in the order of the groups."""
    first, silent, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    first.grad, second.grad = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([{"params": [second]}, {"params": [silent, first]}], 0.1)
    weights, grads = lightning_optim.gradients_of(optimizer)
    assert [id(weight) for weight in weights] == [id(second), id(first)]
    assert [grad.tolist() for grad in grads] == [[3.0, 4.0], [1.0, 2.0]]
