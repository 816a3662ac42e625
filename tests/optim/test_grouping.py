"""param_groups: what is decayed and adapted, what is not, and that it says so."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from fused_legw import SGD
from fused_legw.optim.grouping import ParamGroups, param_groups


class MyNorm(nn.LayerNorm):
    pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.norm = MyNorm((5, 8))
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.rnn = nn.LSTM(8, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embed.weight


def plain(groups: ParamGroups) -> set[str]:
    return {placement.name for placement in groups.placements if placement.kind == "plain"}


def test_what_goes_where():
    model = Block()
    groups = param_groups(model, weight_decay=0.1)
    decayed = {"embed.weight", "pos_embed", "attention.in_proj_weight", "attention.out_proj.weight"}
    decayed |= {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    assert {name for name, _ in groups[0]["params"]} == decayed
    assert [name for name, _ in groups[1]["params"]] == [n for n, _ in model.named_parameters() if n not in decayed]
    assert groups[0].keys() == {"params", "weight_decay"} and groups[0]["weight_decay"] == 0.1
    assert groups[1]["weight_decay"] == 0.0 and groups[1]["adapt"] is False
    assert all(p is dict(model.named_parameters())[name] for group in groups for name, p in group["params"])


def _norms() -> list[nn.Module]:
    """Every class of torch.nn whose name speaks of normalisation and that can have parameters."""
    made = []
    for name, cls in inspect.getmembers(nn, inspect.isclass):
        if "Norm" in name and not name.startswith(("Lazy", "LocalResponse")):
            affine = {"affine": True} if "affine" in inspect.signature(cls).parameters else {}
            made.append(cls(4, 4) if cls is nn.GroupNorm else cls((4, 4) if "element" in str(cls) else 4, **affine))
    return made


@pytest.mark.parametrize("norm", [*_norms(), nn.LayerNorm((2, 3)), nn.RMSNorm((2, 3)), MyNorm((2, 3))], ids=str)
def test_every_normalisation_layer_of_torch_is_plain(norm):
    groups = param_groups(nn.Sequential(norm), weight_decay=0.1)
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0
    assert {placement.reason for placement in groups.placements} <= {type(norm).__name__}
    assert len(groups.placements) == len(list(norm.parameters())) > 0


def test_patterns_come_first():
    model = Block()
    usual = plain(param_groups(model))
    groups = param_groups(model, decay=["norm.*"], no_decay=("pos_*", "*.out_proj.weight"))
    assert plain(groups) == usual - {"norm.weight", "norm.bias"} | {"pos_embed", "attention.out_proj.weight"}
    reasons = {placement.name: placement.reason for placement in groups.placements}
    assert reasons["pos_embed"] == "no_decay 'pos_*'" and reasons["norm.bias"] == "decay 'norm.*'"
    assert "weight_decay" not in groups[0], "the optimizer's own"


def test_a_string_is_one_pattern():
    assert plain(param_groups(Block(), no_decay="pos_*")) == plain(param_groups(Block())) | {"pos_embed"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(decay=["*.pos_embed"]), r"^decay: the pattern '\*\.pos_embed' matches no parameter"),
        (dict(no_decay=["pos_embed", "POS_EMBED"]), "^no_decay: the pattern 'POS_EMBED' matches no parameter"),
        (dict(decay=["pos*"], no_decay=["*embed"]), r"^pos_embed is matched by both decay 'pos\*' and no_decay '\*em"),
        (dict(weight_decay=-1), "weight_decay must be a finite number, zero or more, got -1"),
        (dict(weight_decay=float("nan")), "weight_decay must be a finite number, zero or more, got nan"),
        (dict(weight_decay="*.bias"), r"weight_decay must be a finite number, zero or more, got '\*\.bias'"),
        (dict(module=nn.ReLU()), "module has no parameters: ReLU"),
        (dict(module=nn.Sequential(nn.LazyLinear(3))), "0.weight is uninitialized: run a forward pass"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        param_groups(**dict(module=Block()) | options)


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got generator"):
        param_groups(Block().parameters())


def test_tied_parameters_go_in_once_and_are_known_by_every_name():
    model = Block()
    names = [placement.name for placement in param_groups(model).placements]
    assert names == [name for name, _ in model.named_parameters()] and "head.weight" not in names
    assert "embed.weight" in plain(param_groups(model, no_decay=["head.weight"]))


def test_tied_modules_and_both_kinds_of_owner():
    model = nn.Module()
    model.head = nn.Linear(8, 11)
    model.embed = nn.Embedding(11, 8)
    model.embed.weight = model.head.weight
    model.again = model.embed
    assert plain(param_groups(model)) == {"head.bias"}
    groups = param_groups(model, decay_embeddings=False)
    assert plain(groups) == {"head.weight", "head.bias"}
    assert [placement.reason for placement in groups.placements] == ["Embedding", "bias"]
    assert len(groups) == 1, "no empty group"


def test_frozen_parameters():
    model = Block()
    model.embed.weight.requires_grad_(False)
    assert len(param_groups(model).placements) == len(list(model.parameters()))
    kept = param_groups(model)[0]["params"]
    left = param_groups(model, keep_frozen=False)
    assert [name for name, _ in left[0]["params"]] == [name for name, _ in kept if name != "embed.weight"]
    assert left.placements[[p.name for p in left.placements].index("embed.weight")].kind == "left out"
    assert str(left).splitlines()[-2:] == [
        "left out: 1 tensor",
        "  embed.weight               (11, 8)    requires_grad=False",
    ]


@pytest.mark.parametrize("cls", [SGD, torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_take_the_groups(cls):
    model = Block()
    groups = param_groups(model, weight_decay=0.5)
    table = str(groups)
    optimizer = cls(groups, lr=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {n for (n, p), q in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, q)}
    assert moved == {"embed.weight", "attention.in_proj_weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"} | {
        "attention.out_proj.weight"
    }, "zero gradients: only decay moves anything (pos_embed is zero)"
    optimizer.load_state_dict(optimizer.state_dict())
    assert str(groups) == table, "what the optimizer made of the groups does not show"


def test_copies_keep_the_table():
    groups = param_groups(Block())
    for other in (copy.copy(groups), copy.deepcopy(groups), pickle.loads(pickle.dumps(groups))):
        assert isinstance(other, ParamGroups) and other.placements == groups.placements
        assert repr(other) == str(groups) and len(other) == 2
