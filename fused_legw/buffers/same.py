"""Telling that nothing was replaced since last time."""

from __future__ import annotations

import operator
from collections.abc import Sequence


class Same:
    """The very objects of last time, by identity.

    Whoever works something out from objects keeps them here, and works it out again once they are others. Objects that
    can change in place need more than that. They are held, so none of their addresses can come to mean another object.
    """

    def __init__(self, objects: Sequence[object] | None = None) -> None:
        self._held = objects

    def holds(self, objects: Sequence[object]) -> bool:
        """Whether these are the objects kept last, in their order."""
        held = self._held
        return held is not None and len(objects) == len(held) and all(map(operator.is_, objects, held))

    def keep(self, objects: Sequence[object]) -> None:
        self._held = objects

    def forget(self) -> None:
        """Let go of them: no objects are the same from now on."""
        self._held = None
