"""Splits a model's parameters into param groups: biases and normalisation parameters go apart."""

from __future__ import annotations

from collections.abc import Iterable, Set
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..checks import number
from ..torch_private import NormBase

# NormBase is the base of every BatchNorm and InstanceNorm, lazy and synchronised ones included.
NORMALISATIONS = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
DECAYED, PLAIN, NOT_ADAPTED, LEFT_OUT = "decayed", "plain", "not adapted", "left out"
MARK = "_no_weight_decay"  # the attribute by which Mamba and others mark parameters
_MEANINGS = {PLAIN: "plain (no decay, no adaptation)", NOT_ADAPTED: "not adapted (decayed)"}
_WILDCARDS = frozenset("*?[")


class Placement(NamedTuple):
    """Where one parameter went, and why."""

    name: str
    shape: tuple[int, ...]
    kind: str  # "decayed", "plain" (no decay, no adaptation), "not adapted" (but decayed) or "left out"
    reason: str


class ParamGroups(list[dict[str, Any]]):
    """A list of param groups that prints as a table of its `placements`. They do not follow changes of the list."""

    placements: tuple[Placement, ...] = ()  # one per parameter
    passed_over: tuple[str, ...] = ()  # the names given that no parameter has, such as "no_decay 'dist_token'"

    def __repr__(self) -> str:
        names = max((len(placement.name) for placement in self.placements), default=0)
        shapes = max((len(str(placement.shape)) for placement in self.placements), default=0)
        lines = list[str]()
        for kind in (DECAYED, PLAIN, NOT_ADAPTED, LEFT_OUT):
            chosen = [placement for placement in self.placements if placement.kind == kind]
            if chosen:
                lines.append(f"{_MEANINGS.get(kind, kind)}: {len(chosen)} tensor{'s' if len(chosen) > 1 else ''}")
                lines += [f"  {name:{names}}  {shape!s:{shapes}}  {reason}" for name, shape, _, reason in chosen]
        if self.passed_over:
            lines.append(f"passed over: {len(self.passed_over)} name{'s' if len(self.passed_over) > 1 else ''}")
            lines += [f"  {name}" for name in self.passed_over]
        return "\n".join(lines)


class _Owned(NamedTuple):
    """A parameter and the modules that hold it."""

    param: nn.Parameter
    names: list[str]  # several if the parameter is tied
    owners: list[nn.Module]  # the module behind each name


def _owned_parameters(module: nn.Module) -> list[_Owned]:
    """The module's parameters, in the order of `module.named_parameters()`."""
    found: dict[nn.Parameter, _Owned] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for leaf, p in owner.named_parameters(recurse=False, remove_duplicate=False):
            owned = found.setdefault(p, _Owned(p, [], []))
            owned.names.append(f"{prefix}.{leaf}" if prefix else leaf)
            owned.owners.append(owner)
    return list(found.values())


class _Matches(NamedTuple):
    """What the patterns of one argument match."""

    reasons: dict[nn.Parameter, str]  # the parameters that a pattern matches, each with the first such pattern
    missing: list[str]  # names that no parameter has


def _by_pattern(argument: str, patterns: str | Iterable[str], parameters: list[_Owned]) -> _Matches:
    """The parameters that match. Raises for a pattern with a wildcard that matches none; a mere name may be missing."""
    found = _Matches({}, [])
    given = (patterns,) if isinstance(patterns, str) else patterns
    for pattern in sorted(given) if isinstance(given, Set) else given:  # a set's order differs from run to run
        reason = f"{argument} {pattern!r}"
        matched = [p for p, names, _ in parameters if any(n == pattern or fnmatchcase(n, pattern) for n in names)]
        if not matched:
            if _WILDCARDS.intersection(pattern):
                raise ValueError(f"{argument}: the pattern {pattern!r} matches no parameter")
            found.missing.append(reason)
        for p in matched:
            found.reasons.setdefault(p, reason)
    return found


def _by_default(owned: _Owned, decay_embeddings: bool, exclude_singleton: bool) -> tuple[str, str]:
    """(kind, reason) of a parameter that matches neither `decay` nor `no_decay`."""
    if getattr(owned.param, MARK, False):
        return PLAIN, MARK
    apart = NORMALISATIONS if decay_embeddings else (*NORMALISATIONS, *EMBEDDINGS)
    for name, owner in zip(owned.names, owned.owners, strict=True):
        if isinstance(owner, apart):
            return PLAIN, type(owner).__name__
        # Also bias_hh_l0, in_proj_bias and relative_position_bias_table. An embedding's own leaf is "weight", so there
        # any part counts: a table of biases is T5's relative_attention_bias.weight.
        said = name.replace(".", "_") if isinstance(owner, EMBEDDINGS) else name.rpartition(".")[2]
        if "bias" in said.split("_"):
            return PLAIN, "bias"
    ndim, long = owned.param.ndim, sum(size > 1 for size in owned.param.shape)
    if ndim > 1 and long <= 1 and exclude_singleton:
        return PLAIN, f"exclude_singleton, ndim {ndim}"
    return PLAIN if ndim <= 1 else DECAYED, f"ndim {ndim}"


def _check(module: nn.Module, parameters: list[_Owned]) -> None:
    if not parameters:
        raise ValueError(f"module has no parameters: {type(module).__name__}")
    for p, names, _ in parameters:
        if isinstance(p, UninitializedParameter):
            raise ValueError(f"{names[0]} is uninitialized: run a forward pass before making param groups")


def param_groups(
    module: nn.Module,
    weight_decay: float | None = None,
    *,
    decay: str | Iterable[str] = (),
    no_decay: str | Iterable[str] = (),
    no_adapt: str | Iterable[str] = (),
    decay_embeddings: bool = True,
    keep_frozen: bool = True,
    exclude_singleton: bool = False,
) -> ParamGroups:
    """Split a module's parameters into two groups: decayed, and plain with `weight_decay=0.0` and `adapt=False`.

    Plain are the parameters of torch.nn's normalisation layers; biases, whose names have the word "bias" in the last
    part, or for an embedding in any part; those that a model marks with `_no_weight_decay = True`; and all other
    parameters of at most one dimension. LARS and LAMB give them trust ratio 1, as do You et al. 2017 and the MLPerf
    rules. Every torch optimizer takes the groups.

    Gains of shape (C, 1, 1, 1) or (1, 1, C) are decayed, as in timm, unless exclude_singleton is True.

    Args:
        module: the model. A tied parameter goes in once, under its first name; it is plain if any of its names makes
            it so.
        weight_decay: weight decay of the decayed group; None for the optimizer's.
        decay, no_decay: names, or patterns such as `"*.pos_embed"`, matched against whole names as by `fnmatch`. They
            override the rules above. Parameters matched by no_decay are plain. A name that no parameter has is passed
            over, and printed: timm's `model.no_weight_decay()` gives such names.
        no_adapt: names and patterns of parameters that get trust ratio 1 and keep their weight decay. The decayed ones
            among them are a third group, with `adapt=False`.
        decay_embeddings: False makes the parameters of Embedding and EmbeddingBag plain.
        keep_frozen: True: parameters with requires_grad=False go in too, and train once they are thawed. False leaves
            them out.
        exclude_singleton: True makes plain all that has at most one dimension above 1. That includes class tokens, and
            the weight of a Linear with one output.

    Returns:
        A list of param groups with names. It prints as a table of where each parameter went and why.

    Raises:
        ValueError: a pattern with a `*`, `?` or `[` matches nothing; decay and no_decay match the same parameter;
            weight_decay is negative; a parameter is uninitialized; the module has no parameters.
        TypeError: module is not a torch.nn.Module.

    >>> from torch import nn
    >>> from fused_legw import SGD
    >>> from fused_legw import param_groups
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> groups = param_groups(model, weight_decay=1e-4)
    >>> groups
    decayed: 2 tensors
      0.weight  (8, 3, 3, 3)  ndim 4
      3.weight  (2, 8)        ndim 2
    plain (no decay, no adaptation): 4 tensors
      0.bias    (8,)          bias
      1.weight  (8,)          BatchNorm2d
      1.bias    (8,)          BatchNorm2d
      3.bias    (2,)          bias
    >>> optimizer = SGD(groups, lr=0.1, momentum=0.9)
    >>> [group["weight_decay"] for group in optimizer.param_groups]
    [0.0001, 0.0]
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    parameters = _owned_parameters(module)
    decays = {} if weight_decay is None else dict(weight_decay=number("weight_decay", weight_decay, zero=True))
    _check(module, parameters)
    decayed, plain, unadapted = (
        _by_pattern(argument, patterns, parameters)
        for argument, patterns in (("decay", decay), ("no_decay", no_decay), ("no_adapt", no_adapt))
    )
    groups: dict[str, dict[str, Any]] = {
        DECAYED: dict(params=[], **decays),
        PLAIN: dict(params=[], weight_decay=0.0, adapt=False),
        NOT_ADAPTED: dict(params=[], **decays, adapt=False),
        LEFT_OUT: dict(params=[]),
    }
    placements = []
    for owned in parameters:
        p, name = owned.param, owned.names[0]
        if p in decayed.reasons and p in plain.reasons:
            raise ValueError(f"{name} is matched by both {decayed.reasons[p]} and {plain.reasons[p]}")
        if not p.requires_grad and not keep_frozen:
            kind, reason = LEFT_OUT, "requires_grad=False"
        elif p in decayed.reasons or p in plain.reasons:
            kind, reason = (DECAYED, decayed.reasons[p]) if p in decayed.reasons else (PLAIN, plain.reasons[p])
        else:
            kind, reason = _by_default(owned, decay_embeddings, exclude_singleton)
        if kind == DECAYED and p in unadapted.reasons:
            kind, reason = NOT_ADAPTED, f"{reason}, {unadapted.reasons[p]}"
        groups[kind]["params"].append((name, p))
        placements.append(Placement(name, tuple(p.shape), kind, reason))
    result = ParamGroups(groups[kind] for kind in (DECAYED, PLAIN, NOT_ADAPTED) if groups[kind]["params"])
    result.placements = tuple(placements)
    result.passed_over = (*decayed.missing, *plain.missing, *unadapted.missing)
    return result
