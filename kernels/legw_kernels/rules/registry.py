"""What a rule is, and each optimizer's.

A rule is a few functions, and two optimizers share what is the same in them. Tiles are of the compute dtype (float32,
or float64 for float64 parameters); a, b, c are tiles of the rule's states in their order, dummies where unused.

    prepare(hyper, lr, count, scale, exempt, w_norm, x_norm, IN_NORM_PASS) -> h
        the scalars of one tensor at this update, as a NamedTuple. `h.scale` multiplies its gradient first, the update
        is w - h.outer * direction. hyper: address of the group's hyper-parameters. scale: of clipping and AMP.
        count: float64, the tensor's earlier updates. In the norm pass the LR and the norms are passed as 0, and
        everything derived from them is skipped, because each scalar read from the row costs 8 bytes of traffic per
        tile.
    advance(p, g, a, b, c, h) -> (a, b, c)       the states of the next update
    direction(p, g, a, b, c, h) -> u             the update, from the advanced states
    divisor(p, g, a, b, c, h) -> x               the trust ratio divides the weight's norm by x's
"""

from typing import Any, NamedTuple

from .adam import adam_advance, adam_direction, adam_prepare, adamp_direction, adamp_prepare, lamb_prepare
from .momentum import lars_divisor, lars_prepare, momentum_advance, momentum_direction, sgd_prepare


class DeviceRule(NamedTuple):
    """One optimizer's functions, as described above."""

    prepare: Any
    advance: Any
    direction: Any
    divisor: Any = None  # None: no trust ratio
    two_stage: bool = False  # the states advance in the norm pass
    projects: bool = False  # each row's multiple of the weight is added to the direction: `projection_pass`


RULES = {
    "sgd": DeviceRule(sgd_prepare, momentum_advance, momentum_direction),
    "lars": DeviceRule(lars_prepare, momentum_advance, momentum_direction, lars_divisor),
    "adam": DeviceRule(adam_prepare, adam_advance, adam_direction),
    "adamp": DeviceRule(adamp_prepare, adam_advance, adamp_direction, projects=True),
    "lamb": DeviceRule(lamb_prepare, adam_advance, adam_direction, adam_direction, two_stage=True),
}
