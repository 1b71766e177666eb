"""Lightning callbacks and mixins that make a trained network better: the public names."""

from lightning_optim.averaging.averages import EMA, Average
from lightning_optim.averaging.weight_averaging import WeightAveraging
from lightning_optim.callback import OptimCallback, gradients
from lightning_optim.fit import drop_step, evaluated_state, total_steps
from lightning_optim.gradients.accumulation import GradientAccumulation
from lightning_optim.gradients.clipping import ClipByNorm, ClipByValue, Clipping
from lightning_optim.gradients.gradient_clipping import GradientClipping
from lightning_optim.gradients.mixins import ManualOptimizationMixin
from lightning_optim.policy import Policy
from lightning_optim.regularization.dropout import DropPath
from lightning_optim.regularization.mixin import RegularizationMixin
from lightning_optim.regularization.penalties import L1, L2, ElasticNet, Penalty
from lightning_optim.regularization.proximal import Proximal, ProximalL1
from lightning_optim.regularization.scheduled_dropout import ScheduledDropout
from lightning_optim.regularization.weights import WeightRegularization
from lightning_optim.schedules import Constant, Cosine, Exponential, Linear, Piecewise, Schedule
from lightning_optim.slots import Slot
from lightning_optim.stopping.criteria import AnyOf, Criterion, Divergence, NonFinite, Plateau, Threshold
from lightning_optim.stopping.early_stopping import EarlyStopping

__all__ = [
    "EMA",
    "L1",
    "L2",
    "AnyOf",
    "Average",
    "ClipByNorm",
    "ClipByValue",
    "Clipping",
    "Constant",
    "Cosine",
    "Criterion",
    "Divergence",
    "DropPath",
    "EarlyStopping",
    "ElasticNet",
    "Exponential",
    "GradientAccumulation",
    "GradientClipping",
    "Linear",
    "ManualOptimizationMixin",
    "NonFinite",
    "OptimCallback",
    "Penalty",
    "Piecewise",
    "Plateau",
    "Policy",
    "Proximal",
    "ProximalL1",
    "RegularizationMixin",
    "Schedule",
    "ScheduledDropout",
    "Slot",
    "Threshold",
    "WeightAveraging",
    "WeightRegularization",
    "drop_step",
    "evaluated_state",
    "gradients",
    "total_steps",
]
