"""fused-legw: the LEGW schedule inside fused optimizer kernels, as drop-in torch.optim classes."""

from . import reference
from .optim.adam import Adam, AdamW
from .optim.adamp import AdamP
from .optim.base import FusedOptimizer
from .optim.grouping import param_groups
from .optim.lamb import LAMB
from .optim.lars import LARS
from .optim.sgd import SGD
from .schedules.autowu import AutoWU
from .schedules.decays import Constant, Cosine, Exponential, MultiStep, Polynomial
from .schedules.legw import LEGW
from .training.follow_schedule import FollowSchedule
from .training.grad_scaler import GradScaler
from .training.gradient_norms import DistributedNorms, MicroBatchNorms
from .training.noise_scale import GradientNoiseScale
from .verification.compare import verify

__version__ = "0.1.0"
__all__ = [
    "LAMB",
    "LARS",
    "LEGW",
    "SGD",
    "Adam",
    "AdamP",
    "AdamW",
    "AutoWU",
    "Constant",
    "Cosine",
    "DistributedNorms",
    "Exponential",
    "FollowSchedule",
    "FusedOptimizer",
    "GradScaler",
    "GradientNoiseScale",
    "MicroBatchNorms",
    "MultiStep",
    "Polynomial",
    "param_groups",
    "reference",
    "verify",
]
