"""Ensemble.from_checkpoints: members in files of their own, which may be damaged, hostile or of other content."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import Ensemble
from tests.ensembling.models import Classifier, data, loader, mean_probabilities, members, trainer

X, _ = data().tensors


def checkpoints(folder: Path) -> list[Path]:
    paths = []
    for index, model in enumerate(members()):
        of = trainer(max_epochs=1)
        of.fit(model, loader())
        paths.append(folder / f"{index}.ckpt")
        of.save_checkpoint(paths[-1])
    return paths


def test_from_checkpoints(tmp_path: Path) -> None:
    paths = checkpoints(tmp_path)
    models = [Classifier.load_from_checkpoint(path) for path in paths]
    ensemble = Ensemble.from_checkpoints(Classifier, map(str, paths), outputs="logits", on="net")
    assert torch.allclose(ensemble(X).exp(), mean_probabilities(models, X).float(), atol=1e-6)
    assert Ensemble.from_checkpoints(Classifier, paths, outputs="logits", seed=9).hparams["seed"] == 9


class Evil:
    """Fail if it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("the file was unpickled",)


def test_an_untrusted_checkpoint_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "evil": Evil()}, path)
    for unsaid in ({}, {"weights_only": None}, {"weights_only": 0}):
        with pytest.raises(ValueError, match=r"evil.ckpt holds more than tensors .* pass `weights_only=False`"):
            Ensemble.from_checkpoints(Classifier, [path], outputs="logits", **unsaid)
    with pytest.raises(pytest.fail.Exception, match="unpickled"):
        Ensemble.from_checkpoints(Classifier, [path], outputs="logits", weights_only=False)


class Before26(Classifier):
    """Lightning before 2.6 does not know ``weights_only``, and unpickles whatever there is."""

    @classmethod
    def load_from_checkpoint(cls, path: Path, **kwargs: Any) -> Classifier:
        assert "weights_only" not in kwargs
        return Classifier.load_from_checkpoint(path, weights_only=False, **kwargs)


def test_an_untrusted_checkpoint_is_not_unpickled_by_an_older_lightning_either(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "evil": Evil()}, path)
    with pytest.raises(ValueError, match=r"evil.ckpt holds more than tensors .* pass `weights_only=False`"):
        Ensemble.from_checkpoints(Before26, [path], outputs="logits")
    with pytest.raises(pytest.fail.Exception, match="unpickled"):
        Ensemble.from_checkpoints(Before26, [path], outputs="logits", weights_only=False)
    paths = checkpoints(tmp_path)
    older, newer = (Ensemble.from_checkpoints(known, paths, outputs="logits") for known in (Before26, Classifier))
    assert torch.equal(older(X), newer(X))


@pytest.mark.parametrize("version", [(2, 5, 0), (2, 6, 5)])
def test_no_function_is_called_that_a_checkpoint_names(version: tuple[int, ...], tmp_path: Path, monkeypatch) -> None:
    """Lightning 2.6.6 refuses it by itself."""
    monkeypatch.setattr("lightning_optim.runtime.lightning.loading.version_of", lambda kind: version)
    paths = checkpoints(tmp_path)
    saved = torch.load(paths[1], weights_only=True)
    torch.save({**saved, "hyper_parameters": {"_instantiator": "no_such_module.call"}}, paths[1])
    with pytest.raises(ValueError, match=r"1\.ckpt names a function, 'no_such_module\.call', .* `weights_only=False`"):
        Ensemble.from_checkpoints(Classifier, paths, outputs="logits")
    with pytest.raises((ValueError, ModuleNotFoundError), match="no_such_module"):
        Ensemble.from_checkpoints(Classifier, paths, outputs="logits", weights_only=False)
    ensemble = {"members": [{"class": "any:Any", "checkpoint": {"hyper_parameters": {"_instantiator": "any.call"}}}]}
    whole = tmp_path / "whole.ckpt"
    state = {f"members.0.{name}": value for name, value in saved["state_dict"].items()}
    torch.save({"state_dict": state, "ensemble": {"outputs": "logits", "on": None, "dim": None, **ensemble}}, whole)
    with pytest.raises(ValueError, match=r"whole\.ckpt names a function, 'any\.call'"):
        Ensemble.load_from_checkpoint(whole, member_class=Classifier)


def refused(path: Path, sentence: str, **arguments: Any) -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError, OSError), match=sentence) as raised:
        Ensemble.from_checkpoints(Classifier, [path], outputs="logits", **arguments)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value).strip().partition("Error(s) in")[0]


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_file_that_is_cut_off_anywhere_is_named(weights_only: bool, tmp_path: Path) -> None:
    path = checkpoints(tmp_path)[0]
    content = path.read_bytes()
    for length in range(0, len(content), 512):
        path.write_bytes(content[:length])
        refused(path, "is no checkpoint|is damaged", weights_only=weights_only)
    path.write_bytes(content)
    assert (
        Ensemble.from_checkpoints(Classifier, [path], outputs="logits", weights_only=weights_only)(X).isfinite().all()
    )


def test_a_bit_that_flipped_is_never_another_value(tmp_path: Path) -> None:
    path = checkpoints(tmp_path)[0]
    content, right = path.read_bytes(), Classifier.load_from_checkpoint(path).state_dict()
    outcomes = {"right": 0, "refused": 0}
    for seed in range(60):
        place = random.Random(seed).randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = Ensemble.from_checkpoints(Classifier, [path], outputs="logits").members[0].state_dict()
        except ValueError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
        else:
            assert all(torch.equal(found[name], value) for name, value in right.items()), place
            outcomes["right"] += 1
    assert min(outcomes.values()) > 0, outcomes


def test_files_of_other_content_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    refused(path, "No such file")
    path.write_text("not a checkpoint at all")
    refused(path, "is no checkpoint: torch did not write it")
    for content in ([1, 2], {"model": {}}, {"state_dict": 3}):
        torch.save(content, path)
        refused(path, "is no checkpoint of Lightning: it has no `state_dict`")
    of = trainer()
    of.test(Classifier(width=5), loader(), verbose=False)
    of.save_checkpoint(path)
    refused(path, "size mismatch", width=6)
    (tmp_path / "folder.ckpt").mkdir()
    refused(tmp_path / "folder.ckpt", "is a folder, a distributed checkpoint")


def test_an_argument_that_is_not_in_the_file_is_missed_by_the_files_name(tmp_path: Path) -> None:
    class Needs(Classifier):
        def __init__(self, needed: int) -> None:
            super().__init__()

    path = checkpoints(tmp_path)[0]
    with pytest.raises(TypeError, match=r"0.ckpt: .*'needed'"):
        Ensemble.from_checkpoints(Needs, [path], outputs="logits")
