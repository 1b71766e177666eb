"""The rows of the table: each trains with one callback, and compares the result with its formula, computed by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from client import Client, Fit, Weights, dropout_rates, weights_of
from torch import Tensor
from torch.nn.functional import softshrink

import lightning_optim as lo

Cell = Callable[[Client, Fit, Path], None]
CELLS: dict[str, Cell] = {}


def cell(row: str) -> Callable[[Cell], Cell]:
    """Register a function as a row of the table."""

    def register(function: Cell) -> Cell:
        CELLS[row] = function
        return function

    return register


# ---- comparing -------------------------------------------------------------------------------------------------------


def near(found: Weights, expected: Weights, what: str, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Raise if two sets of weights differ by more than rounding."""
    assert found.keys() == expected.keys(), f"{what}: other names, {sorted(found.keys() ^ expected.keys())}"
    for name, value in expected.items():
        message = f"{what}: {name} is {(found[name] - value).abs().max():.3g} off"
        assert torch.allclose(found[name], value, rtol=rtol, atol=atol), message


def equal(found: Sequence[Weights], expected: Sequence[Weights], what: str) -> None:
    """Raise if two series of weights are not the same, bit for bit."""
    assert len(found) == len(expected), f"{what}: {len(found)} steps instead of {len(expected)}"
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        near(ours, theirs, f"{what}, step {step}", rtol=0.0, atol=0.0)


def differ(found: Weights, other: Weights, what: str) -> None:
    """Raise if two sets of weights are the same up to rounding."""
    distance = max((found[name] - other[name]).abs().max() for name in other)
    assert distance > 1e-5, f"{what}: no weight is more than {distance:.3g} away"


def mean(rows: Sequence[Weights]) -> Weights:
    return {name: torch.stack([row[name].double() for row in rows]).mean(0).float() for name in rows[0]}


def usable(fit: Fit, plain: Fit, folder: Path) -> None:
    """Raise if the package cannot predict, save or load after a fit, or does so with other weights."""
    predicted = fit.predict()
    assert predicted.shape == plain.predict().shape, f"predictions have the shape {tuple(predicted.shape)}"
    assert predicted.isfinite().all(), "predictions are not finite"
    folder.mkdir(exist_ok=True, parents=True)
    for way, again in fit.reload(folder).items():
        assert torch.allclose(again, predicted, rtol=1e-4, atol=1e-5), (
            f"{way} gives other predictions, {(again - predicted).abs().max():.3g} off"
        )


def matrices(fit: Fit) -> list[str]:
    """Return the names of the parameters on which penalties act by default."""
    return [name for name, value in fit.record.start.items() if value.ndim >= 2]


# ---- without a callback ----------------------------------------------------------------------------------------------


@cell("plain")
def plain_twice(client: Client, plain: Fit, folder: Path) -> None:
    again = client.fit()
    assert plain.record.checks and plain.record.weights, "the plain fit has no step or no validation"
    equal(again.record.weights, plain.record.weights, "a second plain fit")
    differ(plain.record.weights[-1], plain.record.start, "the plain fit")
    usable(plain, plain, folder)


# ---- averages: what the module holds after the fit, from the weights of the plain run --------------------------------


def check_average(client: Client, callback: Any, plain: Fit, folder: Path, expected: Weights) -> None:
    """Fit with an average, which must leave the training as it is, and be what the module holds after it."""
    fit = client.fit(callback)
    equal(fit.record.weights, plain.record.weights, "the raw weights")
    differ(expected, plain.record.weights[-1], "the average")
    near(weights_of(fit.module), expected, "the module after the fit")
    usable(fit, plain, folder)
    change = (fit.predict() - plain.predict()).abs().max()
    assert change > 0.0, "predictions are those of the plain fit"


def ema(rows: Sequence[Weights], decay: float, warmup: float | None) -> Weights:
    average = {name: value.double() for name, value in rows[0].items()}
    for t, row in enumerate(rows[1:], 1):
        d = decay if warmup is None else min(decay, 1.0 - (1.0 + t) ** -warmup)
        average = {name: value + (1.0 - d) * (row[name] - value) for name, value in average.items()}
    return {name: value.float() for name, value in average.items()}


@cell("`WeightAveraging(EMA(0.8))`")
def weight_averaging_ema(client: Client, plain: Fit, folder: Path) -> None:
    expected = ema(plain.record.weights, 0.8, 2 / 3)
    check_average(client, lo.WeightAveraging(lo.EMA(0.8)), plain, folder, expected)


@cell("`WeightAveraging(SWA(), start=0.5)`")
def weight_averaging_swa(client: Client, plain: Fit, folder: Path) -> None:
    rows = plain.record.weights
    check_average(client, lo.WeightAveraging(lo.SWA(), start=0.5), plain, folder, mean(rows[int(0.5 * len(rows)) :]))


@cell('`WeightAveraging(LAWA(3), every="epoch")`')
def weight_averaging_lawa(client: Client, plain: Fit, folder: Path) -> None:
    expected = mean([plain.record.weights[steps - 1] for steps in plain.record.epoch_ends[-3:]])
    check_average(client, lo.WeightAveraging(lo.LAWA(3), every="epoch"), plain, folder, expected)


@cell("`EMAWeightAveraging(decay=0.8)`")
def ema_weight_averaging(client: Client, plain: Fit, folder: Path) -> None:
    expected = ema(plain.record.weights, 0.8, None)
    check_average(client, lo.EMAWeightAveraging(decay=0.8), plain, folder, expected)


@cell("`StochasticWeightAveraging(swa_epoch_start=2)`")
def stochastic_weight_averaging(client: Client, plain: Fit, folder: Path) -> None:
    expected = mean([plain.record.weights[steps - 1] for steps in plain.record.epoch_ends[1:]])
    check_average(client, lo.StochasticWeightAveraging(swa_epoch_start=2), plain, folder, expected)


def saved_weights(fit: Fit, path: str) -> Weights:
    """Return the parameters in a checkpoint."""
    saved = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
    return {name: saved[name] for name, _ in fit.module.named_parameters()}


def best_checkpoints(client: Client, folder: Path) -> list[Any]:
    return [client.saver(folder, monitor=client.monitor, save_top_k=2), lo.CheckpointAveraging(top=2)]


def check_best_checkpoints(fit: Fit, saver: Any, averaging: Any) -> None:
    """Raise if the average is not the mean of two checkpoints, or the module not the better of average and best."""
    saver, averaging = fit.used(saver), fit.used(averaging)
    assert len(averaging.kept) == 2 and averaging.path, "no average was written"
    expected = mean([saved_weights(fit, path) for path in averaging.kept])
    near(saved_weights(fit, averaging.path), expected, "the averaged checkpoint")
    near(weights_of(fit.module), saved_weights(fit, averaging.best_path), "the module after the fit")
    scores = {averaging.path: averaging.score, saver.best_model_path: float(saver.best_model_score)}
    assert averaging.best_path == min(scores, key=lambda path: scores[path]), (
        "the module ends with the worse of the two"
    )


@cell("`CheckpointAveraging(top=2)`")
def checkpoint_averaging(client: Client, plain: Fit, folder: Path) -> None:
    callbacks = best_checkpoints(client, folder)
    fit = client.fit(*callbacks)
    equal(fit.record.weights, plain.record.weights, "the raw weights")
    check_best_checkpoints(fit, *callbacks)
    usable(fit, plain, folder / "usable")


# ---- gradients: the first step has the weights and the batch of the plain run ----------------------------------------


def norm_of(grads: Weights) -> float:
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))


def check_first_step(
    client: Client, callback: Any, plain: Fit, folder: Path, formula: Callable[[str, Tensor, Tensor], Tensor]
) -> Fit:
    """Fit with a callback, and compare the gradients of the first step with a formula of name, gradient and weight."""
    fit = client.fit(callback)
    start = plain.record.start
    # A penalty creates the gradients of parameters that have none.
    first = {name: plain.record.grads[0].get(name, torch.zeros_like(start[name])) for name in fit.record.grads[0]}
    expected = {name: formula(name, grad, start[name]) for name, grad in first.items()}
    difference = {name: value - first[name] for name, value in expected.items()}
    assert norm_of(difference) > 1e-4 * norm_of(first), "the formula does not change the gradients"
    near(fit.record.grads[0], expected, "the gradients of the first step", rtol=1e-3, atol=1e-6 * norm_of(first))
    differ(weights_of(fit.module), plain.record.weights[-1], "the weights after the fit")
    usable(fit, plain, folder)
    return fit


def rows_of(tensor: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce all dimensions but the first; a vector or a scalar is one row."""
    return reduce(tensor) if tensor.ndim < 2 else reduce(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)


@cell("`GradientClipping(ClipByNorm(…))`")
def clip_by_norm(client: Client, plain: Fit, folder: Path) -> None:
    norm = norm_of(plain.record.grads[0])
    bound = norm / 2
    fit = check_first_step(
        client, lo.GradientClipping(lo.ClipByNorm(bound)), plain, folder, lambda _, grad, __: grad * bound / norm
    )
    assert all(norm_of(grads) < 1.001 * bound for grads in fit.record.grads), "a later step exceeds the bound"


@cell("`GradientClipping(ClipByValue(…))`")
def clip_by_value(client: Client, plain: Fit, folder: Path) -> None:
    bound = max(float(grad.abs().max()) for grad in plain.record.grads[0].values()) / 2
    policy = lo.ClipByValue(bound)
    check_first_step(client, lo.GradientClipping(policy), plain, folder, lambda _, grad, __: grad.clamp(-bound, bound))


@cell("`GradientClipping(AGC())`")
def agc(client: Client, plain: Fit, folder: Path) -> None:
    def formula(_: str, grad: Tensor, weight: Tensor) -> Tensor:
        norm, size = (rows_of(tensor, torch.linalg.vector_norm) for tensor in (grad, weight))
        return grad * (0.01 * size.clamp(min=1e-3) / norm.clamp(min=1e-6)).clamp(max=1.0)

    check_first_step(client, lo.GradientClipping(lo.AGC(0.01)), plain, folder, formula)


@cell("`GradientClipping(Centralize())`")
def centralize(client: Client, plain: Fit, folder: Path) -> None:
    def formula(_: str, grad: Tensor, weight: Tensor) -> Tensor:
        return grad if grad.ndim < 2 else grad - rows_of(grad, torch.mean)

    check_first_step(client, lo.GradientClipping(lo.Centralize()), plain, folder, formula)


@cell("`GradientClipping(Noise())`")
def noise(client: Client, plain: Fit, folder: Path) -> None:
    fit = client.fit(lo.GradientClipping(lo.Noise(eta=0.01)))
    first = plain.record.grads[0]
    added = torch.cat([(fit.record.grads[0][name] - grad).flatten() for name, grad in first.items()])
    assert abs(float(added.std()) - 0.1) < 0.02, f"the noise has the standard deviation {float(added.std()):.3g}"
    usable(fit, plain, folder)


@cell("`GradientClipping([AutoClip(), ZClip()])`")
def adaptive(client: Client, plain: Fit, folder: Path) -> None:
    monitor = lo.GradientMonitor()
    fit = client.fit(lo.GradientClipping([lo.AutoClip(10.0), lo.ZClip(warmup=2)]), monitor)
    before = [float(norm) for norm in fit.used(monitor)._rows(0)[:, 0]]
    after = [norm_of(grads) for grads in fit.record.grads]
    for step, norm in enumerate(after):
        bound = float(torch.quantile(torch.tensor(before[: step + 1], dtype=torch.float64), 0.1))
        assert norm <= 1.001 * min(bound, before[step]), f"step {step} exceeds the 10th percentile of the norms so far"
    assert len(before) == len(after), f"{len(before)} norms were measured in {len(after)} steps"
    assert any(a < 0.999 * b for a, b in zip(after, before, strict=True)), "no step was clipped"
    usable(fit, plain, folder)


@cell("`GradientClipping` beside the package's `gradient_clip_val`")
def clipping_twice(client: Client, plain: Fit, folder: Path) -> None:
    client.fit(lo.GradientClipping(1.0), gradient_clip_val=None)
    client.fit(lo.GradientClipping(1.0), gradient_clip_val=0.5)


@cell("`GradientAccumulation(2)`")
def accumulation(client: Client, plain: Fit, folder: Path) -> None:
    fit = client.fit(lo.GradientAccumulation(2))
    lightnings = client.fit(accumulate_grad_batches=2)
    per_epoch, steps = plain.record.epoch_ends[0], fit.record.epoch_ends[0]
    assert steps == math.ceil(per_epoch / 2), f"{steps} steps in an epoch of {per_epoch} batches"
    assert per_epoch % 2 == 0, "an epoch must have an even number of batches, so that every window is full"
    near(weights_of(fit.module), weights_of(lightnings.module), "the weights after the fit", rtol=1e-3, atol=1e-5)
    usable(fit, plain, folder)


@cell("`GradientAccumulation` beside the package's `accumulate_grad_batches`")
def accumulating_twice(client: Client, plain: Fit, folder: Path) -> None:
    client.fit(lo.GradientAccumulation(2), accumulate_grad_batches=2)


@cell("`GradientMonitor()`")
def monitor(client: Client, plain: Fit, folder: Path) -> None:
    callback = lo.GradientMonitor()
    fit = client.fit(callback)
    callback = fit.used(callback)
    equal(fit.record.weights, plain.record.weights, "the weights")
    norms = torch.tensor([norm_of(grads) for grads in plain.record.grads], dtype=torch.float64)
    for percentile in (0.0, 50.0, 90.0):
        expected = float(torch.quantile(norms, percentile / 100))
        assert math.isclose(callback.suggest_clip(percentile), expected, rel_tol=1e-3), "another percentile"
    usable(fit, plain, folder)


# ---- regularization --------------------------------------------------------------------------------------------------


@cell("`WeightRegularization(L1(…))`")
def l1(client: Client, plain: Fit, folder: Path) -> None:
    strength, penalized = 0.01 * norm_of(plain.record.grads[0]), set(matrices(plain))

    def formula(name: str, grad: Tensor, weight: Tensor) -> Tensor:
        return grad + strength * weight.sign() if name in penalized else grad

    fit = check_first_step(client, lo.WeightRegularization(lo.L1(strength)), plain, folder, formula)
    assert "regularization/l1" in fit.record.metrics, "the penalty was not logged"


@cell("`WeightRegularization(L2(…))`")
def l2(client: Client, plain: Fit, folder: Path) -> None:
    strength, penalized = norm_of(plain.record.grads[0]), set(matrices(plain))

    def formula(name: str, grad: Tensor, weight: Tensor) -> Tensor:
        return grad + 2 * strength * weight if name in penalized else grad

    check_first_step(client, lo.WeightRegularization(lo.L2(strength)), plain, folder, formula)


@cell("`WeightRegularization(ProximalL1(…))`")
def proximal(client: Client, plain: Fit, folder: Path) -> None:
    fit = client.fit(lo.WeightRegularization(lo.ProximalL1(1.0)))
    lr, projected = plain.record.lrs[0], set(matrices(plain))
    expected = {n: softshrink(w, lr) if n in projected else w for n, w in plain.record.weights[0].items()}
    near(fit.record.weights[0], expected, "the weights after the first step")
    zeros = sum(int((fit.record.weights[-1][name] == 0).sum()) for name in projected)
    assert zeros, "no weight is zero"
    usable(fit, plain, folder)


@cell("`ScheduledDropout({…: Linear(0.5, 0.1)}, insert=True)`")
def dropout(client: Client, plain: Fit, folder: Path) -> None:
    rates = lo.ScheduledDropout({client.dropout: lo.Linear(0.5, 0.1)}, insert=True)
    fit = client.fit(rates)
    differ(fit.record.weights[0], plain.record.weights[0], "the weights after the first step")
    logged = fit.record.metrics[f"regularization/dropout/{client.dropout}"]
    assert 0.1 <= logged < 0.2, f"the last rate is {logged}"
    hooks = [name for name, module in fit.module.named_modules() if module._forward_hooks]
    assert not hooks, f"forward hooks are left on {hooks}"
    assert dropout_rates(fit.module) == plain.record.rates[0], "rates are not restored"
    usable(fit, plain, folder)


# ---- stopping and resuming -------------------------------------------------------------------------------------------


@cell("`EarlyStopping(…)`, best weights restored")
def early_stopping(client: Client, plain: Fit, folder: Path) -> None:
    # The largest loss is the best here, so that the best weights are not the last ones.
    warnings.filterwarnings("ignore", "EarlyStopping takes the largest value")
    stop = lo.EarlyStopping(client.monitor, mode="max", patience=2)
    fit = client.fit(stop, epochs=8)
    stop = fit.used(stop)
    values = [metrics[client.monitor] for _, metrics, _ in fit.record.checks]
    best = max(range(len(values)), key=lambda check: values[check])
    assert stop.best_check == best, f"the best check is {stop.best_check}, of {values}"
    assert stop.stopped_epoch and len(values) == best + 3, f"it did not stop after two checks without a gain: {values}"
    near(weights_of(fit.module), fit.record.checks[best][2], "the module after the fit", rtol=0.0, atol=0.0)
    differ(weights_of(fit.module), fit.record.weights[-1], "the restored weights")
    usable(fit, plain, folder)


def check_resume(client: Client, folder: Path, callbacks: Callable[[], list[Any]], **options: Any) -> Fit:
    """Fit in one go, and again from the checkpoint of the second epoch: the same weights, bit for bit."""

    def all_callbacks() -> list[Any]:
        return [*callbacks(), client.saver(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)]

    whole = client.fit(*all_callbacks(), **options)
    resumed = client.fit(*all_callbacks(), resume=folder / "epoch=1.ckpt", seed=2, **options)
    done = whole.record.epoch_ends[1]
    equal(resumed.record.weights, whole.record.weights[done:], "the resumed run")
    equal([weights_of(resumed.module)], [weights_of(whole.module)], "the module after the resumed run")
    return resumed


@cell("`ExactResume()`")
def exact_resume(client: Client, plain: Fit, folder: Path) -> None:
    fit = check_resume(client, folder, lambda: [lo.ExactResume(), lo.WeightAveraging(lo.EMA(0.8))])
    usable(fit, plain, folder / "usable")


@cell("`CheckpointAveraging(top=3)`, `EarlyStopping(dirpath=…)` in a resumed run")
def resumed_files(client: Client, plain: Fit, folder: Path) -> None:
    """Checkpoints of the earlier run hold objects of the package; their weights are read all the same."""

    warnings.filterwarnings("ignore", "EarlyStopping takes the largest value")

    def callbacks() -> list[Any]:
        best = client.saver(folder, monitor=client.monitor, save_top_k=3, save_last=True, filename="{epoch}")
        stop = lo.EarlyStopping(client.monitor, mode="max", patience=float("inf"), dirpath=str(folder / "stop"))
        return [best, lo.CheckpointAveraging(top=3), stop]

    first = client.fit(*callbacks(), epochs=2)
    fit = client.fit(*callbacks(), epochs=4, resume=folder / "last.ckpt")
    _, averaging, stop = map(fit.used, callbacks())
    assert len(fit.record.checks) == 2, f"{len(fit.record.checks)} validations after the resume"
    assert len(averaging.kept) == 3 and averaging.path, f"the average is of {averaging.kept}"
    expected = mean([saved_weights(fit, path) for path in averaging.kept])
    near(saved_weights(fit, averaging.path), expected, "the averaged checkpoint")
    checks = first.record.checks + fit.record.checks
    best = max(checks, key=lambda check: check[1][client.monitor])[2]
    stop.restore_best_(fit.module)
    near(weights_of(fit.module), best, "the best weights", rtol=0.0, atol=0.0)


# ---- all together ----------------------------------------------------------------------------------------------------


def everything(client: Client, plain: Fit) -> list[Any]:
    norm = norm_of(plain.record.grads[0])
    return [
        lo.GradientAccumulation(2),
        lo.WeightRegularization([lo.L1(1e-3 * norm), lo.L2(1e-2 * norm), lo.ProximalL1(1e-3)]),
        lo.ScheduledDropout({client.dropout: 0.2}, insert=True),
        lo.GradientMonitor(),
        lo.GradientClipping([lo.Centralize(), lo.ClipByNorm(norm / 2)]),
        lo.WeightAveraging(lo.EMA(0.8)),
        lo.WeightAveraging(lo.SWA(), start=0.5, evaluate=False, apply_at_end=False),
        lo.EarlyStopping(client.monitor, patience=float("inf")),
        lo.ExactResume(),
    ]


@cell("all of these together")
def all_together(client: Client, plain: Fit, folder: Path) -> None:
    callbacks = best_checkpoints(client, folder / "best")
    fit = client.fit(*everything(client, plain), *callbacks)
    check_best_checkpoints(fit, *callbacks)
    usable(fit, plain, folder / "usable")

    if "`ExactResume()`" in client.missing:
        fit = client.fit(*everything(client, plain))
    else:
        fit = check_resume(client, folder, lambda: everything(client, plain))
    bound = 0.501 * norm_of(plain.record.grads[0])
    assert fit.record.grads and all(norm_of(grads) < bound for grads in fit.record.grads), "not clipped"
    values = [metrics[client.monitor] for _, metrics, _ in fit.record.checks]
    evaluated = [weights for _, _, weights in fit.record.checks]
    differ(evaluated[-1], fit.record.weights[-1], "the evaluated weights")
    if min(values) == values[-1]:  # else the best ones are of the part before the resume
        near(weights_of(fit.module), evaluated[-1], "the module after the fit", rtol=0.0, atol=0.0)
    usable(fit, plain, folder / "usable")


@cell("the package's learning-rate finder, backtest or cross-validation")
def other_fits(client: Client, plain: Fit, folder: Path) -> None:
    def callbacks() -> list[Any]:
        return [lo.GradientClipping(1.0), lo.WeightAveraging(lo.EMA(0.8)), lo.GradientMonitor(), lo.ExactResume()]

    client.seed(1)
    found = client.other_fits(callbacks)
    client.seed(1)
    without = client.other_fits(list)
    for way, predicted in found.items():
        assert predicted.isfinite().all(), f"{way}: predictions are not finite"
        assert (predicted - without[way]).abs().max() > 1e-5, f"{way}: predictions are those without callbacks"


# ---- mixins and ensembles --------------------------------------------------------------------------------------------


class Term(lo.RegularizationMixin):
    """Add the mean square of all weights to the loss."""

    def regularization(self, batch: Any, outputs: Any) -> Tensor:
        return 0.1 * torch.stack([weight.square().mean() for weight in self.parameters()]).sum()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().training_step(*args, **kwargs)  # type: ignore[misc]
        term = self.regularization_loss(args[0], outputs)
        if isinstance(outputs, dict):
            return {**outputs, "loss": outputs["loss"] + term}
        return outputs + term


@cell("`RegularizationMixin`")
def regularization_mixin(client: Client, plain: Fit, folder: Path) -> None:
    def first_weights(base: tuple[type, ...]) -> tuple[Any, Weights]:
        client.seed(1)
        module = client.member(0, base)
        trainer = client.trainer(max_epochs=1, limit_train_batches=2)
        trainer.fit(module, client.data()[0])
        return trainer, weights_of(module)

    (_, without), (trainer, with_term) = first_weights(()), first_weights((Term,))
    assert float(trainer.callback_metrics["regularization/loss"]) > 0.0, "the term was not logged"
    differ(with_term, without, "the weights after the fit")


@cell("`fit_members`, `Ensemble`, `cost_benefit`")
def fitted_members(client: Client, plain: Fit, folder: Path) -> None:
    members = client.members(folder)
    combined = lo.Ensemble(members, outputs=client.outputs)  # type: ignore[arg-type]
    each = [client.predict(member) for member in members]
    found = client.predict(combined)
    assert torch.allclose(found, torch.stack(each).mean(0), rtol=1e-4, atol=1e-5), "not the mean of the members"
    assert (each[0] - each[1]).abs().max() > 1e-5, "the members are alike"
    table = lo.cost_benefit(combined, client.trainer(), client.data()[1], monitor=client.ensemble_monitor)
    assert [row.members for row in table.rows] == [1, 2, 3]
    assert len({row.value for row in table.rows}) > 1, "the metric does not depend on the members"


@cell("`average_checkpoints`, `Ensemble.from_checkpoints`")
def from_checkpoints(client: Client, plain: Fit, folder: Path) -> None:
    fits, paths = [], []
    for seed in (1, 2):
        fits.append(client.fit(lo.WeightAveraging(lo.EMA(0.8)), seed=seed))
        paths.append(folder / f"{seed}.ckpt")
        fits[-1].trainer.save_checkpoint(paths[-1])
    weights = [weights_of(fit.module) for fit in fits]
    averaged = lo.average_checkpoints(paths, weights_only=False)
    near({name: averaged[name] for name in weights[0]}, mean(weights), "the mean of two checkpoints")

    each = [client.predict(fit.module) for fit in fits]
    assert (each[0] - each[1]).abs().max() > 1e-5, "the members are alike"
    kind = type(fits[0].module)
    combined = lo.Ensemble.from_checkpoints(kind, paths, outputs=client.outputs, weights_only=False)  # type: ignore[arg-type]
    trainer = client.trainer()
    trainer.validate(client.prepare(combined), client.data()[1], verbose=False)
    trainer.save_checkpoint(folder / "ensemble.ckpt")
    loaded = lo.Ensemble.load_from_checkpoint(folder / "ensemble.ckpt", weights_only=False)
    for ensemble in (combined, loaded):
        found = client.predict(ensemble)
        assert torch.allclose(found, torch.stack(each).mean(0), rtol=1e-4, atol=1e-5), "not the mean of the members"
