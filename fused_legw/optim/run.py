"""What changes in an optimizer while it trains."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from ..backends.engine import Engine
from ..buffers import memory
from ..buffers.layout import Layout
from ..spec import Group, OptimizerSpec
from .options import CheckedOptions, ShownLR


class Run:
    """Everything that an optimizer's methods assign, in one object.

    Wrappers such as Lightning Fabric's run the methods with a copy of the optimizer's attributes as self. Both then
    hold this object, so a change by one is seen by the other.
    """

    def __init__(self, spec: OptimizerSpec, defaults: Group, options: dict[str, Any], *, skip_nonfinite: bool) -> None:
        self.options = options  # backend, flatten, master_weights, carry_norms, tile
        self.skip_nonfinite = skip_nonfinite  # the option
        self.takes_scale = False  # our GradScaler sets it for one step
        self.finds_nonfinite = False  # and this
        self.made = memory.now()  # when the optimizer was made
        self.layout: Layout | None = None  # the flat buffers; None before the constructor ends, and after `release`
        self.engine: Engine | None = None  # runs the steps on them
        self.adopts = False  # whether the constructor has ended, so that new groups go into buffers at once
        self.shown = ShownLR()  # what the groups show
        self.host_steps = 0  # steps_applied as far as the host knows without reading a device
        self.steps_given = False  # whether the user has set steps_applied
        self.steps_skipped: dict[torch.device, int] = {}  # before `release`
        self.checked = CheckedOptions(spec, defaults)  # the groups' options that passed
        self.clips = -1, False  # the options' generation, and whether any group clips in it

    def release(self) -> None:
        """Let go of the flat buffers and parameters. The next step makes new buffers. Reads the device.

        Does nothing after a graph capture, because replays use the buffers.
        """
        engine = self.engine
        if engine is None or engine.captured or engine.capturing:
            return
        if engine.devices:
            self.host_steps = int(engine.devices[0].step_counts[0])
        self.steps_skipped = engine.steps_skipped()
        self.layout = self.engine = None


class OptimizerState(defaultdict[Any, Any]):
    """torch.optim's `state`, whose `clear` lets go of the flat buffers too."""

    def __init__(self, run: Run) -> None:
        super().__init__(dict)
        self._run = run

    def clear(self) -> None:
        """Empty the state."""
        super().clear()
        self._run.release()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are torch's plain dict."""
        return defaultdict, (dict,), None, None, iter(self.items())

    def __copy__(self) -> Any:
        return defaultdict(dict, self)

    def copy(self) -> Any:
        return self.__copy__()
