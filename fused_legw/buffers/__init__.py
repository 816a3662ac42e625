"""Where tensors live: flat buffers of parameters and state, and the gradients of a step."""
