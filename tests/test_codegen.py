"""The compiled kernel, without a GPU: legal, 16 bytes wide, nothing spilled, the count read before the ticket."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.codegen
codegen = pytest.importorskip("codegen", reason="needs triton", exc_type=ImportError)

NVIDIA = ["sm_80", "sm_90", "sm_100"]
VARIANTS = {
    "fp32": dict(),
    "fp32, no momentum": dict(state=False),
    "fp64": dict(param="fp64"),
    "bf16 with masters": dict(param="bf16", master=True),
    "fp16 with masters": dict(param="fp16", master=True),
    "bf16": dict(param="bf16"),
    "fp32, bf16 gradient": dict(grad="bf16"),
    "not the last launch": dict(advance=False),
}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("target", codegen.TARGETS)
def test_wide_and_without_spills(target, variant):
    """p, g and m (and the master) are read and written in 16-byte accesses, and nothing goes to local memory."""
    options = VARIANTS[variant]
    code = codegen.compile_step(target, **options)
    assert code.stack == 0
    assert not code.count("LDL", "STL", "scratch_")
    state, master = options.get("state", True), options.get("master", False)
    loads, stores = 2 + state + master, 1 + state + master
    if target in NVIDIA:
        assert code.count("LDG.E.128").total() >= loads
        assert code.count("STG.E.128").total() >= stores
        # At 80 registers 6 programs of 128 threads fit on an SM, in float64 4.
        assert code.registers <= (128 if options.get("param") == "fp64" else 80)
    else:
        wide = ("global_load_dwordx4", "buffer_load_dwordx4", "global_load_dwordx2", "buffer_load_dwordx2")
        assert code.count(*wide).total() >= loads
        assert code.count(*(name.replace("load", "store") for name in wide)).total() >= stores


@pytest.mark.parametrize("target", codegen.TARGETS)
def test_a_block_barrier_stands_before_the_ticket(target):
    """Else one warp can take the ticket while another of its program has not read the count yet."""
    for options in VARIANTS.values():
        code = codegen.compile_step(target, **options)
        # The kernel's own barrier, after the loop over tiles: at present the compiler adds one there too, for shared
        # memory that the masked path happens to use, which is nothing to rely on.
        lines = [line.strip() for line in code.ttgir.splitlines()]
        ticket = next(i for i, line in enumerate(lines) if "tt.atomic_rmw" in line)
        assert any("barrier" in line for line in lines[ticket - 3 : ticket])
        names = code.instructions
        ticket = next(i for i, name in enumerate(names) if name.startswith(("ATOM", "global_atomic")))
        barrier, load = ("BAR", "LDG") if target in NVIDIA else ("s_barrier", "global_load")
        between = names[:ticket]
        last_barrier = max(i for i, name in enumerate(between) if name.startswith(barrier))
        assert not any(name.startswith(load) for name in between[last_barrier:]), "nothing is read after the barrier"
        assert not any("atomic" in name or name.startswith(("RED", "ATOM")) for name in between)


@pytest.mark.parametrize("target", codegen.TARGETS)
def test_no_float64_in_the_tile(target):
    """float64 is for scalars: the schedule takes some tens of operations, a tile would take hundreds."""
    small, large = (codegen.compile_step(target, tile=tile) for tile in (512, 2048))
    double = ("DFMA", "DMUL", "DADD") if target in NVIDIA else ("v_fma_f64", "v_mul_f64", "v_add_f64")
    assert small.count(*double).total() == large.count(*double).total() > 0
