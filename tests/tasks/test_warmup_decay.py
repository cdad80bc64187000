import pickle

import pytest
import torch

from lit_accel.methods.multilevel.learning_rate import apply_lr_factor, restore_scheduled_lr
from lit_accel.schedules import warmup_decay_factor
from lit_accel.tasks import WarmupDecay

PEAKS = (0.1, 0.02)


def optimizer():
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in PEAKS]
    return torch.optim.SGD(groups)


def learning_rates(scheduler, num_steps):
    series = []
    for _ in range(num_steps):
        series.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return series


def closed_form(num_steps, **schedule):
    return [[peak * warmup_decay_factor(step, **schedule) for peak in PEAKS] for step in range(num_steps)]


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("num_warmup_steps", [0, 3, 0.25])
def test_series_is_the_closed_form(decay, num_warmup_steps):
    scheduler = WarmupDecay(optimizer(), num_warmup_steps, decay, num_total_steps=12)
    expected = closed_form(13, num_warmup_steps=int(num_warmup_steps) or round(num_warmup_steps * 12),
                           num_total_steps=12, decay=decay)  # fmt: skip
    assert learning_rates(scheduler, 13) == expected


def test_binding_late_is_like_knowing_the_length_from_the_start():
    scheduler = WarmupDecay(optimizer(), num_warmup_steps=0.5)
    assert scheduler.needs_total
    assert scheduler.get_last_lr() == [0, 0]
    scheduler.bind(8)
    assert not scheduler.needs_total
    assert scheduler.get_last_lr() == [peak / 4 for peak in PEAKS]
    assert learning_rates(scheduler, 8) == closed_form(8, num_warmup_steps=4, num_total_steps=8)


def test_unbound_it_says_what_is_missing_and_learns_nothing():
    scheduler = WarmupDecay(optimizer())
    assert [group["lr"] for group in scheduler.optimizer.param_groups] == [0, 0]
    scheduler.optimizer.step()
    with pytest.raises(RuntimeError, match="num_total_steps"):
        scheduler.step()


def test_constant_after_a_counted_warmup_needs_no_length():
    scheduler = WarmupDecay(optimizer(), num_warmup_steps=2, decay="constant")
    assert not scheduler.needs_total
    assert [first for first, _ in learning_rates(scheduler, 4)] == [0.05, 0.1, 0.1, 0.1]


def test_a_tensor_learning_rate_stays_the_same_tensor():
    learning_rate = torch.tensor(0.1)
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=learning_rate)
    held = sgd.param_groups[0]["lr"]
    scheduler = WarmupDecay(sgd, num_warmup_steps=2)
    scheduler.bind(4)
    assert sgd.param_groups[0]["lr"] is held
    assert held.item() == pytest.approx(0.05)


@pytest.mark.parametrize("bound", [True, False])
def test_resume_is_exact_and_the_state_is_primitive(bound, tmp_path):
    through = WarmupDecay(optimizer(), 0.3, "cosine", num_total_steps=20)
    uninterrupted = learning_rates(through, 20)

    first = WarmupDecay(optimizer(), 0.3, "cosine", num_total_steps=20)
    head = learning_rates(first, 9)
    torch.save([first.state_dict(), first.optimizer.state_dict()], tmp_path / "state.pt")
    scheduler_state, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)

    second = WarmupDecay(optimizer(), 0.3, "cosine", num_total_steps=20 if bound else None)
    if not bound:
        second.bind(20)
    second.load_state_dict(scheduler_state)
    second.optimizer.load_state_dict(optimizer_state)
    assert head + learning_rates(second, 11) == uninterrupted


def test_a_run_resumed_with_another_length_follows_the_new_curve():
    first = WarmupDecay(optimizer(), num_total_steps=4)
    learning_rates(first, 4)
    second = WarmupDecay(optimizer(), num_total_steps=8)
    # Lightning restores optimizers first, with the rate that the old curve had.
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert [group["lr"] for group in second.optimizer.param_groups] == [peak * 4 / 8 for peak in PEAKS]
    second.optimizer.step()
    second.step()
    assert second.get_last_lr() == [peak * 3 / 8 for peak in PEAKS]


def test_a_multiple_of_the_rate_is_left_to_who_multiplies():
    first = WarmupDecay(optimizer(), num_total_steps=4)
    apply_lr_factor([first.optimizer], 3.0)
    second = WarmupDecay(optimizer(), num_total_steps=8)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    restore_scheduled_lr([first.optimizer])
    learning_rates(first, 2)
    second.load_state_dict(first.state_dict())
    apply_lr_factor([second.optimizer], 2.0)
    assert [group["lr"] for group in second.optimizer.param_groups] == [2 * peak * 6 / 8 for peak in PEAKS]


def test_it_can_be_pickled():
    scheduler = pickle.loads(pickle.dumps(WarmupDecay(optimizer(), num_total_steps=4)))
    assert scheduler.get_last_lr() == list(PEAKS)


def test_bad_arguments_are_refused_at_once():
    with pytest.raises(ValueError, match="decay"):
        WarmupDecay(optimizer(), num_warmup_steps=5, decay="exponential")
    with pytest.raises(ValueError, match="share"):
        WarmupDecay(optimizer(), num_warmup_steps=1.5)
