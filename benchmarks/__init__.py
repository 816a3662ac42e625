"""Benchmarks of the optimizers' steps; see README.md beside this file."""
