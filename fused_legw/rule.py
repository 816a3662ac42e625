"""What tells one fused optimizer from another; everything else they share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Group = dict[str, Any]  # one of torch.optim's param_groups


class Rule:
    """An optimizer's state, and what its hyper-parameters mean to the kernel and to ATen.

    name: the kernel's update rule, in `legw_kernels.launch.RULES`. states: torch's names, in that rule's order.
    """

    name: str
    states: tuple[str, ...]

    def check(self, group: Group) -> None:
        """Raise for hyper-parameters that make no sense, with torch.optim's messages."""
        raise NotImplementedError

    def used_states(self, group: Group) -> tuple[str, ...]:
        """The states that a group with these hyper-parameters needs."""
        raise NotImplementedError

    def hyper(self, group: Group) -> tuple[float, ...]:
        """The group's hyper-parameters, in the order of `launch.group_row`."""
        raise NotImplementedError

    def aten(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
        lr: float,
        group: Group,
        first: bool,
    ) -> None:
        """One update of these tensors by ATen. states: as in `used_states`. first: of each, it is the first counted."""
        raise NotImplementedError
