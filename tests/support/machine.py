"""What this process runs tests on."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
HAS_TRITON = INTERPRETED or DEVICE == "cuda"
OTHER_GRAD_DTYPES = hasattr(torch.Tensor, "grad_dtype")  # torch 2.10 and later; before, p.grad has p's dtype
needs_other_grad_dtypes = pytest.mark.skipif(not OTHER_GRAD_DTYPES, reason="needs Tensor.grad_dtype, of torch 2.10")
