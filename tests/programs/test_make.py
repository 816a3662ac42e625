"""The Makefile's test command runs every test file once."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.support.deal import TESTS, files

ROOT = TESTS.parent


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_every_test_file_is_in_exactly_one_part():
    asked = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    parts = [(int(number), int(of)) for number, of in re.findall(r"support/deal.py (\d+) (\d+)", asked)]
    assert sorted(parts) == [(number, len(parts)) for number in range(len(parts))] and len(parts) > 1
    dealt = [file for part in parts for file in files(*part)]
    assert sorted(dealt) == sorted(str(path.relative_to(ROOT)) for path in TESTS.rglob("test_*.py"))
    assert len(set(dealt)) == len(dealt)
