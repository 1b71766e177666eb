"""Write the weights that the module holds after a fit, and say so where something else writes them too."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from lightning_optim.base import shards
from lightning_optim.base.norms import tensor_norms
from lightning_optim.runtime.hooks_that_load import writes_weights
from lightning_optim.runtime.lightning import LightningModule, Trainer, rank_zero_warn
from lightning_optim.runtime.order import SessionCallback
from lightning_optim.runtime.refusals import hides_weights


class FinalWeights:
    """Let one callback write the weights that the module keeps, and tell of anything else that writes them.

    Packages bring callbacks that load the best weights when training ends, and modules do so too. What can be read off
    their code is told at the start. If nothing is, the parameters are compared before and after ``on_train_end``, over
    which callbacks of this package leave the weights of the last step in the module. That costs two norms of each
    parameter that is trained, at the end of the fit.

    Args:
        trainer: The Trainer of the fit.
        callbacks: The callbacks of this package in it.

    Attributes:
        writer: The callback that has written the weights; ``None`` before :meth:`write_`, or if none had any.
    """

    def __init__(self, trainer: Trainer, callbacks: list[SessionCallback]) -> None:
        self._trainer, self._callbacks = trainer, callbacks
        self._norms: dict[str, tuple[Any, str]] = {}
        self.writer: SessionCallback | None = None

    def start(self, patch: Callable[[Any, str, Any], None]) -> None:
        """Tell of what loads weights, or prepare to see it. Called at ``on_fit_start``, when all is set up.

        Args:
            patch: Sets an attribute for the length of the fit.
        """
        writer = next((callback for callback in self._by_rank() if callback.final_opt_out), None)
        if writer is None or hides_weights(self._trainer.strategy) or self._tell_of_others(writer):
            return
        loop, module = self._trainer.fit_loop, self._trainer.lightning_module
        run_end = loop.on_run_end

        def measure_and_end() -> None:
            self._norms = _norms(module, {name for name, one in module.named_parameters() if one.requires_grad})
            run_end()

        patch(loop, "on_run_end", measure_and_end)

    def write_(self, pl_module: LightningModule) -> bool:
        """Let one callback write the weights that the module keeps; return False if none has any to write.

        It is called at ``on_fit_end``, after the last checkpoint. Only one writes, so that no callback overwrites the
        weights of another. The callbacks are asked in the order of their ``final_rank``, until one has weights to
        write: the mean of checkpoints (0), the best weights that were validated (1), the average that is evaluated (2),
        an average that is not (3). If there are none, the module keeps its raw weights.
        """
        now = _norms(pl_module, self._norms) if self._norms else {}
        # Pruning that is made permanent replaces a parameter, a new dtype rounds it, and on another device its norm is
        # rounded in another way: none of these writes other weights.
        kept = [name for name, (identity, _) in self._norms.items() if name in now and now[name][0] == identity]
        was_written = any(now[name] != self._norms[name] for name in kept)
        self.writer = writer = next((one for one in self._by_rank() if one.write_final_(pl_module)), None)
        if writer is not None and was_written:
            rank_zero_warn(
                "A callback or the module wrote weights when training had ended, as in `on_train_end`, and"
                f" {type(writer).__name__} has written over them. {self._ways_out('those', 'what wrote them')}"
            )
        return writer is not None

    def _by_rank(self) -> list[SessionCallback]:
        ranked = [(callback.final_rank, callback) for callback in self._callbacks if callback.final_rank is not None]
        return [callback for _, callback in sorted(ranked, key=lambda pair: pair[0])]

    def _tell_of_others(self, ours: SessionCallback) -> bool:
        """Warn of callbacks, and of a module, whose code loads weights when training ends; return True if there are."""
        listed: list[Any] = [*self._trainer.callbacks, self._trainer.lightning_module]
        place = min(listed.index(one) for one in self._callbacks if one in listed)  # this one writes, for all
        name, told = type(ours).__name__, False
        for index, other in enumerate(listed):
            for hook in ("on_train_end", "on_fit_end"):
                if not (does := writes_weights(other, hook)):
                    continue
                told, theirs = True, type(other).__name__
                when, lost = ("before", name) if hook == "on_fit_end" and index > place else ("after", theirs)
                rank_zero_warn(
                    f"`{theirs}.{hook}` {does}, and {name} writes the weights that the module ends with {when} it, so"
                    f" that those of {lost} are lost."
                    f" {self._ways_out(f'those of {theirs}', f'the loading of {theirs}')}"
                )
        return told

    def _ways_out(self, those: str, loading: str) -> str:
        opt_outs = " and ".join(callback.final_opt_out for callback in self._by_rank() if callback.final_opt_out)
        return f"To end with {those}, {opt_outs}; else turn off {loading}."


def _norms(pl_module: LightningModule, names: Container[str]) -> dict[str, tuple[Any, str]]:
    """Return identity and place of each parameter, and its norm; of a sharded one, that of this rank's shard."""
    shards.reshard_(pl_module)
    named = {
        name: parameter
        for name, parameter in pl_module.named_parameters()
        if name in names
        and not is_lazy(parameter)
        and parameter.is_floating_point()
        and parameter.layout is torch.strided
    }
    norms = tensor_norms(shards.local_shards(parameter.detach() for parameter in named.values())).tolist()
    # As text, in which NaN equals NaN.
    return {
        name: ((id(one), one.dtype, one.device), repr(norm))
        for (name, one), norm in zip(named.items(), norms, strict=True)
    }
