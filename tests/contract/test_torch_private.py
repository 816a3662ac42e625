"""The private names of torch that the package uses are still there, and still mean what they meant."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch

from fused_legw import SGD, torch_private

ROOT = Path(__file__).resolve().parents[2]


def _private(path: Path) -> set[str]:
    """Private names of torch in a file: attributes of `torch...`, imports from it, and a few of its objects'."""
    known = {"_version", "_cdata", "_wrapped_by_lr_sched"}
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if node.attr in known or (isinstance(base, ast.Name) and base.id == "torch"):
                found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            found |= {part for part in parts if part.startswith("_")}
        elif isinstance(node, ast.Constant) and node.value in known:
            found.add(node.value)
    return found


def test_they_all_stand_in_one_file():
    for top in ("fused_legw", "kernels"):
        for path in (ROOT / top).rglob("*.py"):
            if path.name != "torch_private.py":
                assert _private(path) == set(), path
    assert {"_C", "_storage_Use_Count", "_NormBase", "_version"} <= _private(ROOT / "fused_legw/torch_private.py")


def test_storage_uses_counts_every_holder():
    tensor = torch.zeros(3)
    storage = tensor.untyped_storage()
    alone = torch_private.storage_uses(storage)
    view = tensor[1:]
    assert (alone, torch_private.storage_uses(storage)) == (2, 3)
    del view
    assert torch_private.storage_uses(storage) == 2


def test_tensor_guards_are_there_and_compare():
    assert torch_private.TensorGuards is not None
    seen = torch_private.TensorGuards(torch.ones(2, 3), dynamic_dims_sizes=None, dynamic_dims_strides=None)
    assert seen.check(torch.zeros(2, 3))
    assert not seen.check(torch.zeros(2, 3, dtype=torch.float64)) and not seen.check(torch.zeros(3, 2).t())


def test_version_grows_with_every_change():
    tensor = torch.zeros(3)
    before = torch_private.version(tensor)
    tensor.add_(1)
    assert torch_private.version(tensor) == before + 1


def test_a_backward_pass_inside_another_has_the_higher_number():
    from torch.utils.checkpoint import checkpoint

    inner, outer, seen = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True), []
    for w in inner, outer:
        w.register_hook(lambda _, w=w: seen.append((w is inner, torch_private.backward_pass())))
    for _ in range(2):
        checkpoint(lambda x: x * inner, outer * 2, use_reentrant=True).sum().backward()
    assert [which for which, _ in seen] == [True, False] * 2
    numbers = [number for _, number in seen]
    assert numbers[1] < numbers[0] < numbers[3] < numbers[2]


def test_a_scheduler_is_seen():
    p = torch.zeros(3, requires_grad=True)
    optimizer = SGD([p], lr=0.1)
    assert not torch_private.has_scheduler(optimizer.step)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert torch_private.has_scheduler(optimizer.step)


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, torch.nn.BatchNorm3d, torch.nn.InstanceNorm2d])
def test_norm_base_is_every_batch_norm(kind):
    assert issubclass(kind, torch_private.NormBase) and not issubclass(torch.nn.LayerNorm, torch_private.NormBase)


def test_lists_of_tensors_are_updated_as_one_by_one():
    xs, ys = [torch.ones(3), torch.ones(2, 2)], [torch.full((3,), 2.0), torch.full((2, 2), 4.0)]
    assert [x.tolist() for x in torch_private.foreach_add(xs, ys, alpha=2)] == [[5.0] * 3, [[9.0] * 2] * 2]
    torch_private.foreach_mul_(xs, 3.0)
    torch_private.foreach_addcmul_(xs, ys, ys, value=1.0)
    torch_private.foreach_div_(xs, 1.0)
    assert [x.flatten()[0].item() for x in torch_private.foreach_sqrt(xs)] == pytest.approx([7**0.5, 19**0.5])
    torch_private.foreach_add_(xs, ys, alpha=1.0)
    torch_private.foreach_copy_(ys, torch_private.foreach_mul(xs, 2.0))
    torch_private.foreach_zero_(xs)
    assert xs[0].tolist() == [0.0] * 3 and ys[0].tolist() == [18.0] * 3


@pytest.mark.parametrize("name", ["fused_sgd_", "fused_adam_", "fused_adamw_"])
def test_fused_steps_are_there(name):
    assert callable(getattr(torch_private, name))


def test_protocols_that_classes_of_ours_fill_in():
    scaler = inspect.getsource(torch.amp.GradScaler)
    assert "_check_inf_per_device(optimizer)" in scaler and "_per_optimizer_states" in scaler
    assert "self._scale = torch.full(" in scaler
    assert "_step_supports_amp_scaling" in scaler and "found_inf_per_device" in scaler
    scheduler = inspect.getsource(torch.optim.lr_scheduler.LRScheduler)
    assert "_step_count" in scheduler and "_last_lr" in scheduler
