"""The optimizer classes, their options and their state dicts."""
