"""`fused-legw info`: prints versions, devices, and the backend of each device."""

from __future__ import annotations

import argparse
import importlib
import json
import platform

import torch

from .. import __version__
from ..backends import select


def run_info(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    devices = []
    for name in names:
        backend, why = select.explain_backend(torch.device(name))
        hardware = platform.processor() or platform.machine() if name == "cpu" else torch.cuda.get_device_name(name)
        devices.append({"device": name, "name": hardware, "backend": backend, "why": why})
    triton = importlib.import_module("triton").__version__ if select.has_triton() else None
    versions = {"fused-legw": __version__, "torch": torch.__version__, "triton": triton}
    versions["python"] = platform.python_version()
    if args.json:
        print(json.dumps({"versions": versions, "interpreter": select.interpreted(), "devices": devices}, indent=2))
        return 0
    for package, version in versions.items():
        print(f"{package:12}{version or 'absent'}")
    print(f"{'interpreter':12}{'on' if select.interpreted() else 'off'}")
    for d in devices:
        print(f"{d['device']:12}{d['backend']} ({d['why']}), {d['name']}")
    return 0
