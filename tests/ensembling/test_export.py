"""Export an ensemble for processes without this package: torch.export, and TorchScript by tracing."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_optim import Ensemble
from tests.ensembling.models import FEATURES, Classifier, data, members
from tests.lightning import LightningModule, MisconfigurationException

X = data(8).tensors[0]


class Nested(LightningModule):
    """Returns a dictionary with a mask, takes a keyword, and uses ``no_grad`` itself."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(FEATURES, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, scale: float = 1.0, shift: Tensor | None = None) -> dict[str, Any]:
        with torch.no_grad():
            hidden = self.body(x if shift is None else x + shift).tanh()
        y = scale * self.head(hidden)
        return {"y": y, "all": (y.square(), y.sum(1)), "mask": x > 0}


class Labels(Nested):
    def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
        y = super().forward(x)["y"]
        return {"y": y, "label": y.argmax(1)}


ENSEMBLES = {
    "logits": (lambda: Ensemble(members(), outputs="logits"), (X,), {}),
    "submodule": (lambda: Ensemble(members(), outputs="logits", on="net"), (X,), {}),
    "inner": (lambda: Ensemble([Classifier(seed=1), Classifier(seed=2)], outputs="values", on="net.4"), (X,), {}),
    "nested": (lambda: Ensemble([Nested(1), Nested(2)], outputs="values"), (X,), {}),
    "keywords": (lambda: Ensemble([Nested(1), Nested(2)], outputs="values"), (X,), {"scale": 3.0, "shift": X}),
}


ELSEWHERE = """
import sys, torch
for name, (args, kwargs) in torch.load("inputs").items():
    program = torch.jit.load(name) if name.endswith(".ts") else torch.export.load(name).module()
    torch.save(program(*args, **kwargs), name + ".outputs")
assert "lightning_optim" not in sys.modules
"""


def close(one: Any, other: Any) -> bool:
    leaves = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.allclose(a.double(), b.double(), atol=1e-5) for a, b in leaves)


@pytest.mark.filterwarnings("ignore:.*to_torchscript.* has been deprecated")
def test_saved_programs_run_in_a_process_without_this_package(tmp_path: Path) -> None:
    inputs, expected = {}, {}
    for name, (make, args, kwargs) in ENSEMBLES.items():
        ensemble = make()
        torch.export.save(torch.export.export(ensemble, args, kwargs), tmp_path / f"{name}.pt2")
        inputs[f"{name}.pt2"], expected[f"{name}.pt2"] = (args, kwargs), ensemble(*args, **kwargs)
        if isinstance(ensemble, Classifier):
            ensemble.to_torchscript(tmp_path / f"{name}.ts", method="trace", example_inputs=X[:3])
            inputs[f"{name}.ts"], expected[f"{name}.ts"] = (args, kwargs), ensemble(X)
    torch.save(inputs, tmp_path / "inputs")
    subprocess.run([sys.executable, "-c", ELSEWHERE], check=True, cwd=tmp_path, env={})
    assert len(expected) == 8
    for name, outputs in expected.items():
        assert close(torch.load(tmp_path / f"{name}.outputs"), outputs), name


@pytest.mark.parametrize("name", ENSEMBLES)
def test_a_batch_of_another_size_by_the_names_of_the_members_forward(name: str) -> None:
    make, args, kwargs = ENSEMBLES[name]
    ensemble = make()
    batch = {0: torch.export.Dim.DYNAMIC}
    shapes = {"x": batch, **{key: batch if isinstance(value, Tensor) else None for key, value in kwargs.items()}}
    program = torch.export.export(ensemble, args, kwargs, dynamic_shapes=shapes)
    twice = tree_map(lambda v: torch.cat([v, v]) if isinstance(v, Tensor) else v, (args, kwargs))
    assert close(program.module()(*twice[0], **twice[1]), ensemble(*twice[0], **twice[1]))


def test_an_exported_part_that_cannot_be_averaged_is_compared_where_it_runs() -> None:
    one = torch.export.export(Ensemble([Labels(1), Labels(1)], outputs="values"), (X,)).module()
    assert torch.equal(one(X)["label"], Labels(1)(X)["label"])
    two = torch.export.export(Ensemble([Labels(1), Labels(2)], outputs="values"), (X,)).module()
    with pytest.raises(RuntimeError, match="differ in a part that cannot be averaged"):
        two(X)


def test_the_exported_result_has_no_gradients_either() -> None:
    program = torch.export.export(Ensemble(members(), outputs="logits"), (X,)).module()
    assert not program(X.clone().requires_grad_()).requires_grad


@pytest.mark.filterwarnings("ignore:.*to_torchscript.* has been deprecated", "error::torch.jit.TracerWarning")
def test_tracing_warns_of_nothing_and_refuses_what_a_traced_program_cannot_compare(tmp_path: Path) -> None:
    Ensemble(members(), outputs="binary_logits").to_torchscript(method="trace", example_inputs=X)
    path = tmp_path / "traced.pt"
    with pytest.raises(ValueError, match=r"a traced program cannot check: use `torch.export`"):
        Ensemble([Labels(1), Labels(2)], outputs="values").to_torchscript(path, method="trace", example_inputs=X)
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:.*(to_torchscript.* has been deprecated|torch.jit.script)")
def test_the_error_for_scripting_says_what_to_do(tmp_path: Path) -> None:
    ensemble = Ensemble(members(), outputs="logits")
    for script in (lambda: ensemble.to_torchscript(tmp_path / "scripted.pt"), lambda: torch.jit.script(ensemble)):
        with pytest.raises(MisconfigurationException, match='use `method="trace"`'):
            script()
    assert not (tmp_path / "scripted.pt").exists()


def test_the_name_of_a_run_time_class_is_one_that_torchscript_can_read() -> None:
    strange = type("Member[int]", (Classifier,), {})
    assert type(Ensemble([strange()], outputs="logits")).__name__ == "EnsembleOfMember_int_"


def test_saved_and_copied_as_a_module() -> None:
    ensemble = Ensemble(members(), outputs="logits", on="net")
    file = io.BytesIO()
    torch.save(ensemble, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), copy.deepcopy(ensemble), copy.copy(ensemble)):
        assert type(again) is type(ensemble) and torch.equal(again(X), ensemble(X))
        assert torch.export.export(again, (X,)).module()(X).shape == ensemble(X).shape
