"""Fused optimizers held against their float64 references."""
