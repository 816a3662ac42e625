"""Triton kernels of fused-legw. Imports the standard library, torch and triton; never fused_legw."""
