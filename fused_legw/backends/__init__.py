"""How one step runs, on Triton or on ATen."""
