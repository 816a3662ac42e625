"""How the kernels are compiled and cut up: dtypes, warps, registers, the shares of a program."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

CHUNKS_OF_A_RUN = 16
TILES_OF_A_SPAN, MOST_SPANS = 32, 64
TRITON_TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def registers(param_dtype: torch.dtype, states: int) -> int:
    """The register limit: what the largest variant takes without spilling.

    states: of the rule, as far as updated, and one for a projection.
    """
    if param_dtype == torch.float64:
        return 255
    return 168 if states > 2 else 128


def warps(param_dtype: torch.dtype) -> int:
    """So that a thread has 8 elements, 4 in float64."""
    return 8 if param_dtype == torch.float64 else 4


def compute_type(param_dtype: torch.dtype) -> Any:
    """The dtype of arithmetic and state."""
    return tl.float64 if param_dtype == torch.float64 else tl.float32


def options(param_dtype: torch.dtype, states: int = 0, *, amd: bool = torch.version.hip is not None) -> dict[str, Any]:
    """Compiler options.

    Fusing a * b + c into one rounding would save nothing in a kernel that waits for memory, and would make its bits
    depend on the target; Triton's default for it differs between versions. Told of a register limit, ptxas does not
    spill in order to stay below some smaller number.
    """
    limit = {} if amd else {"maxnreg": registers(param_dtype, states)}
    return {"num_warps": warps(param_dtype), "enable_fp_fusion": False, **limit}


def piece_shape(tile: int) -> tuple[int, int]:
    """The rows and columns that a tile of the row sums has. Half as many elements: it sums four things at once."""
    columns: int = 1 << tile.bit_length() // 2
    return tile // 2 // columns, columns
