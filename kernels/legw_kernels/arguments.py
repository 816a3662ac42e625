"""What the kernels take: pointers by what they belong to; `tables` says what each table holds.

A kernel gets each of these whole, and hands it on to its functions. Who compiles a kernel ahead of time gives the same
tuples, of types. A field that is None is not there: branches on it are left out when a kernel is compiled. Sizes stay
arguments of their own, because `do_not_specialize` names no fields.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Tables(NamedTuple):
    segments: Any = None
    addresses: Any = None
    chunks: Any = None
    groups: Any = None
    milestones: Any = None


class Counters(NamedTuple):
    step_counts: Any = None
    tensor_steps: Any = None
    torch_steps: Any = None
    ticket: Any = None


class States(NamedTuple):
    a: Any = None  # the rule's states, in its order
    b: Any = None
    c: Any = None
    master: Any = None  # float32 masters of low-precision weights


class Norms(NamedTuple):
    partials: Any = None
    turn: Any = None
    totals: Any = None
    ratios: Any = None


class Projection(NamedTuple):
    rows: Any = None
    pieces: Any = None
    sums: Any = None


class Amp(NamedTuple):
    grad_scale: Any = None  # float32[1]: gradients are to be divided by it
    found_inf: Any = None  # float32[1]: 0, or the step is not applied
    nonfinite: Any = None  # float32[1]: written, whether the global norm was not finite
