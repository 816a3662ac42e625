"""The command line: `fused-legw plan`, `verify`, `info` and `demo`."""
