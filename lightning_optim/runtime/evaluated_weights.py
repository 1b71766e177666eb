"""Return the weights and buffers that a validation would use now: an average's, or the module's own."""

from __future__ import annotations

from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim.base import module_tensors, shards
from lightning_optim.runtime.lightning import Trainer
from lightning_optim.runtime.session import Session

RAW_METRICS = "averaging/raw/"  # begins the name of a metric of the raw weights, where a validation uses an average


def evaluated_state(trainer: Trainer) -> dict[str, Tensor]:
    """Return the weights and buffers that a validation would use now, by their names in the model's ``state_dict``.

    These are the tensors of the evaluated average once it has started, and the module's own before that and where there
    is no average. They are live storage: clone what you keep. Under FSDP2 they are DTensors. Lazy parameters without
    data are left out.

    Args:
        trainer: A Trainer with a connected model, such as the one in a callback's hook.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = Trainer(logger=False, enable_checkpointing=False, fast_dev_run=True, enable_model_summary=False)
        >>> trainer.strategy.connect(BoringModel())
        >>> list(evaluated_state(trainer))
        ['layer.weight', 'layer.bias']
    """
    session = Session.find(trainer)
    averaged = session.average.averaged_state() if session is not None and session.average is not None else {}
    shards.reshard_(trainer.lightning_module)
    named = module_tensors.named_tensors(trainer.lightning_module).items()
    return {**{name: tensor.detach() for name, tensor in named if not is_lazy(tensor)}, **averaged}
