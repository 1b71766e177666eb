"""outputs="probabilities": the first outputs of each member must be between 0 and 1."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_optim import Ensemble, cost_benefit, fit_members
from tests.ensembling.models import Classifier, data, loader, members, trainer
from tests.lightning import LightningModule

X, _ = data().tensors
NO_PROBABILITIES = (
    r"`outputs=\"probabilities\"` is not what member {} returns: its values range from .*`outputs=\"logits\"`"
)


class Returns(LightningModule):
    """Return an activation of its inputs."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation, self.unused = activation, nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Any:
        return self.activation(x)


def ensemble_of(*activations: nn.Module) -> Ensemble:
    return Ensemble([Returns(activation) for activation in activations], outputs="probabilities")


def test_logits_are_no_probabilities(tmp_path: Any) -> None:
    make = fit_members(
        lambda index: Classifier(), 2, lambda index: trainer(max_epochs=1), loader(), dirpath=tmp_path / "members"
    )
    ensemble = Ensemble.from_checkpoints(Classifier, make, outputs="probabilities", on="net")
    with pytest.raises(ValueError, match=NO_PROBABILITIES.format(0)):
        trainer().test(ensemble, loader(), verbose=False)
    with pytest.raises(ValueError, match=NO_PROBABILITIES.format(0)):
        ensemble.member_outputs(X)
    with pytest.raises(ValueError, match=NO_PROBABILITIES.format(0)):
        cost_benefit(members(), trainer(), loader(), monitor="nll", outputs="probabilities", on="net")
    for model in (ensemble, copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        with pytest.raises(ValueError, match=NO_PROBABILITIES.format(0)):
            model(X)


def test_one_member_of_another_kind_is_named() -> None:
    with pytest.raises(ValueError, match=NO_PROBABILITIES.format(1)):
        ensemble_of(nn.Softmax(1), nn.LogSoftmax(1))(X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [nn.Softmax(1), nn.Sigmoid(), nn.Softmax(0)])
def test_what_a_softmax_or_a_sigmoid_returns_is_accepted(activation: nn.Module, dtype: torch.dtype) -> None:
    x = (100 * X).to(dtype)
    ensemble = ensemble_of(activation, activation)
    assert torch.equal(ensemble(x), activation(x).float())
    assert torch.equal(ensemble(x[:0]), activation(x[:0]).float())


def test_members_that_diverged_and_members_on_the_meta_device_are_accepted() -> None:
    assert ensemble_of(nn.Softmax(1))(torch.full_like(X, float("nan"))).isnan().all()
    assert ensemble_of(nn.Softmax(1))(X.to("meta")).is_meta


def test_only_the_first_outputs_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    def check(values: Tensor) -> str:
        checked.append(len(values))
        return ""

    monkeypatch.setattr("lightning_optim.ensembling.combined_call.why_no_probabilities", check)
    ensemble = ensemble_of(nn.Softmax(1), nn.Softmax(1))
    for _ in range(3):
        ensemble(X)
    assert checked == [len(X)] * 2
    Ensemble(members(), outputs="logits")(X)
    assert len(checked) == 2


def test_compiled_exported_and_traced_programs_have_no_check() -> None:
    ensemble, x = ensemble_of(nn.Softmax(1), nn.Softmax(1)), X[:4]
    expected = x.softmax(1)
    assert torch.allclose(torch.export.export(ensemble, (x,)).module()(x), expected)
    assert torch.allclose(ensemble.to_torchscript(method="trace", example_inputs=x)(x), expected)
    assert torch.allclose(torch.compile(ensemble, backend="eager", fullgraph=True)(x), expected)


def test_transforms_and_traces_are_not_checked() -> None:
    ensemble = ensemble_of(nn.Softmax(-1), nn.Softmax(-1))
    x = torch.rand(3, 4)
    expected = x.softmax(-1)
    torch.testing.assert_close(torch.func.vmap(ensemble)(x), expected)
    torch.testing.assert_close(make_fx(ensemble)(x)(x), expected)
    with pytest.raises(ValueError, match='`outputs="probabilities"` is not what member 0'):
        logits = ensemble_of(nn.Identity())
        torch.func.vmap(logits)(3 * x)
        logits(3 * x)
