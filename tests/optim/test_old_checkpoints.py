"""State dicts that an earlier version wrote load under `weights_only=True` and go on bit for bit."""

from __future__ import annotations

import pytest
import torch

import tests.support.old_state_dicts as old

WRITTEN = torch.load(old.FILE, weights_only=True)


def _tolerance() -> float:
    """Bits hold on the kind of CPU that wrote them; other vector instructions may round sums differently."""
    return 0.0 if torch.backends.cpu.get_cpu_capability() == WRITTEN["cpu"] else 1e-6


@pytest.mark.parametrize("case", old.CASES)
def test_an_old_state_dict_goes_on_bit_for_bit(case, backend, device):
    if device != "cpu":
        pytest.skip("written on a CPU")
    written = WRITTEN[f"{case} {backend}"]
    params, optimizer = old.fresh(case, backend)
    with torch.no_grad():
        for p, weight in zip(params, written["weights"], strict=True):
            p.copy_(weight)
    optimizer.load_state_dict(written["state_dict"])
    assert optimizer.steps_applied == old.BEFORE
    old.advance(params, optimizer, range(old.BEFORE, old.BEFORE + old.AFTER))
    tolerance = dict(rtol=_tolerance(), atol=_tolerance())
    torch.testing.assert_close([p.detach() for p in params], written["after"]["weights"], **tolerance)
    torch.testing.assert_close(optimizer.state_dict()["state"], written["after"]["state"], **tolerance)


def test_the_weights_do_move_after_loading():
    for name, written in WRITTEN.items():
        if name != "cpu":
            pairs = zip(written["weights"], written["after"]["weights"], strict=True)
            assert any(not torch.equal(a, b) for a, b in pairs), name
