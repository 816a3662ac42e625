"""The package as a whole: imports run one way, it works without triton, and the wheel holds what it should."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A file directly in `fused_legw` is a room, each package in it is one, and `legw_kernels` is one. A room imports only
# rooms of lines above its own. Every import counts, inside functions and under TYPE_CHECKING too.
ROOMS = (
    {"legw_kernels", "checks", "capture", "torch_private"},
    {"variants", "schedules"},
    {"spec", "reference"},
    {"buffers"},
    {"backends"},
    {"optim"},
    {"training", "verification", "demo"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
PACKAGES = "schedules", "buffers", "backends", "optim", "training", "verification", "cli", "demo"
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def module_of(path: Path) -> str:
    """The dotted name of a source file; of a package's `__init__.py` the package's."""
    base = ROOT / "kernels" if "legw_kernels" in path.parts else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for top in ("fused_legw", "kernels/legw_kernels") for path in (ROOT / top).rglob("*.py")}


def imports(module: str) -> set[str]:
    """The modules that a module names in its import statements: files of ours by their whole names, others as given."""
    path, found = FILES[module], set[str]()
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in names}
    return found


OWN = {module: {name for name in imports(module) if name in FILES} for module in FILES}


def room(module: str) -> str:
    top, *rest = module.split(".")
    return "legw_kernels" if top == "legw_kernels" else rest[0] if rest else "__init__"


def test_every_file_is_in_a_room_and_few_lie_outside_of_packages():
    assert {room(module) for module in FILES} == set(LEVEL)
    assert {path.parent.name for path in (ROOT / "fused_legw").glob("*/__init__.py")} == set(PACKAGES)
    assert len([*(ROOT / "fused_legw").glob("*.py")]) <= 10
    assert len([*(ROOT / "tests").glob("*.py")]) <= 3


def test_rooms_import_one_way():
    upward = [
        f"{module} imports {name}"
        for module, names in OWN.items()
        for name in names
        if room(name) != room(module) and LEVEL[room(name)] >= LEVEL[room(module)]
    ]
    assert upward == []
    assert len(ROOMS) <= 10  # so no chain of rooms is longer


def test_no_circle_of_files():
    waiting = dict(OWN)
    while free := [module for module, names in waiting.items() if not names & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting, f"files that import each other: {sorted(waiting)}"


def test_the_kernels_import_nothing_of_the_package():
    for module in FILES:
        if room(module) == "legw_kernels":
            foreign = {name.split(".")[0] for name in imports(module)} - {"legw_kernels", "torch", "triton"}
            assert foreign <= sys.stdlib_module_names, f"{module} imports {foreign}"


def test_each_package_says_in_one_line_what_it_is_for():
    for name in PACKAGES:
        text = (ROOT / "fused_legw" / name / "__init__.py").read_text()
        assert len(text.splitlines()) == 1 and text.startswith('"""') and text.endswith('."""\n'), name


def test_no_file_is_too_long_to_read_in_one_sitting():
    long = {
        str(path.relative_to(ROOT)): n for path in FILES.values() if (n := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_the_reference_shares_only_the_scalar_formulas():
    """Neither flat buffers nor launches, so that a packing bug cannot hide in it."""
    assert OWN["fused_legw.reference"] == {"fused_legw.schedules.base", "fused_legw.variants"}
    assert OWN["fused_legw.schedules.base"] == {"legw_kernels.formulas", "fused_legw.checks"}
    assert OWN["fused_legw.variants"] == {"fused_legw.checks"} and not OWN["fused_legw.checks"]


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
    assert {"fused_legw/py.typed", "legw_kernels/py.typed", "legw_kernels/update_pass.py"} <= set(names)
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0] for line in required) == ["numpy", "torch", "triton"]
