"""Public names: `__module__` is the package, and every example in a docstring is run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim import OptimCallback, Policy, base

ROOT = Path(lightning_optim.__file__).parent
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules() -> list[str]:
    parts = [path.relative_to(ROOT.parent).with_suffix("").parts for path in ROOT.rglob("*.py")]
    return sorted(".".join(names[:-1] if names[-1] == "__init__" else names) for names in parts)


def collected_by_pytest() -> dict[str, doctest.DocTest]:
    """Find the examples that `--doctest-modules` runs, in each file and of public names in the packages."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in modules() for test in finder.find(importlib.import_module(name), name)]
    return {test.docstring: test for test in found if test.examples}


def of_methods() -> dict[str, doctest.DocTest]:
    """Find the examples in methods of public classes, which `--doctest-modules` does not run."""
    names = {"torch": torch, "nn": nn, "Tensor": Tensor, "math": math, **vars(lightning_optim)}
    finder, found = doctest.DocTestFinder(exclude_empty=True), []
    for package in (lightning_optim, base):
        for name in package.__all__:
            thing = getattr(package, name)
            found += finder.find(thing, f"{package.__name__}.{name}", module=False, globs=names)  # type: ignore[arg-type]
    known = collected_by_pytest()
    return {test.name: test for test in found if test.examples and test.docstring not in known}


def written() -> set[str]:
    """Return the docstrings with an example, read from the source."""
    trees = [ast.parse(path.read_text()) for path in ROOT.rglob("*.py")]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(n, clean=False) for tree in trees for n in ast.walk(tree) if isinstance(n, kinds)]
    return {text for text in texts if text and ">>> " in text}


@pytest.mark.parametrize("name", of_methods())
def test_example_of_a_method(name: str) -> None:
    results = doctest.DocTestRunner(optionflags=FLAGS).run(of_methods()[name])
    assert results.attempted and not results.failed


def test_each_example_is_run() -> None:
    run = {*collected_by_pytest(), *(test.docstring for test in of_methods().values())}
    assert {text.splitlines()[0] for text in written() - run} == set()
    assert len(run) >= 80


@pytest.mark.parametrize("package", [lightning_optim, base], ids=lambda package: package.__name__)
def test_public_classes_and_functions_are_of_the_package(package: Any) -> None:
    for name in package.__all__:
        thing = getattr(package, name)
        assert getattr(lightning_optim, name, getattr(base, name, None)) is thing
        assert thing.__module__ in ("lightning_optim", package.__name__)
        assert pickle.loads(pickle.dumps(thing)) is thing


def test_a_pickle_names_the_public_place_only() -> None:
    """A pickle contains no name of a file, so that it can be loaded after a file was moved."""
    made = [
        lightning_optim.GradientClipping([lightning_optim.AutoClip(), lightning_optim.ClipByNorm(1.0)]).policies,
        lightning_optim.AnyOf([lightning_optim.Plateau("loss")]),
        lightning_optim.EMA(0.9),
        lightning_optim.L2(lightning_optim.Linear(1.0, 0.0)),
        lightning_optim.DropPath(0.1),
    ]
    modules_named = {word for word in modules() if word.encode() in pickle.dumps(made, protocol=2)}
    assert modules_named == {"lightning_optim", "lightning_optim.base"}


def test_public_classes_can_be_inspected() -> None:
    for name in lightning_optim.__all__:
        thing = getattr(lightning_optim, name)
        assert inspect.getmodule(thing) is lightning_optim
        assert inspect.getdoc(thing)
        if inspect.isclass(thing) and inspect.isfunction(vars(thing).get("__init__")):
            assert "def __init__" in inspect.getsource(thing.__init__)


@pytest.mark.parametrize("name", lightning_optim.__all__)
def test_policies_and_callbacks_have_the_line_for_a_trainer(name: str) -> None:
    kind = getattr(lightning_optim, name)
    if not (inspect.isclass(kind) and issubclass(kind, Policy | OptimCallback)) or kind in (Policy, OptimCallback):
        return
    lines = re.findall(r"Trainer\(\s*callbacks=|callbacks=\[", inspect.getdoc(kind) or "")
    assert lines, f"the docstring of {name} does not show it in a Trainer's list"
