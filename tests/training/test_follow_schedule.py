"""FollowSchedule: a scheduler object that changes nothing."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from fused_legw import SGD, Cosine
from fused_legw.training.follow_schedule import FollowSchedule
from tests.support.cases import give_gradients, legw, make_params, run, same, twins

SCHEDULE = legw(Cosine())


def _optimizer(backend: str, params) -> SGD:
    groups = [dict(params=params[:1], lr=SCHEDULE), dict(params=params[1:])]
    return SGD(groups, lr=torch.tensor(0.25), momentum=0.9, backend=backend, tile=16)


@pytest.fixture
def params(device):
    return make_params(torch.float64, device, [(5,), (20,)])


def test_it_changes_nothing(backend, params):
    """However often it is called; the LEGW group is not refused, nothing is warned of, and the LR is the kernel's."""
    others = twins(params)
    optimizer, alone = _optimizer(backend, params), _optimizer(backend, others)
    scheduler = FollowSchedule(optimizer)
    assert isinstance(scheduler, LRScheduler) and scheduler.optimizer is optimizer
    assert scheduler.get_last_lr() == [SCHEDULE(0), 0.25]
    scheduler.step()  # before the first update, where torch's warn
    for step in range(6):
        give_gradients(step, params, others, skip=False)
        optimizer.step()
        alone.step()
        for _ in range(step % 3):
            scheduler.step()
        assert scheduler.get_last_lr() == optimizer.get_last_lr() == [SCHEDULE(step), 0.25]
        assert scheduler.get_last_lr() == scheduler._last_lr == scheduler.get_lr()
        assert [group.keys() for group in optimizer.param_groups] == [group.keys() for group in alone.param_groups]
        assert [group["lr"] for group in optimizer.param_groups] == [SCHEDULE(step), 0.25]
    same(params, others)
    assert optimizer.steps_applied == 6
    assert scheduler.base_lrs == [SCHEDULE.peak_lr, 0.25]


def test_it_counts_as_torchs_schedulers_do(params):
    """What frameworks read and store."""
    ours = FollowSchedule(_optimizer("aten", params))
    theirs = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(twins(params)), 1)
    theirs.optimizer.step()
    for _ in range(3):
        assert (ours.last_epoch, ours._step_count) == (theirs.last_epoch, theirs._step_count)
        ours.step()
        theirs.step()
    assert ours.state_dict() == {"last_epoch": 3, "_step_count": 4}
    ours.step(7)
    assert ours.last_epoch == 7
    ours.load_state_dict(theirs.state_dict())  # of a run before this library
    assert ours.state_dict() == {"last_epoch": 3, "_step_count": 4} and ours.get_last_lr() == [SCHEDULE(0), 0.25]
    assert not hasattr(ours.optimizer.step, "_wrapped_by_lr_sched")


def test_it_takes_the_metric_of_reduce_on_plateau(params):
    scheduler = FollowSchedule(_optimizer("aten", params))
    for metric in 0.7, torch.tensor(0.5):
        scheduler.step(metric)
    assert scheduler.state_dict() == {"last_epoch": 2, "_step_count": 3}


def test_skipped_steps_do_not_show(backend, params):
    """torch's schedulers advance when GradScaler skipped the update (pytorch#44511)."""
    optimizer = _optimizer(backend, params)
    scheduler = FollowSchedule(optimizer)
    scheduler.step()  # no update before it
    scheduler.step()
    assert scheduler.get_last_lr() == [SCHEDULE(0), 0.25]


@pytest.mark.parametrize("made_first", [False, True])
def test_resuming(backend, params, made_first):
    optimizer = _optimizer(backend, params)
    scheduler = FollowSchedule(optimizer)
    for step in range(3):
        give_gradients(step, params)
        optimizer.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), scheduler.state_dict()), file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    resumed = _optimizer(backend, twins(params))
    other = FollowSchedule(resumed) if made_first else None
    resumed.load_state_dict(stored[0])
    other = other or FollowSchedule(resumed)
    other.load_state_dict(stored[1])
    assert other.get_last_lr() == [SCHEDULE(2), 0.25] and other.state_dict() == scheduler.state_dict()
    resumed.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_stay_linked(backend, params, copied):
    optimizer = _optimizer(backend, params)
    other, scheduler = copied((optimizer, FollowSchedule(optimizer)))
    assert scheduler.optimizer is other
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    for step in range(2):
        other.step()
        scheduler.step()
        assert scheduler.get_last_lr() == [SCHEDULE(step), 0.25]
    assert optimizer.steps_applied == 0


def test_a_group_added_later(backend, params):
    optimizer = SGD(params[:1], lr=SCHEDULE, backend=backend, tile=16)
    scheduler = FollowSchedule(optimizer)
    optimizer.add_param_group(dict(params=params[1:], lr=0.5))
    scheduler.step()
    assert scheduler.get_last_lr() == [SCHEDULE(0), 0.5]
    assert scheduler.base_lrs == [SCHEDULE.peak_lr, 0.5]


def test_another_optimizer_is_refused(params):
    with pytest.raises(TypeError, match=r"follows an optimizer of fused_legw, got torch.optim.sgd.SGD"):
        FollowSchedule(torch.optim.SGD(params))
    with pytest.raises(TypeError, match=r"got builtins\.NoneType"):
        FollowSchedule(None)


# What is said to who uses torch's schedulers on a group that follows a schedule


def _refused(optimizer, params) -> str:
    """What the next step says; it changes nothing."""
    give_gradients(0, params)
    before, applied = twins(params), optimizer.steps_applied
    with pytest.raises(RuntimeError) as refused:
        optimizer.step()
    same(params, before)
    assert optimizer.steps_applied == applied
    return str(refused.value)


def test_torchs_schedulers_beside_it_are_still_refused(device, params):
    optimizer = _optimizer("aten", params)
    FollowSchedule(optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    text = _refused(optimizer, params)
    assert "param_groups[0] follows LEGW(peak_lr=0.2), and a torch LR scheduler was made for this optimizer" in text
    assert "FollowSchedule(optimizer)" in text


def test_a_group_moves_to_legw_after_its_scheduler(backend, params):
    """Nobody can see that the scheduler is gone: the step stays wrapped."""
    optimizer = SGD(params, lr=0.25, backend=backend, tile=16)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    run(optimizer, range(2), params)
    scheduler.step()
    del scheduler
    optimizer.param_groups[0]["schedule"] = SCHEDULE
    text = _refused(optimizer, params)
    assert "call `del optimizer.step`" in text and "FollowSchedule(optimizer)" in text
    values = twins(params)
    del optimizer.step
    give_gradients(2, params, values)
    optimizer.step()
    assert optimizer.steps_applied == 3 and optimizer.get_last_lr() == [SCHEDULE(2)]
    for p, q in zip(params, values, strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - SCHEDULE(2) * q.grad if q.grad is not None else q.detach())


def test_reduce_on_plateau_is_named(params):
    """It writes nothing before its first reduction, which may come in the middle of a run."""
    optimizer = _optimizer("aten", params)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
    for step in range(3):
        give_gradients(step, params)
        optimizer.step()
        scheduler.step(1.0)
    give_gradients(3, params)
    optimizer.step()
    scheduler.step(1.0)
    text = _refused(optimizer, params)
    assert "param_groups[0]['lr'] was set to 0.002" in text and "but the group follows LEGW(peak_lr=0.2)" in text
    assert "If ReduceLROnPlateau did it, use FollowSchedule(optimizer)" in text


class _Wrapper(torch.optim.Optimizer):
    """As Accelerate's, which the Trainer of Transformers makes its default scheduler for."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.defaults = optimizer, optimizer.defaults

    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self) -> None:
        self.optimizer.step()


def test_a_scheduler_made_for_a_wrapper_is_told_from_a_written_lr(params):
    optimizer = _optimizer("aten", params)
    wrapper = _Wrapper(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(wrapper, lambda step: 1 - step / 10)
    give_gradients(0, params)
    wrapper.step()
    scheduler.step()
    text = _refused(optimizer, params)
    assert "If a torch LR scheduler, which was made for it, did it, use FollowSchedule(optimizer)" in text


@pytest.mark.peers
def test_the_default_scheduler_of_transformers_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = torch.nn.Linear(2, 1)
    model.forward = lambda x, labels: {"loss": (torch.nn.functional.linear(x, model.weight) - labels).square().mean()}
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    optimizer = SGD(model.parameters(), lr=SCHEDULE)
    data = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = transformers.Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
        with pytest.raises(RuntimeError, match=r"FollowSchedule\(optimizer\)"):
            trainer.train()
        good = transformers.Trainer(
            model,
            args,
            train_dataset=data,
            optimizers=(new := SGD(model.parameters(), lr=SCHEDULE), FollowSchedule(new)),
        )
        good.train()
    assert new.steps_applied == 2
