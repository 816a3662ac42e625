"""Flat buffers of parameters and state, and the gradients of a step."""
