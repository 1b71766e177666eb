"""Ensemble: the user's own steps, hooks and metrics, with the mean's values; and what it must not do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, nll_loss
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_optim import Ensemble
from tests.ensembling.models import FEATURES, Classifier, data, loader, mean_probabilities, members, trainer
from tests.lightning import LightningModule, MisconfigurationException

X, Y = data().tensors


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that must not change in a member: weights, modes, attributes."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {
        name: (module.training, sorted(vars(module)), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    plain = {name: repr(value) for name, value in vars(model).items() if not name.startswith("_")}
    return {
        "tensors": tensors,
        "modules": modules,
        "flags": flags,
        "plain": plain,
        "trainer": model.__dict__["_trainer"],
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tensors = one.pop("tensors"), other.pop("tensors")
    return one == other and all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def expected_metrics(models: Sequence[nn.Module]) -> dict[str, float]:
    p = mean_probabilities(models, X)
    accuracy = float((p.argmax(1) == Y).double().mean())
    return {
        "nll": float(nll_loss(p.log(), Y)),
        "accuracy": accuracy,
        "MulticlassAccuracy": accuracy,
        "MulticlassCalibrationError": float(multiclass_calibration_error(p.float(), Y, p.shape[1])),
    }


@pytest.mark.parametrize(("on", "steps"), [("net", ("validate", "test")), (None, ("test",))])
def test_the_users_steps_hooks_and_metrics_give_the_means_values(on: str | None, steps: tuple[str, ...]) -> None:
    models = members()
    before = [state_of(model) for model in models]
    ensemble = Ensemble(models, outputs="logits", on=on)
    expected = expected_metrics(models)
    for single in models:
        assert abs(expected_metrics([single])["nll"] - expected["nll"]) > 0.05, "a member's value is another"
    for step in steps:
        found = getattr(trainer(), step)(ensemble, loader(), verbose=False)
        assert found == [pytest.approx(expected, rel=1e-5)]
    assert ensemble.ended == ["validation"] * ("validate" in steps)
    assert len(ensemble.seen) == 4 * len(steps)
    assert all(same(state_of(model), state) for model, state in zip(models, before, strict=True))


@pytest.mark.parametrize("on", ["net", None])
def test_predict_and_plain_calls(on: str | None) -> None:
    models = members()
    ensemble = Ensemble(models, outputs="logits", on=on)
    expected = mean_probabilities(models, X).log().float()
    assert torch.allclose(ensemble(X), expected, atol=1e-5)
    assert not ensemble(X).requires_grad
    predicted = trainer().predict(ensemble, DataLoader(X, batch_size=16))
    assert torch.allclose(torch.cat(predicted), expected, atol=1e-5)
    assert all(
        torch.allclose(output, model.eval()(X))
        for output, model in zip(ensemble.member_outputs(X), models, strict=True)
    )


class Asking(LightningModule):
    """Module that reads the Trainer in its forward, and can bypass the submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x) * self.trainer.world_size


def test_members_know_the_trainer_and_nothing_has_gradients() -> None:
    models = [Asking(), Asking()]
    for on in (None, "net"):
        ensemble = Ensemble(models, outputs="values", on=on)
        predicted = torch.cat(trainer().predict(ensemble, DataLoader(X, batch_size=64)))
        assert torch.allclose(predicted, X + (models[0].net(X) + models[1].net(X)) / 2, atol=1e-6)
        assert not ensemble(X.clone().requires_grad_()).requires_grad
        assert not any(output.requires_grad for output in ensemble.member_outputs(X.clone().requires_grad_()))
    assert not ensemble.net(X.clone().requires_grad_()).requires_grad, "the combined call itself, in a step"


def test_all_members_stay_in_eval_mode() -> None:
    ensemble = Ensemble(members(), outputs="logits", on="net")
    ensemble.train()
    assert not any(module.training for module in ensemble.modules())
    assert torch.equal(ensemble(X), ensemble(X)) and not ensemble.net.training
    holder = nn.Sequential(ensemble).train()
    assert holder.training and not any(module.training for module in ensemble.modules())
    assert not any(p.requires_grad for p in ensemble.parameters())


def test_copies_of_one_member_are_that_member_and_their_order_does_not_matter() -> None:
    models = members()
    single = trainer().test(models[0], loader(), verbose=False)
    several = trainer().test(Ensemble([models[0]] * 3, outputs="logits"), loader(), verbose=False)
    assert several == [pytest.approx(single[0], rel=1e-6)]
    forwards = Ensemble([models[0], models[1]], outputs="logits")(X)
    assert torch.allclose(forwards, Ensemble([models[1], models[0]], outputs="logits")(X), atol=1e-5)


def test_on_every_batch_the_log_loss_is_at_most_the_members_mean() -> None:
    models = members()
    ensemble = Ensemble(models, outputs="logits", on="net")
    trainer().validate(ensemble, loader(), verbose=False)
    for model in models:
        trainer().validate(model, loader(), verbose=False)
    losses = torch.tensor([model.seen for model in models]).mean(0)
    assert (torch.tensor(ensemble.seen) < losses).all()


# ---- where the call is ----------------------------------------------------------------------------------------------


class Deep(LightningModule):
    """Calls a submodule of a submodule, and returns something nested."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.ModuleDict({"body": nn.Linear(FEATURES, 4), "head": nn.Linear(4, 2)})
        self.model.scale = 3.0
        self.offset = nn.Parameter(torch.ones(1))
        self.step = self._squared

    def _squared(self, x: Tensor) -> Tensor:
        return self.model.scale * self.offset * self.model["head"](self.model["body"](x)).square()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.step(batch)


def test_a_submodule_of_a_submodule_is_combined_and_the_rest_is_the_first_members() -> None:
    models = [Deep(seed) for seed in range(3)]
    for model in models[1:]:
        model.model["body"] = models[0].model["body"]
    ensemble = Ensemble(models, outputs="values", on="model.head")
    predicted = torch.cat(trainer().predict(ensemble, DataLoader(X, batch_size=64)))
    hidden = models[0].model["body"](X)
    assert torch.allclose(
        predicted, 3 * torch.stack([m.model["head"](hidden) for m in models]).mean(0).square(), atol=1e-5
    )
    assert isinstance(models[0].model["head"], nn.Linear)
    assert ensemble.members[0].model["body"] is ensemble.members[2].model["body"], (
        "what members share, the copies share"
    )


def test_layers_of_one_member_beside_the_combined_call_are_warned_of() -> None:
    ensemble = Ensemble([Deep(0), Deep(1)], outputs="values", on="model.head")
    with pytest.warns(UserWarning, match=r"outside of the combined call .*\['model.body'\]"):
        trainer().predict(ensemble, DataLoader(X, batch_size=64))


def test_layers_of_one_member_after_the_combined_call_are_warned_of() -> None:
    ensemble = Ensemble([Deep(0), Deep(1)], outputs="values", on="model.body")
    with pytest.warns(UserWarning, match=r"outside of the combined call .*\['model.head'\]") as warned:
        trainer().predict(ensemble, DataLoader(X, batch_size=8))
    assert sum("outside of the combined call" in str(warning.message) for warning in warned) == 1


def test_a_member_of_another_class_has_its_own_submodule_called() -> None:
    class Other(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    models = [Classifier(), Other()]
    assert torch.allclose(
        Ensemble(models, outputs="logits", on="net")(X).exp(), mean_probabilities(models, X).float(), atol=1e-6
    )


class Spare(LightningModule):
    """Module with a submodule that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.spare = nn.Linear(FEATURES, 1), nn.Linear(FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self(batch[0])


def test_a_step_that_never_reaches_the_combined_call_is_an_error() -> None:
    ensemble = Ensemble(members(), outputs="logits")
    with pytest.raises(MisconfigurationException, match=r"`validation_step` never reached `self\(…\)`.*'net'"):
        trainer().validate(ensemble, loader(), verbose=False)
    with pytest.raises(MisconfigurationException, match=r"`test_step` never reached `self.spare\(…\)`"):
        trainer().test(Ensemble([Spare()], outputs="values", on="spare"), loader(), verbose=False)
    with pytest.raises(MisconfigurationException, match="`predict_step` never reached"):
        Ensemble([Deep(0)], outputs="values").predict_step(X, 0)
    with pytest.raises(MisconfigurationException, match="`forward` never reached"):
        Ensemble([Spare()], outputs="values", on="spare")(X)


def test_calling_a_part_of_the_combined_submodule_is_an_error() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out, self.classes = nn.Linear(FEATURES, 4), nn.Linear(4, 3), 3

    class Inside(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = Head()

        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.head.out(self.head.body(batch))

    ensemble = Ensemble([Inside(), Inside()], outputs="values", on="head")
    ensemble.members[1].head.classes = 4
    assert ensemble.head.classes == 3
    with pytest.raises(AttributeError, match=r"`self.net.weight` would be the first member's alone"):
        _ = Ensemble([Regression(1.0)], outputs="values", on="net").net.weight
    with pytest.raises(AttributeError, match=r"`self.head.out` would be the first member's alone.*on='head.out'"):
        trainer().predict(ensemble, DataLoader(X))


def test_an_architecture_that_is_made_in_configure_model() -> None:
    class Late(LightningModule):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor, self.net = factor, None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = nn.Linear(FEATURES, 1)
                nn.init.constant_(self.net.weight, self.factor)
                nn.init.zeros_(self.net.bias)

        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch)

    ensemble = Ensemble([Late(1.0), Late(3.0)], outputs="values", on="net")
    predicted = torch.cat(trainer().predict(ensemble, DataLoader(X, batch_size=64)))
    assert torch.allclose(predicted, 2.0 * X.sum(1, keepdim=True), atol=1e-5)
    assert len(list(ensemble.parameters())) == 4 and not any(p.requires_grad for p in ensemble.parameters())


class Regression(LightningModule):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, 1, bias=False)
        nn.init.constant_(self.net.weight, factor)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("mse", mse_loss(self.net(batch[0]), batch[1].float().unsqueeze(1)))


def test_the_squared_error_is_the_members_less_their_ambiguity() -> None:
    models = [Regression(factor) for factor in (0.5, 1.0, 3.0)]
    found = trainer().test(Ensemble(models, outputs="values", on="net"), loader(64), verbose=False)[0]["mse"]
    singles = [trainer().test(model, loader(64), verbose=False)[0]["mse"] for model in models]
    outputs = torch.stack([model.net(X).detach() for model in models])
    ambiguity = float((outputs - outputs.mean(0)).square().mean())
    assert found == pytest.approx(sum(singles) / 3 - ambiguity, rel=1e-5)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "bf16-mixed"])
def test_half_precision_is_combined_in_fp32(precision: str) -> None:
    models = members()
    ensemble = Ensemble(models, outputs="logits", on="net")
    predicted = torch.cat(trainer(precision=precision).predict(ensemble, DataLoader(X, batch_size=64)))
    assert predicted.dtype is torch.float32
    assert torch.allclose(predicted.exp(), mean_probabilities(models, X).float(), atol=0.1)
    assert torch.allclose(predicted.exp().sum(1), torch.ones(len(X)), atol=1e-5)
    assert all(p.dtype is torch.float32 for model in models for p in model.parameters())


def test_plain_calls_in_half_precision() -> None:
    models = [model.half() for model in members()]
    found = Ensemble(models, outputs="logits")(X.half())
    assert found.dtype is torch.float32
    each = torch.stack([model.eval()(X.half()).double().softmax(1) for model in models])
    assert torch.allclose(found, each.mean(0).log().float(), atol=1e-5)


def test_the_members_of_two_ensembles_are_one() -> None:
    models = members()
    two = Ensemble(models[:2], outputs="logits"), Ensemble(models[2:], outputs="logits")
    joined = Ensemble([*two[0].members, *two[1].members], outputs="logits")
    assert torch.equal(joined(X), Ensemble(models, outputs="logits")(X))


# ---- life -----------------------------------------------------------------------------------------------------------


def test_it_does_not_train() -> None:
    ensemble = Ensemble(members(), outputs="logits", on="net")
    with pytest.raises(MisconfigurationException, match="does not train: fit its members"):
        trainer(max_epochs=1).fit(ensemble, loader())


def test_members_that_were_trained_leave_their_trainer_and_metrics_behind() -> None:
    models = members()
    for model in models:
        trainer(max_epochs=1).fit(model, loader(), loader())
        model.metrics.update(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))
    ensemble = Ensemble(models, outputs="logits", on="net")
    assert ensemble._trainer is None
    found = trainer().validate(ensemble, loader(), verbose=False)
    assert found == [pytest.approx(expected_metrics(models), rel=1e-5)]
    assert models[0].trainer is not ensemble.trainer


def test_pickle_deepcopy_and_state() -> None:
    ensemble = Ensemble(members(), outputs="logits", on="net")
    for again in (pickle.loads(pickle.dumps(ensemble)), copy.deepcopy(ensemble)):
        assert torch.equal(again(X), ensemble(X)) and type(again) is type(ensemble)
        with torch.no_grad():
            again.members[0].net[0].weight.zero_()
        assert not torch.equal(again(X), ensemble(X))
    assert isinstance(ensemble, Classifier) and isinstance(ensemble, Ensemble)
    blank = Ensemble([Classifier(8), Classifier(12), Classifier(8)], outputs="logits", on="net")
    state = ensemble.state_dict()
    assert list(state) == [f"members.{i}.{name}" for i in range(3) for name in ensemble.members[i].state_dict()]
    assert not torch.allclose(blank(X), ensemble(X))
    blank.load_state_dict(state)
    assert torch.equal(blank(X), ensemble(X))


def test_a_second_trainer_and_a_second_stage() -> None:
    models = members()
    ensemble = Ensemble(models, outputs="logits", on="net")
    for _ in range(2):
        assert trainer().validate(ensemble, loader(), verbose=False) == [
            pytest.approx(expected_metrics(models), rel=1e-5)
        ]
        assert trainer().test(ensemble, loader(), verbose=False) == [pytest.approx(expected_metrics(models), rel=1e-5)]


class Taken(LightningModule):
    members = 3


OUTPUTS = "`outputs` must be one of 'values' .*regression.*'logits' .*'binary_logits' .*'probabilities' .*never guessed"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Ensemble([]), "`members` must be a list of at least one"),
        (lambda: Ensemble(Classifier()), "`members` must be a list of at least one"),
        (lambda: Ensemble([nn.Linear(2, 2)]), "`members` must be LightningModules, got a Linear"),
        (
            lambda: Ensemble([Ensemble([Classifier()], outputs="logits")]),
            r"no Ensembles, .*\[\*one.members",
        ),
        (lambda: Ensemble([Taken()]), r"attributes \['members'\], .* rename them in Taken"),
        (lambda: Ensemble([Classifier()]), OUTPUTS),
        (lambda: Ensemble.from_checkpoints(Classifier, ["no file"]), OUTPUTS),
        (lambda: Ensemble([Classifier()], outputs="votes"), f"{OUTPUTS}.*got 'votes'"),
        (lambda: Ensemble([Classifier()], outputs=["logits"]), OUTPUTS),
        (lambda: Ensemble([Classifier()], outputs="logits", on=""), "`on` must be the name"),
        (
            lambda: Ensemble([Classifier()], outputs="logits", on="nett"),
            r"`on='nett'` must name a submodule .*; did you mean 'net'\?",
        ),
        (lambda: Ensemble([Classifier()], outputs="values", on="zzz"), r"Its submodules: 'net', 'net.0', 'net.1'"),
        (
            lambda: Ensemble([Classifier()], outputs="values", dim=1),
            "`dim` must be an integer, the dim",
        ),
        (
            lambda: Ensemble([Classifier()], outputs="logits", dim=True),
            "`dim` must be an integer, the dim",
        ),
        (
            lambda: Ensemble.from_checkpoints(Classifier, [], outputs="logits"),
            "`paths` must name at least one",
        ),
    ],
)
def test_wrong_arguments_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_subclass_sets_modules_and_parameters_after_the_constructor() -> None:
    """Before it, they would be plain attributes in silence: on no device, in no state dict."""

    class Calibrated(Ensemble):
        def __init__(self, early: bool) -> None:
            if early:
                self.temperature = nn.Parameter(torch.ones(()))
            super().__init__(members(), outputs="logits", on="net")
            self.temperature = nn.Parameter(torch.ones(()))

    assert "temperature" in dict(Calibrated(early=False).named_parameters())
    with pytest.raises(AttributeError, match=r"^Calibrated sets \['temperature'\] before `super\(\).__init__\(…\)`"):
        Calibrated(early=True)
    unmade = Calibrated.__new__(Calibrated)
    with pytest.raises(AttributeError, match=r"^Calibrated has no attribute `members` before `super\(\).__init__"):
        print(unmade.members)
