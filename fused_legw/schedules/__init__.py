"""Schedules: the learning rate of every update."""
