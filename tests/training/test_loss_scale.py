"""Who divides gradients by AMP's scale, and scales by which nobody can."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor

import fused_legw
from fused_legw import LAMB, SGD, Adam, AdamW
from tests.support.cases import make_params, same, twins
from tests.support.scalers import TAKES_FUSED, family, make_scaler

COPIES = [
    lambda x: x,
    copy.deepcopy,
    lambda x: pickle.loads(pickle.dumps(x)),
    lambda x: x.load_state_dict(copy.deepcopy(x.state_dict())) or x,
]


@family
@pytest.mark.parametrize("copied", COPIES, ids=["made", "deepcopy", "pickle", "load_state_dict"])
@pytest.mark.parametrize("fused", [None, False, True])
def test_the_flag_is_torchs(device, cls, options, copied, fused):
    """True where the user passed fused=True: then torch's scaler hands over its scale, and Lightning does not clip."""
    told = dict(fused=fused) if cls in TAKES_FUSED else {}
    optimizer = copied(cls(make_params(torch.float32, device, [(3, 4)]), lr=0.1, **options, **told))
    assert optimizer._step_supports_amp_scaling is (cls in TAKES_FUSED and fused is True)
    if told:
        (p,) = make_params(torch.float32, device, [(3,)])
        theirs = getattr(torch.optim, cls.__name__)([p], lr=0.1, fused=fused)
        assert optimizer._step_supports_amp_scaling is getattr(theirs, "_step_supports_amp_scaling", False)


def test_our_scaler_sets_the_flag_for_its_own_call(device):
    (p,) = make_params(torch.float32, device, [(4,)])
    optimizer, scaler, seen = SGD([p], lr=0.1), make_scaler("ours", device), []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o._step_supports_amp_scaling))
    p.grad = torch.ones_like(p)
    scaler.step(optimizer)
    optimizer.step()
    fused_legw.GradScaler(device, enabled=False).step(optimizer)
    assert seen == [True, False, False] and not optimizer._step_supports_amp_scaling
    optimizer.register_step_post_hook(lambda *_: 1 / 0)
    scaler.update()
    with pytest.raises(ZeroDivisionError):
        scaler.step(optimizer)
    assert not optimizer._step_supports_amp_scaling


@pytest.mark.parametrize("fused", [False, True])
def test_torchs_scaler_writes_gradients_only_without_fused(backend, device, fused):
    """Both make the same weights."""
    (p,) = make_params(torch.float32, device, [(9,)])
    before = p.detach().clone()
    optimizer = SGD([p], lr=0.5, fused=fused, tile=16, backend=backend)
    scaler = make_scaler("torch's", device)
    p.grad = torch.full_like(p, 1024.0)
    scaler.step(optimizer)
    assert torch.equal(p.grad, torch.full_like(p, 1024.0 if fused else 1.0))
    same([p.detach()], [before - 0.5])
    assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()


@family
def test_clipping_as_lightning_does_under_bf16_mixed(device, cls, options):
    """There is no scaler there. Lightning refuses to clip for who unscales, and else clips before the step."""
    (p, q) = (make_params(torch.float32, device, [(3, 4)])[0] for _ in range(2))
    optimizer, other = (cls([x], lr=0.1, tile=16, **options) for x in (p, q))
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)  # lightning's _optimizer_handles_unscaling
    for x in p, q:
        x.grad = torch.full_like(x, 3.0)
    torch.nn.utils.clip_grad_norm_([p], 0.5)
    q.grad *= 0.5 / (float(q.grad.norm()) + 1e-6)
    optimizer.step()
    other.step()
    torch.testing.assert_close(p.detach(), q.detach())


@pytest.mark.peers
@pytest.mark.parametrize("cls", [SGD, AdamW, LAMB])
def test_lightning_clips_under_bf16_mixed(tmp_path, cls):
    lightning = pytest.importorskip("lightning")

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norms = torch.nn.Linear(4, 1), []

        def training_step(self, batch, _):
            return 100 * self.layer(batch[0]).square().mean()

        def configure_optimizers(self):
            return cls(self.parameters(), lr=0.1)

        def on_before_zero_grad(self, _):
            if self.layer.weight.grad is not None:
                self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])))

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 4)), batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Model()
        trainer = lightning.Trainer(
            accelerator="cpu", precision="bf16-mixed", gradient_clip_val=0.5, max_epochs=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, loader)
    assert trainer.optimizers[0].steps_applied == 4
    assert model.norms and max(model.norms) == pytest.approx(0.5, rel=1e-4)


# Scales that cannot be undone

UNUSABLE = [0.0, 1e-45, torch.inf, torch.nan]  # scales by which float32 cannot divide


@family
@pytest.mark.parametrize("scale", UNUSABLE)
@pytest.mark.parametrize("unscales", [False, True])
def test_a_scale_that_cannot_be_undone_skips_the_step(backend, device, cls, options, scale, unscales):
    """Losses times 0 have gradients of 0, which are finite; 0 / 0 is not."""
    params = make_params(torch.float32, device, [(4,), (2, 3)])
    optimizer, scaler = cls(params, lr=0.1, tile=16, backend=backend, **options), make_scaler("ours", device)
    _unusable_step(optimizer, scaler, params, scale, unscales)
    scaler.update(8.0)
    before = twins(params)
    _scaled_gradients(scaler, params)
    scaler.step(optimizer)
    assert optimizer.steps_applied == 2 and all((p != q).all() for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("cls", [SGD, Adam, AdamW])
@pytest.mark.parametrize("scale", UNUSABLE)
def test_under_torchs_scaler_too(backend, device, cls, scale):
    params = make_params(torch.float32, device, [(4,), (2, 3)])
    optimizer = cls(params, lr=0.1, fused=True, tile=16, backend=backend)
    _unusable_step(optimizer, make_scaler("torch's, fused", device), params, scale, unscales=False)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("scale", UNUSABLE)
def test_our_scaler_skips_other_optimizers_too(device, fused, unscales, scale):
    """torch's scaler steps here, and all weights are NaN."""
    (p,) = make_params(torch.float32, device, [(4,)])
    optimizer, scaler = torch.optim.Adam([p], lr=0.1, fused=fused), make_scaler("ours", device)
    before = p.detach().clone()
    scaler.update(scale)
    _scaled_gradients(scaler, [p])
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    same([p.detach()], [before])


def _scaled_gradients(scaler, params: list[Tensor]) -> None:
    for p in params:
        p.grad = None
    scaler.scale(sum((p * p).sum() for p in params)).backward()


def _unusable_step(optimizer, scaler, params: list[Tensor], scale: float, unscales: bool) -> None:
    """A good step, then one at that scale; nothing but the count of skipped steps may change in it."""
    _scaled_gradients(scaler, params)
    scaler.step(optimizer)
    scaler.update(scale)
    values, before = twins(params), copy.deepcopy(optimizer.state_dict())
    _scaled_gradients(scaler, params)
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    same(params, values)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert optimizer.steps_applied == 1 and int(optimizer.steps_skipped) == 1
