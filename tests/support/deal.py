"""Deals the test files to parts of a run: every n-th file, so that files that are alike are spread out.

python tests/support/deal.py NUMBER OF    prints the files of part NUMBER (from 0) of OF
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def files(number: int, of: int) -> list[str]:
    """Paths from the repository's root, in all folders of the suite."""
    every = sorted(str(path.relative_to(TESTS.parent)) for path in TESTS.rglob("test_*.py"))
    return every[number::of]


if __name__ == "__main__":
    print(*files(int(sys.argv[1]), int(sys.argv[2])))
