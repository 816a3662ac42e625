"""Ahead-of-time compilation of the kernels, and what the compiled code shows."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from legw_kernels import arguments, launch, norm_pass, projection_pass, tuning, update_pass

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_NVIDIA = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_TYPES = {"fp32": tl.float32, "fp64": tl.float64, "fp16": tl.float16, "bf16": tl.bfloat16}


@dataclass(frozen=True)
class Compiled:
    """Compiled code as instructions in order, and the resources it takes."""

    nvidia: bool
    ttgir: str  # Triton's own intermediate code, before its compiler adds barriers of its own
    instructions: list[str]
    registers: int
    stack: int  # bytes a thread spills or keeps in local memory

    def count(self, *prefixes: str) -> Counter[str]:
        return Counter(i for i in self.instructions if i.startswith(prefixes))

    def wide(self, what: str, *, narrow: bool = False) -> int:
        """16-byte accesses, "load" or "store". narrow: tiles have 2-byte elements, of which an AMD lane has 8 bytes."""
        if self.nvidia:
            return self.count("LDG.E.128" if what == "load" else "STG.E.128").total()
        widths = ("dwordx4", "dwordx2") if narrow else ("dwordx4",)
        return self.count(*(f"{space}_{what}_{width}" for space in ("global", "buffer") for width in widths)).total()

    @property
    def local(self) -> int:
        """Accesses of local memory."""
        return self.count("LDL", "STL", "scratch_").total()

    @property
    def double(self) -> int:
        """float64 arithmetic, of scalars and of tiles."""
        return self.count("DFMA", "DMUL", "DADD", "v_fma_f64", "v_mul_f64", "v_add_f64").total()

    def double_tiles(self, tile: int = 1024) -> int:
        """Lines of Triton's code that have a float64 tile."""
        return sum(f"tensor<{tile}xf64" in line for line in self.ttgir.splitlines())

    def order(self, tile: int = 1024) -> str:
        """What happens to tiles, in the order of Triton's code, a letter for each operation.

        L, S: a load, a store. c: a change of layout, r: a reduction, m: shared memory by name, |: a barrier; in the
        first three the compiler puts barriers of its own. ( and ): a branch or a loop begins and ends.
        """
        return "".join(_letters(line, tile) for line in self.ttgir.splitlines())

    def tile_bodies(self, tile: int = 1024) -> list[str]:
        """`order` of each branch that begins with a tile's load, without what shows the branches in it."""
        order, bodies = self.order(tile), list[str]()
        while (start := order.find("(L")) >= 0:
            end, depth = start + 1, 1
            while depth:
                depth += {"(": 1, ")": -1}.get(order[end], 0)
                end += 1
            bodies.append(order[start:end].replace("(", "").replace(")", ""))
            order = order[end:]
        return bodies

    @property
    def atomics(self) -> int:
        return sum("atomic" in name or name.startswith(("RED", "ATOM")) for name in self.instructions)

    @property
    def waits_before_ticket(self) -> bool:
        """Whether a barrier of the kernel's own stands before its ticket, and nothing is read between the two.

        The own one: at present the compiler adds one there too, for shared memory that the masked path happens to use,
        which is nothing to rely on.
        """
        lines = self.ttgir.splitlines()
        ticket = next(i for i, line in enumerate(lines) if "tt.atomic_rmw" in line)
        own = any("barrier" in line for line in lines[ticket - 3 : ticket])
        names = self.instructions
        ticket = next(i for i, name in enumerate(names) if name.startswith(("ATOM", "global_atomic")))
        barrier, load = ("BAR", "LDG") if self.nvidia else ("s_barrier", "global_load")
        last = max((i for i, name in enumerate(names[:ticket]) if name.startswith(barrier)), default=0)
        return own and last > 0 and not any(name.startswith(load) for name in names[last:ticket])


_LETTERS = {"load": "L", "store": "S", "convert_layout": "c", "reduce": "r", "barrier": "|"}
_OPERATION = re.compile(
    r"\b(?:tt|ttg|gpu|amdg|amdgpu)\.(?:buffer_)?(load|store|convert_layout|reduce|barrier|local_\w+)\b(?!\.)"
)


def _letters(line: str, tile: int) -> str:
    """One line of Triton's code, for `Compiled.order`."""
    line = re.sub(r"\{[^{}]*\}|loc\(.*", "", line)
    found = _OPERATION.search(line)
    own = found and (found[1] not in ("load", "store") or f"tensor<{tile}x" in line)
    braces = "".join("(" if c == "{" else ")" for c in line if c in "{}")
    return (_LETTERS.get(found[1], "m") if own else "") + braces


_ALIGNED = [["tt.divisibility", 16]]
_TUPLES = {
    "tables": arguments.Tables("*i64", "*i64", "*i32", "*fp64", "*i64"),
    "counters": arguments.Counters("*i64", "*i64", "*fp32", "*i32"),
    "norms": arguments.Norms("*fp64", "*i32", "*fp64", "*fp64"),
    "projection": arguments.Projection("*i64", "*i32", "*fp64"),
    "amp": arguments.Amp("*fp32", "*fp32", "*fp32"),
}
_STATES = {"sgd": 1, "lars": 1, "adam": 2, "adamp": 2, "lamb": 2}
_MODULES = {
    "update": update_pass,
    "norm": norm_pass,
    "reduce": norm_pass,
    "sums": projection_pass,
    "factors": projection_pass,
}


def compile_kernel(
    target: str, kernel: str = "update", rule: str = "sgd", param: str = "fp32", grad: str | None = None, *,
    states: int | None = None, master: bool = False, clips: bool = False, clipped: bool = False, skips: bool = False,
    scaled: bool = False, carry: bool = False, last: bool = True, updates: bool | None = None, gradients: bool = True,
    tile: int = 1024,
) -> Compiled:  # fmt: skip
    """A kernel as `launch` would have it compiled for one (parameter dtype, gradient dtype)."""
    compute = "fp64" if param == "fp64" else "fp32"
    device_rule = launch.RULES[rule]
    states = _STATES[rule] if states is None else states
    updates = device_rule.divisor is not None if updates is None else updates
    constants = {
        "PREPARE": device_rule.prepare, "ADVANCE": device_rule.advance, "DIRECTION": device_rule.direction,
        "DIVISOR": device_rule.divisor if updates else None, "STORE": device_rule.two_stage,
        "MOMENTS_DONE": device_rule.two_stage, "GRADIENTS": gradients, "CLIPPED": clipped,
        "GLOBAL": clips or skips, "SKIP": skips, "LAST": last, "COUNTS_STEP": True,
        "PARAM": _TYPES[param], "GRAD": _TYPES[grad or param],
        "COMPUTE": _TYPES[compute], "BLOCK": tile,
        "ROWS": tuning.piece_shape(tile)[0], "COLUMNS": tuning.piece_shape(tile)[1],
        "KIND": 0,
    }  # fmt: skip
    absent = {
        "turn": not carry,
        "torch_steps": rule in ("sgd", "lars"),
        "master": not master,
        "grad_scale": not scaled,
        "found_inf": not scaled,
        **dict.fromkeys(("rows", "pieces", "sums"), not device_rule.projects),
    }
    absent |= {name: i >= states for i, name in enumerate("abc")}
    state = f"*{compute}"
    tuples = _TUPLES | {"states": arguments.States(state, state, state, "*fp32")}
    function = getattr(_MODULES[kernel], f"{kernel}_kernel")
    signature, values, aligned = dict[str, Any](), dict[tuple[int, ...], Any](), dict[tuple[int, ...], Any]()
    for i, name in enumerate(p.name for p in function.params):
        if name in tuples:
            kinds = {x: "constexpr" if absent.get(x) else kind for x, kind in tuples[name]._asdict().items()}
            signature[name] = type(tuples[name])(**kinds)
            for k, kind in enumerate(kinds.values()):
                (values if kind == "constexpr" else aligned)[i, k] = None if kind == "constexpr" else _ALIGNED
        elif name in constants:
            signature[name], values[i,] = "constexpr", constants[name]
        elif name == "result":
            signature[name], aligned[i,] = "*fp64", _ALIGNED
        else:
            signature[name] = "i32"
    param_dtype = next(dtype for dtype, kind in tuning.TRITON_TYPES.items() if kind == _TYPES[param])
    used = states + device_rule.projects if kernel == "update" else 0
    options = tuning.options(param_dtype, used, amd=target.startswith("gfx"))
    source = ASTSource(function, signature=signature, constexprs=values, attrs=aligned)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    ttgir = compiled.asm["ttgir"]
    return _amd(ttgir, compiled.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(ttgir, compiled.asm["cubin"])


def _nvidia(ttgir: str, cubin: bytes) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([_NVIDIA, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Compiled(True, ttgir, instructions, registers, stack + local)


def _amd(ttgir: str, assembly: str) -> Compiled:
    instructions = re.findall(r"^\s+([a-z]\w+)\s", assembly, re.MULTILINE)
    registers, stack = (
        int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return Compiled(False, ttgir, instructions, registers, stack)
