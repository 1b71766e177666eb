"""Test the checkpoint of an ensemble, and the ensemble that is loaded from it."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import Ensemble
from tests.ensembling.models import CLASSES, FEATURES, Classifier, data, loader, trainer
from tests.ensembling.models import members as build
from tests.lightning import LightningModule

X = data().tensors[0]
NAMES = ("weight", "bias")


class Plain(LightningModule):
    """Module that saves no hyper-parameters, and can be made with its default arguments."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("mean", self(batch[0]).mean())


class Wide(Plain):
    """Module with a required argument whose name the ensemble uses too."""

    def __init__(self, dim: int, seed: int = 0) -> None:
        super().__init__(seed)
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(FEATURES, dim), nn.Linear(dim, CLASSES))


class Renames(Plain):
    """Save the weights under other names."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"old.{name}": value for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert sorted(checkpoint["state_dict"]) == ["old.net.bias", "old.net.weight"]
        checkpoint["state_dict"] = {n.removeprefix("old."): value for n, value in checkpoint["state_dict"].items()}


class Needs(Plain):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, width)


class Adapter(Plain):
    """Save some of the weights, with a ``state_dict`` without arguments, and notes in the hooks."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.base = nn.Linear(FEATURES, FEATURES)
        nn.init.eye_(self.base.weight)
        self.strict_loading = False
        self.tag = f"tag {seed}"

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.base(x))

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {name: value for name, value in super().state_dict().items() if "base" not in name}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert sorted(checkpoint["state_dict"]) == ["net.bias", "net.weight"]
        checkpoint["tag"] = self.tag

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert sorted(checkpoint["state_dict"]) == ["net.bias", "net.weight"]
        self.tag = checkpoint["tag"]


class Whole(Adapter):
    """Is asked for its variables too."""

    def state_dict(self, keep_vars: bool = False) -> dict[str, Any]:  # type: ignore[override]
        state = nn.Module.state_dict(self, keep_vars=keep_vars)
        return {name: value for name, value in state.items() if "base" not in name}


class ReadsTwice(Wide):
    """Reads its checkpoint before Lightning does, as chemprop's models do."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str, **kwargs: Any) -> Any:
        read = torch.load(checkpoint_path, weights_only=kwargs.get("weights_only", True))
        assert Path(checkpoint_path).suffix == ".ckpt" and read["hyper_parameters"]["dim"] == 5
        return super().load_from_checkpoint(checkpoint_path, **kwargs)


def saved(ensemble: Ensemble, folder: Path, **how: Any) -> Path:
    of = trainer()
    of.test(ensemble, loader(), verbose=False)
    of.save_checkpoint(folder / "ensemble.ckpt", **how)
    return folder / "ensemble.ckpt"


MEMBERS = {
    "plain": lambda: [Plain(1), Plain(2)],
    "one": lambda: [Plain(1)],
    "hyper-parameters": lambda: [Wide(5, seed=1), Wide(7, seed=2)],
    "two classes": lambda: [Wide(5), Plain(3), Classifier(seed=4)],
    "parts": lambda: [Adapter(1), Adapter(2)],
    "read twice": lambda: [ReadsTwice(5, seed=1), ReadsTwice(5, seed=2)],
    "other names": lambda: [Renames(1), Plain(2)],
}


class Config(UserDict):  # type: ignore[type-arg]
    """Hyper-parameters that are no dictionary, as OmegaConf's."""


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_the_ensemble_of_a_checkpoint_equals_the_one_that_was_saved(
    name: str, weights_only: bool, tmp_path: Path
) -> None:
    on = None if name == "parts" else "net"
    ensemble = Ensemble(MEMBERS[name](), outputs="logits", on=on, dim=-1)
    path = saved(ensemble, tmp_path, weights_only=weights_only)
    state = torch.random.get_rng_state()
    trusted = Ensemble.load_from_checkpoint(path, weights_only=False)
    classes = [type(member) for member in ensemble.members]
    torch.random.set_rng_state(state)
    named = Ensemble.load_from_checkpoint(path, member_class=classes)
    with path.open("rb") as file:
        opened = Ensemble.load_from_checkpoint(file, member_class=classes)
    for again in (trusted, named, opened):
        assert type(again) is type(ensemble) and [type(member) for member in again.members] == classes
        assert (again._combined.outputs, again._combined.on, again._combined.dim) == ("logits", on, -1)
        assert [dict(member.hparams) for member in again.members] == [dict(m.hparams) for m in ensemble.members]
        expected, found = ensemble.state_dict(), again.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        assert not again.training and not any(p.requires_grad for p in again.parameters())
    if name != "parts":
        assert torch.equal(trusted(X), ensemble(X)) and torch.equal(named(X), ensemble(X))
    else:
        assert [member.tag for member in named.members] == ["tag 1", "tag 2"]


@pytest.mark.parametrize("name", MEMBERS)
def test_a_trainer_tests_from_it(name: str, tmp_path: Path) -> None:
    ensemble = Ensemble(MEMBERS[name](), outputs="logits")
    path = saved(ensemble, tmp_path)
    expected = trainer().test(ensemble, loader(), verbose=False)
    with torch.no_grad():
        for member in ensemble.members:
            member.net.apply(lambda layer: layer.weight.zero_() if isinstance(layer, nn.Linear) else None)
    assert trainer().test(ensemble, loader(), verbose=False) != expected
    assert trainer().test(ensemble, loader(), ckpt_path=path, verbose=False) == expected


def test_it_is_saved_and_loaded_by_lightning(tmp_path: Path) -> None:
    ensemble = Ensemble(build(), outputs="logits", on="net")
    of = trainer()
    expected = of.validate(ensemble, loader(), verbose=False)
    of.save_checkpoint(tmp_path / "ensemble.ckpt")
    blank = [Classifier(8), Classifier(12), Classifier(8)]
    arguments = {"outputs": "logits", "on": "net"}
    loaded = Ensemble.load_from_checkpoint(tmp_path / "ensemble.ckpt", members=blank, **arguments)
    assert torch.equal(loaded(X), ensemble(X))
    found = trainer().validate(
        Ensemble(blank, **arguments), loader(), ckpt_path=tmp_path / "ensemble.ckpt", verbose=False
    )
    assert found == expected


def test_members_that_are_given_and_arguments_in_place_of_those_in_the_file(tmp_path: Path) -> None:
    ensemble = Ensemble([Needs(4), Needs(4)], outputs="logits")
    path = saved(ensemble, tmp_path)
    blank = [Needs(4), Needs(4)]
    nn.init.zeros_(blank[0].net.weight)
    loaded = Ensemble.load_from_checkpoint(path, members=blank)
    assert torch.equal(loaded(X), ensemble(X))
    assert not blank[0].net.weight.any(), "those given are copied"
    other = Ensemble.load_from_checkpoint(path, member_class=Needs, width=4, outputs="values", on="net")
    assert torch.equal(other(X), Ensemble(list(ensemble.members), outputs="values")(X))


def test_a_subclass_and_a_class_that_was_made_at_run_time(tmp_path: Path) -> None:
    class Served(Ensemble):
        pass

    path = saved(Ensemble([Plain(1)], outputs="logits"), tmp_path)
    served = Served.load_from_checkpoint(path, member_class=Plain)
    assert type(served).__bases__ == (Served, Plain)
    assert type(type(served).load_from_checkpoint(path, member_class=Plain)) is type(served)
    assert type(type(served)([Plain()], outputs="logits")) is type(served)
    with pytest.raises(TypeError, match="call it on the class"):
        served.load_from_checkpoint(path)


def test_an_error_in_loading_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(Plain):
        pass

    def refused(sentence: str, path: Path, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=sentence) as raised:
            Ensemble.load_from_checkpoint(path, **arguments)
        assert str(path) in str(raised.value)

    path = saved(Ensemble([Plain(1), Plain(2)], outputs="logits"), tmp_path)
    refused(r"nothing that a checkpoint names is called: pass `member_class=`, or `weights_only=False`", path)
    refused(r"nothing that a checkpoint names is called", path, weights_only=True)
    wrong_class = "`member_class` must be a LightningModule class, or a list with one for each of 2"
    with pytest.raises(ValueError, match=wrong_class):
        Ensemble.load_from_checkpoint(path, member_class=[Plain])
    with pytest.raises(ValueError, match=wrong_class):
        Ensemble.load_from_checkpoint(path, member_class=nn.Linear)
    with pytest.raises(ValueError, match="`outputs` must be one of"):
        Ensemble.load_from_checkpoint(path, member_class=Plain, outputs="votes")
    with pytest.raises(RuntimeError, match=r"ensemble of 1 members does not have, .*: \['members.1.net.weight'"):
        Ensemble.load_from_checkpoint(path, members=[Plain()])
    with pytest.raises(RuntimeError, match=r"Member 2: [^$]*Missing key"):
        Ensemble.load_from_checkpoint(path, members=[Plain(), Plain(), Plain()])
    monkeypatch.delattr(f"{__name__}.Plain")
    refused(r"the members' class '.*:Plain' is not found .*: pass `member_class=`", path, weights_only=False)
    path = saved(Ensemble([Local()], outputs="logits"), tmp_path)
    refused(r"the members' class '.*Local' is not found .*: pass `member_class=`", path, weights_only=False)
    path = saved(Ensemble([Needs(4)], outputs="logits"), tmp_path)
    refused(r"member 0, a Needs, cannot be built from .*`members=", path, weights_only=False)


def test_files_of_other_content(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    of = trainer()
    of.test(Plain(), loader(), verbose=False)
    of.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"other.ckpt is no checkpoint of an Ensemble: .*`Ensemble.from_checkpoints`"):
        Ensemble.load_from_checkpoint(path, weights_only=False)
    path.write_bytes(path.read_bytes()[:500])
    for arguments in ({}, {"weights_only": False}, {"members": [Plain()], "outputs": "logits"}):
        with pytest.raises(ValueError, match=r"other.ckpt is damaged or incomplete, or no checkpoint: copy"):
            Ensemble.load_from_checkpoint(path, **arguments)


class Evil:
    def __reduce__(self) -> Any:
        return pytest.fail, ("the file was unpickled",)


def test_an_untrusted_checkpoint_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "ensemble": Evil()}, path)
    with pytest.raises(ValueError, match=r"evil.ckpt holds more than tensors .* pass `weights_only=False`"):
        Ensemble.load_from_checkpoint(path, member_class=Plain)
    with pytest.raises(pytest.fail.Exception, match="unpickled"):
        Ensemble.load_from_checkpoint(path, weights_only=False)
    for entry in (3, {}, {"class": "os:getcwd"}, {"class": 3, "checkpoint": {}}, {"class": "a:b", "checkpoint": 3}):
        torch.save({"state_dict": {}, "ensemble": {"members": [entry]}}, path)
        with pytest.raises(ValueError, match=r"evil.ckpt is no checkpoint of an Ensemble"):
            Ensemble.load_from_checkpoint(path, weights_only=False)
    torch.save({"state_dict": {3: torch.ones(1)}}, path)
    with pytest.raises(ValueError, match=r"evil.ckpt is no checkpoint of Lightning"):
        Ensemble.load_from_checkpoint(path, weights_only=False)
    torch.save({"state_dict": {}, "ensemble": {"members": [{"class": "os:getcwd", "checkpoint": {}}]}}, path)
    with pytest.raises(ValueError, match="'os:getcwd' is no LightningModule"):
        Ensemble.load_from_checkpoint(path, weights_only=False)


def test_a_trusted_file_may_hold_hyper_parameters_of_any_kind(tmp_path: Path) -> None:
    ensemble = Ensemble([Wide(5), Wide(7)], outputs="logits")
    ensemble.members[1].hparams["anything"] = tmp_path
    path = saved(ensemble, tmp_path)
    loaded = Ensemble.load_from_checkpoint(path, weights_only=False)
    assert torch.equal(loaded(X), ensemble(X))
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        Ensemble.load_from_checkpoint(path, member_class=Wide)


def test_hyper_parameters_of_another_type_are_written_as_lightning_writes_them() -> None:
    ensemble = Ensemble([Plain(), Wide(5)], outputs="logits")
    ensemble.members[0]._set_hparams({"seed": 3})
    ensemble.members[1]._hparams = Config(dim=5)
    checkpoint: dict[str, Any] = {"hyper_parameters": {"seed": 3}}
    ensemble.on_save_checkpoint(checkpoint)
    parts = [member["checkpoint"] for member in checkpoint["ensemble"]["members"]]
    assert parts[0] == {"hyper_parameters": {"seed": 3}} and type(parts[0]["hyper_parameters"]) is dict
    assert parts[1] == {"hyper_parameters": {"dim": 5}, "hparams_name": "kwargs", "hparams_type": Config}


@pytest.mark.parametrize("order", [1, -1])
def test_a_member_that_saves_a_part_does_not_make_the_loading_of_others_lenient(order: int, tmp_path: Path) -> None:
    ensemble = Ensemble([Adapter(1), Plain(2)][::order], outputs="logits")
    path = saved(ensemble, tmp_path)
    again = Ensemble([Adapter(1), Plain(3)][::order], outputs="logits")
    trainer().test(again, loader(), ckpt_path=path, verbose=False)
    assert torch.equal(again(X), ensemble(X))
    checkpoint = torch.load(path)
    del checkpoint["state_dict"][f"members.{[Adapter, Plain][::order].index(Plain)}.net.bias"]
    torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match=r"Missing key.*net.bias"):
        trainer().test(again, loader(), ckpt_path=path, verbose=False)
    again.strict_loading = False
    trainer().test(again, loader(), ckpt_path=path, verbose=False)


def test_the_state_of_members_that_rename_or_leave_out(tmp_path: Path) -> None:
    ensemble = Ensemble([Whole(1), Plain(2)], outputs="logits")
    assert list(ensemble.state_dict()) == [f"members.{i}.net.{name}" for i in range(2) for name in NAMES]
    held = nn.ModuleDict({"served": ensemble})
    assert list(held.state_dict()) == [f"served.{name}" for name in ensemble.state_dict()]
    assert ensemble.state_dict()._metadata["members.1.net"] == {"version": 1}
    kept = ensemble.state_dict(keep_vars=True)["members.1.net.weight"]
    assert kept is ensemble.members[1].net.weight
    given = {f"members.1.net.{name}": torch.zeros_like(ensemble.members[1].net.get_parameter(name)) for name in NAMES}
    ensemble.load_state_dict({**ensemble.state_dict(), **given}, assign=True)
    assert ensemble.members[1].net.weight.data_ptr() == given["members.1.net.weight"].data_ptr()
    with pytest.raises(RuntimeError, match=r"Member 1: [^$]*Missing key"):
        ensemble.load_state_dict({"members.1.net.bias": torch.ones(CLASSES)})
    with pytest.raises(RuntimeError, match=r"does not have, 1 in all: \['strange'\]"):
        ensemble.load_state_dict({**ensemble.state_dict(), "strange": torch.ones(1)})
    keys = ensemble.load_state_dict({"members.1.net.bias": torch.ones(CLASSES), "strange": torch.ones(1)}, strict=False)
    assert keys.unexpected_keys == ["strange"]
    assert "members.1.net.weight" in keys.missing_keys and "members.1.net.bias" not in keys.missing_keys
    assert torch.equal(ensemble.members[1].net.bias, torch.ones(CLASSES))
