"""The learning rate of update t."""
