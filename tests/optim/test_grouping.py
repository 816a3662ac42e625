"""param_groups: what is decayed and adapted, what is not, and that it says so."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fused_legw import LARS, SGD
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


def test_weight_decay_of_numpy_is_pythons():
    groups = param_groups(Block(), np.float32(0.5), no_adapt="pos_embed")
    assert [(type(group["weight_decay"]), group["weight_decay"]) for group in groups] == [
        (float, 0.5),
        (float, 0.0),
        (float, 0.5),
    ]


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
        (dict(no_decay=["pos_embed", "POS_?MBED"]), r"^no_decay: the pattern 'POS_\?MBED' matches no parameter"),
        (dict(no_adapt="[x]"), r"^no_adapt: the pattern '\[x\]' matches no parameter"),
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


class Blank(nn.Module):
    """Modules and parameters by name, dots in between."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


@pytest.mark.parametrize("argument", ["decay", "no_decay", "no_adapt"])
def test_a_name_that_no_parameter_has_is_passed_over_and_printed(argument):
    """timm's `model.no_weight_decay()` is such a set: names of parameters that only some of its models have."""
    groups = param_groups(Block(), **{argument: {"pos_embed", "dist_token", "cls_token"}})
    usual, kind = plain(param_groups(Block())), dict(decay="decayed", no_decay="plain", no_adapt="not adapted")
    assert plain(groups) == (usual | {"pos_embed"} if argument == "no_decay" else usual)
    assert {placement.kind for placement in groups.placements if placement.name == "pos_embed"} == {kind[argument]}
    assert groups.passed_over == (f"{argument} 'cls_token'", f"{argument} 'dist_token'")
    assert str(groups).splitlines()[-3:] == [
        "passed over: 2 names",
        f"  {argument} 'cls_token'",
        f"  {argument} 'dist_token'",
    ]
    for other in (copy.copy(groups), copy.deepcopy(groups), pickle.loads(pickle.dumps(groups))):
        assert repr(other) == str(groups)
    assert "passed over" not in str(param_groups(Block(), **{argument: "pos_embed"}))


def test_a_name_with_a_wildcards_character_is_itself_too():
    model = nn.ModuleDict({"layers[0]": nn.Linear(2, 3)})
    assert plain(param_groups(model, no_decay="layers[0].weight")) == {"layers[0].weight", "layers[0].bias"}


def test_a_table_of_biases_is_plain_by_any_word_of_its_name():
    """T5's relative_attention_bias is an embedding, whose last part is "weight"."""
    layers = dict(relative_attention_bias=nn.Embedding(32, 8), debias=nn.Embedding(9, 8), wo=nn.Linear(8, 8))
    model = Blank(bias_bag=Blank(table=nn.EmbeddingBag(5, 8)), bias_net=nn.Linear(8, 8, bias=False), t5=Blank(**layers))
    model.biased = nn.Embedding(3, 8)
    biases = {"bias_bag.table.weight", "t5.relative_attention_bias.weight", "t5.wo.bias"}
    groups = param_groups(model)
    assert plain(groups) == biases
    assert {placement.reason for placement in groups.placements if placement.name in biases} == {"bias"}
    assert plain(param_groups(model, decay="*_bias.weight")) == biases - {"t5.relative_attention_bias.weight"}


def test_what_the_model_marks_is_plain():
    """As Mamba does with A_log."""
    model = Blank(a_log=nn.Parameter(torch.ones(8, 4)), b=nn.Parameter(torch.ones(8, 4)), c=nn.Linear(4, 4, bias=False))
    model.a_log._no_weight_decay = model.c.weight._no_weight_decay = True
    model.b._no_weight_decay = False
    groups = param_groups(model, weight_decay=0.1)
    assert plain(groups) == {"a_log", "c.weight"}
    assert [placement.reason for placement in groups.placements] == ["_no_weight_decay", "ndim 2", "_no_weight_decay"]
    assert plain(param_groups(model, decay="a_log")) == {"c.weight"}, "patterns come first"


def test_gains_with_dimensions_of_size_1():
    """Decayed, as in timm, unless they are excluded."""
    shapes = dict(layer_scale=(5, 1, 1, 1), gain=(1, 1, 5), one=(1, 1), empty=(0, 1), point=(), vector=(5,))
    model = Blank(**{name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()})
    model.head, model.conv = nn.Linear(5, 1, bias=False), nn.Conv2d(5, 2, 1, bias=False)
    assert plain(param_groups(model)) == {"point", "vector"}
    groups = param_groups(model, exclude_singleton=True)
    assert plain(groups) == {*shapes, "head.weight"}
    assert {placement.name: placement.reason for placement in groups.placements} == {
        "layer_scale": "exclude_singleton, ndim 4",
        "gain": "exclude_singleton, ndim 3",
        "one": "exclude_singleton, ndim 2",
        "empty": "exclude_singleton, ndim 2",
        "point": "ndim 0",
        "vector": "ndim 1",
        "head.weight": "exclude_singleton, ndim 2",
        "conv.weight": "ndim 4",
    }
    assert plain(param_groups(model, exclude_singleton=True, decay="head.*")) == set(shapes)


@pytest.mark.parametrize("weight_decay", [None, 0.1])
def test_what_is_not_adapted_keeps_its_weight_decay_in_a_third_group(weight_decay):
    model = Block()
    usual = param_groups(model, weight_decay)
    groups = param_groups(model, weight_decay, no_adapt=["head.weight", "rnn.*", "pos_embed"], decay="pos_*")
    apart = ["pos_embed", "embed.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert [name for name, _ in groups[2]["params"]] == apart
    assert {name: value for name, value in groups[2].items() if name != "params"} == (
        dict(adapt=False) if weight_decay is None else dict(weight_decay=0.1, adapt=False)
    )
    assert [name for name, _ in groups[0]["params"]] == [n for n, _ in usual[0]["params"] if n not in apart]
    assert groups[1] == usual[1], "the LSTM's biases, which match too, have no weight decay to keep"
    reasons = {placement.name: placement.reason for placement in groups.placements}
    assert reasons["pos_embed"] == "decay 'pos_*', no_adapt 'pos_embed'"
    assert reasons["embed.weight"] == "ndim 2, no_adapt 'head.weight'"
    assert "not adapted (decayed): 4 tensors" in str(groups)


def test_no_adapt_beside_frozen_and_plain_parameters():
    model = Block()
    model.embed.weight.requires_grad_(False)
    groups = param_groups(model, no_adapt=["embed.weight", "pos_embed"], no_decay="pos_embed", keep_frozen=False)
    assert len(groups) == 2 and "pos_embed" in plain(groups)
    alone = param_groups(nn.Linear(3, 2, bias=False), no_adapt="weight")
    assert len(alone) == 1 and alone[0]["adapt"] is False and "weight_decay" not in alone[0]


def test_ratios_and_decay_of_what_is_not_adapted():
    """LARS with zero gradients: trust ratio 1, so that weight decay moves the weight by lr * weight_decay."""
    model = Blank(head=nn.Linear(4, 3, bias=False), body=nn.Linear(4, 3, bias=False))
    before = model.head.weight.detach().clone()
    groups = param_groups(model, weight_decay=0.1, no_adapt="head.*")
    optimizer = LARS(groups, lr=0.5, variant="simclr", trust_coefficient=0.001, momentum=0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    ratios = optimizer.trust_ratios()
    assert ratios[model.head.weight] == 1 and abs(float(ratios[model.body.weight]) - 0.01) < 1e-6
    torch.testing.assert_close(model.head.weight, before * (1 - 0.5 * 0.1))
