"""fused-legw: the LEGW schedule inside fused optimizer kernels, as drop-in torch.optim classes."""

from . import reference
from .decays import Constant, Cosine, Exponential, MultiStep, Polynomial
from .schedule import LEGW
from .sgd import SGD
from .verification import verify

__version__ = "0.1.0.dev0"
__all__ = ["LEGW", "SGD", "Constant", "Cosine", "Exponential", "MultiStep", "Polynomial", "reference", "verify"]
