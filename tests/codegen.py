"""Ahead-of-time compilation of the step kernel, and what the compiled code shows."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from legw_kernels import launch, skeleton

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

    ttgir: str  # Triton's own intermediate code, before its compiler adds barriers of its own
    instructions: list[str]
    registers: int
    stack: int  # bytes a thread spills or keeps in local memory

    def count(self, *prefixes: str) -> Counter[str]:
        return Counter(i for i in self.instructions if i.startswith(prefixes))


def compile_step(
    target: str, param: str = "fp32", grad: str | None = None, *, state: bool = True, master: bool = False,
    advance: bool = True, tile: int = 1024, rule: str = "sgd",
) -> Compiled:  # fmt: skip
    """The step kernel as `launch.step` would have it compiled."""
    compute = "fp64" if param == "fp64" else "fp32"
    signature = {
        "segments": "*i64", "tiles": "*i32", "groups": "*fp64", "milestones": "*i64", "counts": "*i64", "steps": "*i64",
        "ticket": "*i32", "state": f"*{compute}" if state else "constexpr",
        "master": "*fp32" if master else "constexpr", "n_tiles": "i32", "n_segments": "i32",
        "RULE": "constexpr", "PARAM": "constexpr", "GRAD": "constexpr", "COMPUTE": "constexpr", "ADVANCE": "constexpr",
        "BLOCK": "constexpr",
    }  # fmt: skip
    constants = {
        "RULE": launch.RULES[rule], "PARAM": _TYPES[param], "GRAD": _TYPES[grad or param], "COMPUTE": _TYPES[compute],
        "ADVANCE": advance, "BLOCK": tile,
    }  # fmt: skip
    constants |= {name: None for name, used in (("state", state), ("master", master)) if not used}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    param_dtype = next(dtype for dtype, kind in launch.DTYPES.items() if kind == _TYPES[param])
    options = launch.options(param_dtype, amd=target.startswith("gfx"))
    source = ASTSource(skeleton.step_kernel, signature=signature, constexprs=constants, attrs=aligned)
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
    return Compiled(ttgir, instructions, registers, stack + local)


def _amd(ttgir: str, assembly: str) -> Compiled:
    instructions = re.findall(r"^\s+([a-z]\w+)\s", assembly, re.MULTILINE)
    registers, stack = (
        int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return Compiled(ttgir, instructions, registers, stack)
