"""The compiled kernels, without a GPU: legal, 16 bytes wide, nothing spilled, the count read before the ticket."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.codegen
codegen = pytest.importorskip("codegen", reason="needs triton", exc_type=ImportError)

NVIDIA = ["sm_80", "sm_90", "sm_100"]
AMSGRAD = dict(rule="adam", states=3)
EVERYTHING = dict(clips=True, skips=True, scaled=True)
# Kernel, its options, and the least 16-byte loads and stores: a tile of 1,024 takes two of each tensor it touches.
VARIANTS = {
    "SGD": ("update", dict(), 3, 2),
    "SGD, no momentum": ("update", dict(states=0), 2, 1),
    "SGD fp64": ("update", dict(param="fp64"), 3, 2),
    "SGD bf16 with masters": ("update", dict(param="bf16", master=True), 4, 3),
    "SGD fp16 with masters": ("update", dict(param="fp16", master=True), 4, 3),
    "SGD bf16": ("update", dict(param="bf16"), 3, 2),
    "SGD fp32, bf16 gradient": ("update", dict(grad="bf16"), 3, 2),
    "SGD, not the last launch": ("update", dict(last=False), 3, 2),
    "SGD, everything": ("update", EVERYTHING, 3, 2),
    "LARS": ("update", dict(rule="lars"), 3, 2),
    "LARS bf16, everything": ("update", dict(rule="lars", param="bf16", master=True, **EVERYTHING), 4, 3),
    "LARS fp64, everything": ("update", dict(rule="lars", param="fp64", **EVERYTHING), 3, 2),
    "Adam": ("update", dict(rule="adam"), 4, 3),
    "Adam bf16, everything": ("update", dict(AMSGRAD, param="bf16", master=True, **EVERYTHING), 6, 5),
    "Adam fp64, everything": ("update", dict(AMSGRAD, param="fp64", **EVERYTHING), 5, 4),
    "LAMB": ("update", dict(rule="lamb"), 3, 1),
    "LAMB fp64, everything": ("update", dict(rule="lamb", param="fp64", **EVERYTHING), 3, 1),
    "gradient norms": ("measure", dict(updates=False), 1, 0),
    "gradient norms fp64": ("measure", dict(updates=False, param="fp64"), 1, 0),
    "LARS's norms": ("measure", dict(rule="lars"), 2, 0),
    "LARS's norms bf16, everything": ("measure", dict(rule="lars", param="bf16", master=True, **EVERYTHING), 3, 0),
    "LARS's norms fp64, everything": ("measure", dict(rule="lars", param="fp64", **EVERYTHING), 2, 0),
    "LAMB's moments": ("measure", dict(rule="lamb"), 4, 2),
    "LAMB's moments bf16, everything": ("measure", dict(rule="lamb", param="bf16", master=True, **EVERYTHING), 5, 2),
    "LAMB's moments fp64, everything": ("measure", dict(rule="lamb", param="fp64", **EVERYTHING), 4, 2),
    "reduction": ("reduce", dict(rule="lars", scaled=True), 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_wide_and_without_spills(target, variant):
    """Every tensor is read and written in 16-byte accesses, and nothing goes to local memory."""
    kernel, options, loads, stores = VARIANTS[variant]
    code = codegen.compile_kernel(target, kernel, **options)
    assert code.stack == 0
    assert not code.count("LDL", "STL", "scratch_")
    if target in NVIDIA:
        assert code.count("LDG.E.128").total() >= loads
        assert code.count("STG.E.128").total() >= stores
        # So many that 4 programs of 128 threads fit on an SM, in float64 one of 256.
        assert code.registers <= (255 if options.get("param") == "fp64" else 128)
    else:
        wide = ("global_load_dwordx4", "buffer_load_dwordx4", "global_load_dwordx2", "buffer_load_dwordx2")
        assert code.count(*wide).total() >= loads
        assert code.count(*(name.replace("load", "store") for name in wide)).total() >= stores


@pytest.mark.parametrize("target", codegen.TARGETS)
def test_a_block_barrier_stands_before_the_ticket(target):
    """Else one warp can take the ticket while another of its program has not read the count yet."""
    for options in (dict(), dict(rule="adam"), dict(rule="lamb", **EVERYTHING)):
        code = codegen.compile_kernel(target, **options)
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


@pytest.mark.parametrize("rule", ["sgd", "lars", "adam"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_no_float64_in_the_tile(target, rule):
    """float64 is for scalars: the schedule takes some tens of operations, a tile would take hundreds."""
    small, large = (codegen.compile_kernel(target, rule=rule, tile=tile) for tile in (512, 2048))
    double = ("DFMA", "DMUL", "DADD") if target in NVIDIA else ("v_fma_f64", "v_mul_f64", "v_add_f64")
    assert small.count(*double).total() == large.count(*double).total() > 0


def test_norms_are_summed_without_atomics():
    for kernel, rule in (("measure", "lamb"), ("reduce", "lars")):
        code = codegen.compile_kernel("sm_90", kernel, rule)
        assert not code.count("RED", "ATOM")
