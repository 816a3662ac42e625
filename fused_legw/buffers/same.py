"""Notices whether objects were replaced since last time."""

from __future__ import annotations

import operator
from collections.abc import Sequence


class Same:
    """Remembers objects, and compares others with them by identity.

    For results that depend on objects: while `holds` is true, the results need not be computed again. Objects that can
    change in place need another check. The objects stay alive here, so no new one can take an id of theirs.
    """

    def __init__(self, objects: Sequence[object] | None = None) -> None:
        self._held = objects

    def holds(self, objects: Sequence[object]) -> bool:
        """Whether these are the objects of the last `keep`, in the same order."""
        held = self._held
        return held is not None and len(objects) == len(held) and all(map(operator.is_, objects, held))

    def keep(self, objects: Sequence[object]) -> None:
        """Remember these objects."""
        self._held = objects

    def forget(self) -> None:
        """Forget the objects, so that `holds` is false until the next `keep`."""
        self._held = None
