"""`fused-legw verify`: checks the fused optimizers against the float64 reference on this machine."""

from __future__ import annotations

import argparse
import json

from ..backends import select
from ..verification import selfcheck
from .output import UsageError, table


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--steps", type=int, default=200, help="scheduled updates of each run (default: 200)")
    parser.add_argument("--backend", choices=sorted(select.BACKENDS), help="only this one (default: all there are)")
    parser.add_argument("--case", choices=selfcheck.CASES, nargs="+", help="only these (default: all)")
    parser.add_argument(
        "--dtype",
        choices=selfcheck.DTYPES,
        nargs="+",
        help="only these (default: all; in Triton's interpreter float32, and two more for the first case)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status: 1 if a check failed."""
    if args.steps < 1:
        raise UsageError(f"--steps must be a positive integer, got {args.steps}")
    if args.backend == "triton" and not select.has_triton():
        raise UsageError("--backend triton cannot run: triton is not installed")
    notes = list[str]()
    results = list(selfcheck.check(args.steps, notes, backend=args.backend, cases=args.case, dtypes=args.dtype))
    passed = all(result["passed"] for result in results)
    if args.json:
        print(json.dumps({"passed": passed, "notes": notes, "results": results}, indent=2))
        return int(not passed)
    rows = []
    for r in results:
        worst, where = r["worst"], r["device"] + (", interpreted" if r["interpreted"] else "")
        errors = f"{worst['error']:.1e}", f"{worst['tolerance']:.1e}", f"{r['lr_error']:.1e}"
        counted = f"{r['steps_applied']}/{r['steps']}"
        rows.append((r["case"], r["backend"], where, r["dtype"], counted, *errors, "ok" if r["passed"] else "FAILED"))
    print(table(("case", "backend", "device", "dtype", "steps", "error", "tolerance", "LR error", ""), rows))
    print(*notes, sep="\n", end="\n" if notes else "")
    print(f"{sum(r['passed'] for r in results)} of {len(results)} within tolerance of the float64 reference")
    return int(not passed)
