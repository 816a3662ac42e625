"""What stands around a step: AMP, schedulers, the gradient noise scale."""
