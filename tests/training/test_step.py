import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.networks.muon import Muon
from stages.training import step as module
from stages.training.recipe import learning_rate
from stages.training.state import State
from stages.training.step import train_step

WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class NothingWaits(TorchDispatchMode):
    """Fails where the host asks for a value that the device may still be computing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        masks = any(leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2]) if isinstance(leaf, torch.Tensor))
        waits = name.startswith(WAITING) or (name.startswith("index") and masks)
        assert not waits, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


class Played(TorchDispatchMode):
    """Records every operation with all its arguments but the tensors: what a CUDA graph would play again as it is."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "profiler":
            leaves = tree_leaves((args, kwargs or {}))
            self.calls.append((str(function), [repr(leaf) for leaf in leaves if not isinstance(leaf, torch.Tensor)]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
@pytest.mark.parametrize("weighting", ["balanced", "min_snr"])
def test_no_step_waits_for_the_device(begin, batch, optimizer, weighting):
    state = begin(optimizer=optimizer, weighting=weighting)
    for step in range(1, state.timetable.end + 1):
        with NothingWaits():
            train_step(state, batch, step)
        if step in state.timetable.reports:
            state.set_losses(torch.empty(0))


@pytest.mark.parametrize(
    "wait",
    [
        lambda state: state.read_losses(),
        lambda state: float(state.ema_weight),
        lambda state: bool(state.losses.isfinite().all()),
        lambda state: state.losses[state.losses > 0],
        lambda state: F.one_hot(state.count, 32),
    ],
)
def test_the_check_sees_who_waits(begin, wait):
    state = begin()
    with pytest.raises(AssertionError, match="waits for the device"), NothingWaits():
        wait(state)


def places(state):
    """The addresses of all that steps change, but of the gradients."""
    momenta = [tensor for optimizer in state.optimizers for kept in optimizer.state.values() for tensor in kept.values()]
    rates = [group["lr"] for optimizer in state.optimizers for group in optimizer.param_groups]
    kept = [*state.weights, *state.averages, *state.balance.buffers(), *momenta, *rates]
    return [tensor.data_ptr() for tensor in (*kept, state.ema_weight, state.losses, state.count)]


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_what_changes_from_step_to_step_is_in_tensors_that_stay_where_they_are(begin, batch, optimizer, monkeypatch):
    """So that the operations of one step, played again, are those of any other."""
    descend, played = module._descend, []

    def watched(*args):
        with Played() as seen:
            descend(*args)
        played.append(seen.calls)

    monkeypatch.setattr(module, "_descend", watched)
    state = begin(optimizer=optimizer)
    train_step(state, batch, 1)  # it makes the momenta
    before = places(state)
    for step in range(2, state.timetable.end + 1):
        if step - 1 in state.timetable.reports:
            state.set_losses(torch.empty(0))
        train_step(state, batch, step)
        assert places(state) == before
    assert len(played[1]) > 100
    assert all(calls == played[1] for calls in played[2:])

    monkeypatch.setattr(
        module.ema, "update", lambda average, current, weight: torch._foreach_lerp_(average, current, float(weight))
    )
    state.set_losses(torch.empty(0))
    for step in (2, 3):
        train_step(state, batch, step)
    assert played[-2] != played[-1]  # the check can fail: a number among the arguments


def test_the_randomness_of_a_step_is_a_function_of_seed_and_step(begin, batch):
    def moved(seed, step, meanwhile=0):
        state = begin(seed)
        torch.rand(meanwhile)
        train_step(state, batch, step)
        return torch.cat([weight.detach().flatten() for weight in state.weights])

    first = moved(3, 5)
    assert torch.equal(moved(3, 5, meanwhile=7), first)
    for other in ((4, 5), (3, 6)):
        assert not torch.equal(moved(*other), first)


def test_losses_are_kept_in_order_until_they_are_reported(begin, batch):
    state = begin()
    train_step(state, batch, 1)
    (first,) = state.read_losses().tolist()
    train_step(state, batch, 2)
    assert state.read_losses()[0] == first
    assert len(state.read_losses()) == state.step == 2
    state.set_losses(torch.empty(0))
    assert state.read_losses().tolist() == []
    state.set_losses(torch.tensor([0.5]))
    train_step(state, batch, 3)
    half, third = state.read_losses().tolist()
    assert half == 0.5
    assert 0.1 < third < 3


def test_a_phase_begins_with_optimisers_that_remember_nothing(begin, batch, monkeypatch):
    """As new ones would begin: whose training was stopped between two phases has new ones."""

    def after_two_steps_of_the_second_phase(*, stopped):
        state = begin()
        for step in range(1, 11):
            if step == 9 and stopped:
                before, state = state, begin()
                for name, module in before.modules.items():
                    state.modules[name].load_state_dict(module.state_dict())
            train_step(state, batch, step)
            state.set_losses(torch.empty(0))
        return torch.cat([weight.detach().flatten() for weight in state.weights])

    stopped = after_two_steps_of_the_second_phase(stopped=True)
    assert torch.equal(after_two_steps_of_the_second_phase(stopped=False), stopped)
    monkeypatch.setattr(State, "forget_momenta", lambda self: None)
    assert not torch.equal(after_two_steps_of_the_second_phase(stopped=False), stopped)


def test_every_optimizer_steps_at_its_share_of_the_learning_rate(begin, batch, recipe, monkeypatch):
    state, used = begin(), {}
    for kind in (Muon, torch.optim.AdamW):
        take = kind.step

        def watched(self, *args, take=take, **kwargs):
            used.setdefault(type(self).__name__, []).append(float(self.param_groups[0]["lr"]))
            return take(self, *args, **kwargs)

        monkeypatch.setattr(kind, "step", watched)
    for step in range(1, 9):
        train_step(state, batch, step)
        state.set_losses(torch.empty(0))
    rates = [learning_rate(step, 8, recipe) for step in range(1, 9)]
    assert used["AdamW"] == pytest.approx(rates)
    assert used["Muon"] == pytest.approx([rate / 2 for rate in rates])
