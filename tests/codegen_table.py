"""Every variant of the kernels, compiled ahead of time, and the rules that its code keeps. As a table:

    PYTHONPATH=kernels python -m tests.codegen_table

Exit status 1 if the code of any variant breaks a rule.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence

from tests.support.codegen import TARGETS, Compiled, compile_kernel

_AMSGRAD = dict(rule="adam", states=3)
_EVERYTHING = dict(clips=True, skips=True, scaled=True)
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
    "SGD, everything": ("update", _EVERYTHING, 3, 2),
    "LARS": ("update", dict(rule="lars"), 3, 2),
    "LARS, norms carried": ("update", dict(rule="lars", carry=True), 3, 2),
    "LARS bf16, everything, norms carried": (
        "update", dict(rule="lars", param="bf16", master=True, carry=True, **_EVERYTHING), 4, 3
    ),
    "LARS bf16, everything": ("update", dict(rule="lars", param="bf16", master=True, **_EVERYTHING), 4, 3),
    "LARS fp64, everything": ("update", dict(rule="lars", param="fp64", **_EVERYTHING), 3, 2),
    "Adam": ("update", dict(rule="adam"), 4, 3),
    "Adam bf16, everything": ("update", dict(_AMSGRAD, param="bf16", master=True, **_EVERYTHING), 6, 5),
    "Adam fp64, everything": ("update", dict(_AMSGRAD, param="fp64", **_EVERYTHING), 5, 4),
    "AdamP": ("update", dict(rule="adamp"), 4, 3),
    "AdamP bf16, everything": ("update", dict(rule="adamp", param="bf16", master=True, **_EVERYTHING), 5, 4),
    "AdamP fp64, everything": ("update", dict(rule="adamp", param="fp64", **_EVERYTHING), 4, 3),
    "LAMB": ("update", dict(rule="lamb"), 3, 1),
    "LAMB fp64, everything": ("update", dict(rule="lamb", param="fp64", **_EVERYTHING), 3, 1),
    "gradient norms": ("norm", dict(updates=False), 1, 0),
    "gradient norms fp64": ("norm", dict(updates=False, param="fp64"), 1, 0),
    "LARS's norms": ("norm", dict(rule="lars"), 2, 0),
    "LARS's norms, carried": ("norm", dict(rule="lars", carry=True), 2, 0),
    "LARS's norms bf16, everything": ("norm", dict(rule="lars", param="bf16", master=True, **_EVERYTHING), 3, 0),
    "LARS's norms fp64, everything": ("norm", dict(rule="lars", param="fp64", **_EVERYTHING), 2, 0),
    "LAMB's moments": ("norm", dict(rule="lamb"), 4, 2),
    "LAMB's moments bf16, everything": ("norm", dict(rule="lamb", param="bf16", master=True, **_EVERYTHING), 5, 2),
    "LAMB's moments fp64, everything": ("norm", dict(rule="lamb", param="fp64", **_EVERYTHING), 4, 2),
    # Rows begin at any element: read one by one.
    "AdamP's sums": ("sums", dict(rule="adamp"), 0, 0),
    "AdamP's sums bf16, everything": ("sums", dict(rule="adamp", param="bf16", master=True, **_EVERYTHING), 0, 0),
    "AdamP's sums fp64, everything": ("sums", dict(rule="adamp", param="fp64", **_EVERYTHING), 0, 0),
    "AdamP's factors": ("factors", dict(rule="adamp"), 0, 0),
    "reduction": ("reduce", dict(rule="lars", scaled=True), 0, 0),
}  # fmt: skip
_COLUMNS = (
    "target",
    "variant",
    "registers",
    "stack bytes",
    "wide loads",
    "wide stores",
    "fp64",
    "fp64 tiles",
    "barrier",
    "full tile",
)
_NOTES = """
wide loads, stores: of 16 bytes; on gfx942 also of 8, where elements have 2 and a lane has 4 of them
fp64: arithmetic instructions. fp64 tiles: how often Triton's code mentions one; none but for float64 parameters
barrier: whether one stands before the ticket, nothing read in between; - for kernels without a ticket
full tile: what happens to one, in order. L, S: a load, a store; c: a change of layout, r: a reduction, in both of which
    are barriers. A norm is three reductions, of which one is executed but for squares that overflow"""


def compiled(target: str, variant: str) -> Compiled:
    kernel, options, _, _ = VARIANTS[variant]
    return compile_kernel(target, kernel, **options)


def _dtypes(variant: str) -> set[str]:
    options = VARIANTS[variant][1]
    return {options.get("param", "fp32"), options.get("grad", "fp32")}


def accesses(variant: str, code: Compiled) -> tuple[int, int]:
    """Wide loads and wide stores."""
    narrow = not _dtypes(variant).isdisjoint({"bf16", "fp16"})
    return code.wide("load", narrow=narrow), code.wide("store", narrow=narrow)


def full_tiles(variant: str, code: Compiled) -> list[str]:
    """What happens to a full tile, in order: in an update with all aligned, then with an unaligned gradient."""
    kernel = VARIANTS[variant][0]
    if kernel == "update":
        return code.tile_bodies()[:-1]  # the last has masks
    order = re.sub("[^LSrcm|]", "", code.order())
    return [order[order.index("L") :]] if kernel == "norm" else []


def _loads_wait(variant: str, order: str) -> bool:
    """Whether a barrier stands before the last load of a full tile, or before its last store.

    Not counted: the load of AdamP's factors, after some stores; a norm at the end, in the norm pass and where norms are
    carried; before a store the change of layout of elements of 2 bytes among others of 4.
    """
    kernel, options, _, _ = VARIANTS[variant]
    stores = "S+" if _dtypes(variant).isdisjoint({"bf16", "fp16"}) else "[cS]+"
    last = rf"(L{stores})?" if kernel == "update" and options.get("rule") == "adamp" else ""
    norms = "r+" if kernel == "norm" or options.get("carry") else ""
    return not re.fullmatch(f"L+({stores})?{last}{norms}", order)


def violations(variant: str, code: Compiled) -> list[str]:
    """What the code breaks: 16 bytes at a time, nothing in local memory, no barrier among a full tile's accesses."""
    kernel, options, loads, stores = VARIANTS[variant]
    wide, double = accesses(variant, code), "fp64" in _dtypes(variant)
    # So that 4 programs of 128 threads fit on an SM, 3 with amsgrad and AdamP, in float64 one of 256.
    limit = 255 if double else 168 if options.get("states") == 3 or (kernel == "update" and "AdamP" in variant) else 128
    tiles = full_tiles(variant, code)
    bodies = 0 if kernel not in ("update", "norm") else 1 if kernel == "norm" or options.get("rule") == "lamb" else 2
    rules = {
        f"{code.stack} bytes of stack, {code.local} accesses of local memory": code.stack == code.local == 0,
        f"{wide[0]} wide loads, not {loads}": wide[0] >= loads,
        f"{wide[1]} wide stores, not {stores}": wide[1] >= stores,
        f"{code.registers} registers": not code.nvidia or code.registers <= limit,
        f"{code.double_tiles()} float64 tiles": double or code.double_tiles() == 0,
        f"{code.atomics} atomics": code.atomics == (kernel == "update"),  # one, the ticket
        f"{len(tiles)} kinds of full tiles, not {bodies}": len(tiles) == bodies,
        f"barriers in a full tile: {' '.join(tiles)}": not any(_loads_wait(variant, order) for order in tiles),
        "no barrier before the ticket": kernel != "update" or code.waits_before_ticket,
    }
    return [broken for broken, kept in rules.items() if not kept]


def row(target: str, variant: str, code: Compiled) -> tuple[str, ...]:
    numbers = (code.registers, code.stack, *accesses(variant, code), code.double, code.double_tiles())
    barrier = "-" if VARIANTS[variant][0] != "update" else "yes" if code.waits_before_ticket else "no"
    return target, variant, *map(str, numbers), barrier, " ".join(full_tiles(variant, code)) or "-"


def aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Lines of a table: names to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        yield "  ".join(padded)


def main() -> int:
    rows, broken = [_COLUMNS], list[str]()
    for target in TARGETS:
        for variant in VARIANTS:
            code = compiled(target, variant)
            rows.append(row(target, variant, code))
            broken += [f"{target}, {variant}: {what}" for what in violations(variant, code)]
    print(*aligned(rows), _NOTES, sep="\n")
    print(*broken or [f"all {len(rows) - 1} keep the rules"], sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
