"""Members that torch has compiled, or that have methods on the instance: the call of each is still combined."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim import Ensemble
from tests.ensembling.models import FEATURES, Classifier, loader, mean_probabilities, members, trainer
from tests.ensembling.test_ensemble import X, expected_metrics
from tests.lightning import LightningModule, MisconfigurationException


@pytest.mark.parametrize("compiled", ["member", "submodule", "in place"])
def test_compiled_members(compiled: str) -> None:
    models = members()
    expected = expected_metrics(models)
    given = list(models)
    if compiled == "member":
        given = [torch.compile(model, backend="eager") for model in models]
    for model in models if compiled in ("submodule", "in place") else []:
        if compiled == "in place":
            model.net.compile(backend="eager")
        else:
            model.net = torch.compile(model.net, backend="eager")
    ensemble = Ensemble(given, outputs="logits", on="net")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(hooks|outside of the combined call)")
        assert trainer().validate(ensemble, loader(), verbose=False) == [pytest.approx(expected, rel=1e-5)]
    assert ensemble.ended == ["validation"]


def test_members_that_were_fitted_compiled_are_all_called() -> None:
    models = members()
    for model in models:
        trainer(max_epochs=1).fit(torch.compile(model, backend="eager"), loader())
    assert "forward" in vars(models[0]), "Lightning leaves the compiled methods on the instance"
    ensemble = Ensemble(models, outputs="logits")
    assert torch.allclose(ensemble(X).exp(), mean_probabilities(models, X).float(), atol=1e-6)
    assert trainer().test(ensemble, loader(), verbose=False) == [pytest.approx(expected_metrics(models), rel=1e-5)]
    assert "forward" in vars(models[0]), "those given are left alone"
    with torch.no_grad():
        models[0].net[0].weight.zero_()
    assert not torch.allclose(ensemble.members[0](X), models[0].eval()(X))


class OnInstance(Classifier):
    """Module whose steps and forward are set on the instance."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.forward, self.test_step = self.called, self.tested

    def called(self, x: Tensor) -> Tensor:
        return self.net(x) * 1.0

    def tested(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(self(batch[0]), batch[1])


@pytest.mark.parametrize("on", ["net", None])
def test_methods_on_the_instance_reach_the_combined_call(on: str | None) -> None:
    models = [OnInstance(seed) for seed in range(2)]
    ensemble = Ensemble(models, outputs="logits", on=on)
    for again in (ensemble, copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert torch.allclose(again(X).exp(), mean_probabilities(models, X).float(), atol=1e-6)
        assert trainer().test(again, loader(), verbose=False) == [pytest.approx(expected_metrics(models), rel=1e-5)]
    models[0].test_step = lambda batch, batch_idx: models[0].net(batch[0])
    with pytest.raises(MisconfigurationException, match="`test_step` never reached"):
        trainer().test(Ensemble(models, outputs="logits", on=on), loader(), verbose=False)


def test_a_step_that_is_on_the_instance_alone() -> None:
    class Alone(LightningModule):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.net = nn.Linear(FEATURES, 1, bias=False)
            nn.init.constant_(self.net.weight, factor)
            self.test_step = self.tested

        def tested(self, batch: Sequence[Tensor], batch_idx: int) -> None:
            self.log("mean", self.net(batch[0]).mean())

    ensemble = Ensemble([Alone(1.0), Alone(3.0)], outputs="values", on="net")
    found = trainer().test(ensemble, loader(64), verbose=False)
    assert found == [{"mean": pytest.approx(float(2 * X.sum(1).mean()), rel=1e-4)}]
    assert "validation_step" not in vars(type(ensemble)), "Lightning sees what the members do not have"


def test_an_ensemble_that_torch_has_compiled() -> None:
    models = members()
    ensemble = torch.compile(Ensemble(models, outputs="logits", on="net"), backend="eager")
    predicted = torch.cat(trainer().predict(ensemble, DataLoader(X, batch_size=64)))
    assert torch.allclose(predicted.exp(), mean_probabilities(models, X).float(), atol=1e-6)
