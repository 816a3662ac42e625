"""fused-legw: the LEGW schedule inside fused optimizer kernels, as drop-in torch.optim classes."""

from . import reference
from .adam import Adam, AdamW
from .adamp import AdamP
from .amp import GradScaler
from .autowu import AutoWU
from .decays import Constant, Cosine, Exponential, MultiStep, Polynomial
from .follow import FollowSchedule
from .grouping import param_groups
from .lamb import LAMB
from .lars import LARS
from .noise_scale import DistributedNorms, GradientNoiseScale, MicroBatchNorms
from .schedule import LEGW
from .sgd import SGD
from .verification import verify

__version__ = "0.1.0.dev0"
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
    "GradScaler",
    "GradientNoiseScale",
    "MicroBatchNorms",
    "MultiStep",
    "Polynomial",
    "param_groups",
    "reference",
    "verify",
]
