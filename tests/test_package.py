"""The package as a whole: imports run one way, it works without triton, and the wheel holds what it should."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each module and the modules of its own package it may import: none further down this list.
KERNELS = ["scalars", "rules", "norms", "tables", "tiles", "rows", "measure", "update", "launch"]
PACKAGE = [
    {"decays", "checks"},
    {"schedule", "variants", "table", "control", "look", "noise_scale"},
    {"autowu_path", "reference"},
    {"autowu"},
    {"rule"},
    {"flat"},
    {"aten_backend", "triton_backend"},
    {"backends"},
    {"layout"},
    {"checkpoint"},
    {"optimizer"},
    {"sgd", "adam", "follow", "amp", "grouping", "digits", "demo_results"},
    {"lars", "adamp", "lamb"},
    {"verification"},
    {"selfcheck", "demo"},
    {"__init__"},
    {"__main__"},
]


def _imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of each import at run time, one entry per name for `from . import name`."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.level, node.module))
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, alias.name) for alias in node.names]
    return found


def test_kernels_import_one_way_and_nothing_of_the_package():
    for path in (ROOT / "kernels/legw_kernels").glob("*.py"):
        allowed = KERNELS[: KERNELS.index(path.stem)] if path.stem in KERNELS else []
        for level, module in _imports(path):
            top = module.split(".")[0]
            if level:
                assert top in allowed, f"{path.name} imports {module}"
            else:
                assert top in sys.stdlib_module_names | {"torch", "triton"}, f"{path.name} imports {module}"


def test_the_package_imports_one_way():
    ranks = {name: rank for rank, names in enumerate(PACKAGE) for name in names}
    for path in (ROOT / "fused_legw").glob("*.py"):
        for level, module in _imports(path):
            if level and module.split(".")[0] in ranks:
                assert ranks[module.split(".")[0]] < ranks[path.stem], f"{path.name} imports {module}"


def test_the_reference_shares_only_the_scalar_formulas():
    """Neither flat buffers nor launches, so that a packing bug cannot hide in it."""
    own = [module for level, module in _imports(ROOT / "fused_legw/reference.py") if level or "legw" in module]
    assert sorted(own) == ["schedule", "variants"]
    own = [module for level, module in _imports(ROOT / "fused_legw/schedule.py") if level or "legw" in module]
    assert own == ["legw_kernels", "decays"]


def test_works_where_triton_is_absent():
    code = """
import sys
sys.modules["triton"] = None
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(lambda c, n, *a: None if n == "triton" else find(n, *a))
del sys.modules["triton"]
import torch
from fused_legw import LEGW, SGD
p = torch.zeros(3, requires_grad=True)
optimizer = SGD([p], lr=LEGW(0.1, 16, 0, batch_size=16, dataset_size=160), momentum=0.9)
p.grad = torch.ones(3)
optimizer.step()
assert optimizer.backend == "aten" and torch.allclose(p, torch.full((3,), -0.1)), p
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
try:
    SGD([p], backend="triton")
except ValueError as error:
    assert "triton is not installed" in str(error)
else:
    raise AssertionError
"""
    path = f"{ROOT}:{ROOT / 'kernels'}"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path, "TRITON_INTERPRET": "1"})


def test_no_package_of_the_name_kernels():
    """A top-level `kernels` would overwrite Hugging Face's package of that name."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_the_wheel(tmp_path):
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("fused_legw-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fused_legw", "legw_kernels"}
    assert {"fused_legw/py.typed", "legw_kernels/py.typed", "legw_kernels/update.py"} <= set(names)
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0] for line in required) == ["numpy", "torch", "triton"]
