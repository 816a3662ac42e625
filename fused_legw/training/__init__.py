"""Around a step: AMP, scheduler objects, the gradient noise scale."""
