import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from merge_callback.live.swap import live_weights, swapped_weights
from merge_callback.merging.combine import CHUNK_NUMEL


def test_values_change_inside_and_come_back_with_their_storage():
    module = nn.Linear(2, 2)
    live = dict(module.named_parameters())
    addresses = [tensor.data_ptr() for tensor in live.values()]
    values = {name: tensor.detach().clone() for name, tensor in live.items()}
    with swapped_weights(live, {name: torch.ones_like(tensor) for name, tensor in live.items()}):
        assert torch.equal(module(torch.ones(1, 2)), torch.full((1, 2), 3.0))
    assert [tensor.data_ptr() for tensor in live.values()] == addresses
    assert all(torch.equal(tensor, values[name]) for name, tensor in live.items())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_live_values_come_back_after_any_exception(error):
    weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(error), swapped_weights({"weight": weight}, {"weight": torch.ones(2)}):
        raise error
    assert torch.equal(weight, torch.zeros(2))


def test_swaps_nest():
    weight = torch.zeros(1)
    with swapped_weights({"w": weight}, {"w": torch.ones(1)}):
        with swapped_weights({"w": weight}, {"w": torch.full((1,), 2.0)}):
            assert weight == 2
        assert weight == 1
    assert weight == 0


@pytest.mark.parametrize("numel", [1, 1000, CHUNK_NUMEL + 17])
def test_in_place_contents_change_and_addresses_stay(numel):
    weights = {"flat": nn.Parameter(torch.zeros(numel)), "transposed": torch.zeros(5, 3).t(), "empty": torch.zeros(0)}
    addresses = [tensor.data_ptr() for tensor in weights.values()]
    for _ in range(2):
        others = {name: torch.ones_like(tensor) for name, tensor in weights.items()}
        with swapped_weights(weights, others, in_place=True):
            assert [tensor.data_ptr() for tensor in weights.values()] == addresses
            assert all((tensor == 1).all() for tensor in weights.values())
            assert all((tensor == 0).all() for tensor in others.values())
            with live_weights():
                assert all((tensor == 0).all() for tensor in weights.values())
            assert all((tensor == 1).all() for tensor in weights.values())
        assert all((tensor == 0).all() for tensor in weights.values())
    assert [tensor.data_ptr() for tensor in weights.values()] == addresses


@pytest.mark.parametrize("in_place", [False, True])
def test_live_values_come_back_to_a_module_that_was_moved_inside(in_place):
    module = nn.Linear(2, 2)
    live = dict(module.named_parameters())
    values = {name: tensor.detach().clone() for name, tensor in live.items()}
    others = {name: torch.ones_like(tensor) for name, tensor in live.items()}
    with swapped_weights(live, others, in_place=in_place):
        module.double().float()
        assert (module.weight == 1).all()
    assert all(torch.equal(tensor, values[name]) for name, tensor in module.named_parameters())


class AfterCopy(TorchDispatchMode):
    """Does something when the copy of that number has ended, as Python does with a signal that came in the meantime."""

    def __init__(self, number, action):
        super().__init__()
        self.number, self.action = number, action
        self.num_copies = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.num_copies += function is torch.ops.aten.copy_.default
        if self.num_copies == self.number:
            self.number = None
            self.action()
        return result


def all_are(tensors, value):
    return all((tensor == value).all() for tensor in tensors.values())


# Three copies for each of two parts on the way in, one on the way back.
@pytest.mark.parametrize("number", range(1, 9))
def test_an_interrupt_while_contents_are_exchanged_leaves_the_live_ones(number):
    def interrupt():
        raise KeyboardInterrupt

    live, others = ({name: torch.full((3,), value) for name in "ab"} for value in (0.0, 1.0))
    with pytest.raises(KeyboardInterrupt), AfterCopy(number, interrupt), swapped_weights(live, others, in_place=True):
        pass
    assert all_are(live, 0)


@pytest.mark.parametrize("number", range(1, 9))
def test_a_signal_handler_has_the_live_contents_and_the_others_are_there_afterwards(number):
    def save():
        with live_weights():
            assert all_are(live, 0)
        saved.append(number)

    live, others = ({name: torch.full((3,), value) for name in "ab"} for value in (0.0, 1.0))
    saved: list[int] = []
    with AfterCopy(number, save), swapped_weights(live, others, in_place=True):
        assert all_are(live, 1)
    assert all_are(live, 0)
    assert saved == [number]


def test_tied_tensors_stay_tied():
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    with swapped_weights({"weight": first.weight}, {"weight": torch.ones(2, 2)}):
        assert second.weight is first.weight
        assert torch.equal(second.weight, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.ones(3), r"weight has shape torch.Size\(\[2\]\) in the model, but torch.Size\(\[3\]\)"),
        (torch.ones(2, dtype=torch.float64), "weight has dtype torch.float32 in the model, but torch.float64"),
        (torch.ones(2, device="meta"), "weight has device cpu in the model, but meta"),
        (None, "no tensor to put in the place of weight"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_exchanged(other, message):
    first, weight = torch.zeros(2), torch.zeros(2)
    replacements = {"first": torch.ones(2)} | ({} if other is None else {"weight": other})
    with pytest.raises(ValueError, match=message), swapped_weights({"first": first, "weight": weight}, replacements):
        pass
    assert torch.equal(first, torch.zeros(2))


def test_live_values_can_be_had_in_between():
    weight, other = torch.zeros(1), torch.zeros(1)
    with swapped_weights({"w": weight}, {"w": torch.ones(1)}), swapped_weights({"o": other}, {"o": torch.ones(1)}):
        with pytest.raises(ZeroDivisionError), live_weights():
            assert weight == other == 0
            raise ZeroDivisionError
        assert weight == other == 1
    with live_weights():
        assert weight == other == 0
