"""The compiled kernels, without a GPU: legal, 16 bytes wide, no spills, no barrier in a tile, nor one missing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

pytestmark = pytest.mark.codegen
codegen = pytest.importorskip("tests.support.codegen", reason="needs triton", exc_type=ImportError)
from tests import codegen_table  # noqa: E402


@pytest.mark.parametrize("variant", codegen_table.VARIANTS, ids=str)
@pytest.mark.parametrize("target", codegen.TARGETS)
def test_the_code_keeps_the_rules(target, variant):
    """Wide accesses, no spills, no barrier in a full tile but one before the ticket, float64 for scalars alone.

    Without the barrier one warp could take the ticket while another of its program has not read the count yet.
    """
    assert codegen_table.violations(variant, codegen_table.compiled(target, variant)) == []


@pytest.mark.parametrize("rule", ["sgd", "lars", "adam"])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_no_float64_in_the_tile(target, rule):
    """float64 is for scalars: the schedule takes some tens of operations, a tile would take hundreds."""
    small, large = (codegen.compile_kernel(target, rule=rule, tile=tile) for tile in (512, 2048))
    assert small.double == large.double > 0


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (dict(stack=8), "8 bytes of stack, 0 accesses of local memory"),
        (dict(registers=129), "129 registers"),
        (dict(ttgir="tensor<1024xf64>\ntt.atomic_rmw"), "1 float64 tiles"),
        (dict(instructions=["LDG.E.128", "BAR", "LDG.E", "ATOMG"]), "no barrier before the ticket"),
        (dict(instructions=["BAR", "ATOMG", "RED"]), "2 atomics"),
        (dict(instructions=["LDG.E", "LDL", "BAR", "ATOMG"]), "0 wide loads, not 3"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_breaks_a_rule_is_seen(capsys, monkeypatch, change, broken):
    good = codegen_table.compiled("sm_80", "SGD")
    bad = replace(good, **change)
    assert broken in codegen_table.violations("SGD", bad)
    monkeypatch.setattr(codegen_table, "TARGETS", ["sm_80"])
    monkeypatch.setattr(codegen_table, "VARIANTS", {"SGD": codegen_table.VARIANTS["SGD"]})
    for code, status in ((good, 0), (bad, 1)):
        monkeypatch.setattr(codegen_table, "compiled", lambda target, variant, code=code: code)
        assert codegen_table.main() == status
        assert (f"sm_80, SGD: {broken}" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize(
    ("access", "line", "found"),
    [
        (2, "%x = ttg.convert_layout %y", "LLcLSS LLLSS"),
        (3, "%x = ttg.local_load %y", "LLLmSS LLLSS"),
        (4, "ttg.barrier all", "LLLS|S LLLSS"),
        (7, "%x = tt.reduce", "LLLSS LLrLSS"),
        (8, "gpu.barrier", "LLLSS LLL|SS"),
    ],
)
def test_a_barrier_in_a_full_tile_is_seen(access, line, found):
    """Planted before one of the tiles' accesses: the first five are of the first kind of tile, then the second's."""
    good = codegen_table.compiled("sm_80", "SGD")
    lines = good.ttgir.splitlines()
    at = [i for i, text in enumerate(lines) if re.search(r"tt\.(load|store) .*tensor<1024x", text)][access]
    bad = replace(good, ttgir="\n".join([*lines[:at], line, *lines[at:]]))
    assert codegen_table.violations("SGD", bad) == [f"barriers in a full tile: {found}"]
