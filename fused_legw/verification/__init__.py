"""Checks of the fused optimizers against float64 references."""
