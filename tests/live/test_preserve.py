import copy
import os
import random
import signal
from collections import defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.profiler_util import Interval
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.aggregation import CatMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from merge_callback.live.preserve import (
    preserved_attributes,
    preserved_loaders,
    preserved_trainer,
)
from merge_callback.live.random_states import preserved_rng
from merge_callback.live.remember import MAX_ITEMS
from tests.helpers.toys import Toy, fit, make, same


def draws():
    return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_global_generators_go_on_where_they_were_also_after_an_exception(error):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = draws()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    try:
        with preserved_rng():
            assert draws() == expected
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert draws() == expected


class Keeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.count = 3
        self.outputs = [torch.ones(2)]
        self.nested = defaultdict(list, {"a": [1, 2]})
        self.queue = deque([1, 2], maxlen=3)
        self.names = {"x"}
        self.pair = ([1], torch.zeros(1))
        self.total = torch.tensor(5.0)
        self.generator = torch.Generator().manual_seed(2)
        self.python_random = random.Random(3)
        self.numpy_random = np.random.default_rng(4)
        self.old_numpy_random = np.random.RandomState(5)
        self.mean = MeanMetric()
        self.kept = CatMetric()
        self.unregistered = {"mean": MeanMetric()}
        self.collection = MetricCollection({"a": MulticlassAccuracy(3, average="micro"), "f": MulticlassF1Score(3)})


def test_whatever_a_module_keeps_is_as_before_and_in_the_same_objects():
    module = Keeper()
    logits, labels = torch.eye(3), torch.tensor([0, 1, 0])
    for metric in (module.mean, module.kept, module.unregistered["mean"]):
        metric.update(torch.tensor([1.0, 3.0]))
    module.collection.update(logits, labels)
    outputs, nested_list, total = module.outputs, module.nested["a"], module.total
    drawn = torch.Generator().manual_seed(2), random.Random(3), np.random.default_rng(4)
    with preserved_attributes(module):
        assert module.mean.update_count == module.unregistered["mean"].update_count == 0
        module.inner.count += 1
        module.inner.new = "appears"
        module.outputs.append(1)
        module.outputs = []
        module.nested["a"].clear()
        module.nested["b"].append(1)
        module.queue.append(9)
        module.names.add("y")
        module.pair[0].append(2)
        module.pair[1].add_(1)
        module.total += 1
        torch.rand(2, generator=module.generator)
        module.python_random.random()
        module.numpy_random.random()
        module.old_numpy_random.rand()
        for metric in (module.mean, module.kept, module.unregistered["mean"]):
            metric.update(torch.tensor([100.0]))
        module.collection.update(logits, labels.flip(0))
        module.collection.compute()
    assert module.inner.count == 3
    assert not hasattr(module.inner, "new")
    assert module.outputs is outputs
    assert len(outputs) == 1
    assert module.nested == {"a": [1, 2]}
    assert module.nested["a"] is nested_list
    assert list(module.queue) == [1, 2]
    assert module.names == {"x"}
    assert module.pair[0] == [1]
    assert module.pair[1] == 0
    assert module.total is total
    assert total == 5
    assert torch.rand(2, generator=module.generator).tolist() == torch.rand(2, generator=drawn[0]).tolist()
    assert module.python_random.random() == drawn[1].random()
    assert module.numpy_random.random() == drawn[2].random()
    assert module.old_numpy_random.rand() == np.random.RandomState(5).rand()
    assert module.mean.compute() == module.unregistered["mean"].compute() == 2
    assert module.kept.compute().tolist() == [1, 3]
    assert module.collection.compute()["a"] == pytest.approx(2 / 3)


class FrozenDict(dict):
    """A config as some libraries keep it: a dict that allows no change."""

    def update(self, *args, **kwargs):
        raise RuntimeError("frozen")

    clear = pop = update


def test_what_belongs_to_torch_is_left_alone_also_in_a_module_whose_class_torch_has_derived():
    # As FSDP2 does.
    module = type("FSDPKeeper", (Keeper,), {"__module__": "torch.distributed.fsdp"})()
    module.theirs = Interval(1, 2)
    with preserved_attributes(module):
        module.theirs.start = 7
        module.inner.count = 7
    assert module.theirs.start == 7
    assert module.inner.count == 3


def test_a_dict_that_allows_no_change_is_left_alone():
    module = nn.Module()
    module.config = FrozenDict({"width": 3})
    with preserved_attributes(module):
        pass
    assert module.config == {"width": 3}


def test_all_is_put_back_even_where_one_thing_cannot_be():
    class Stubborn(list):
        def clear(self):
            raise RuntimeError("stubborn")

    module = nn.Module()
    module.before, module.stubborn, module.after = [1], Stubborn(), [2]
    with pytest.raises(RuntimeError, match="stubborn"), preserved_attributes(module):
        module.before.append(0)
        module.stubborn.append(0)
        module.after.append(0)
    assert (module.before, module.after) == ([1], [2])


def test_a_metric_in_the_middle_of_an_epoch_goes_on_as_if_nothing_had_been():
    module, alone = Keeper(), MulticlassAccuracy(3, average="micro")
    for number in range(3):
        labels = torch.tensor([0, number, number])
        with preserved_attributes(module):
            module.collection.update(torch.eye(3), labels.flip(0))
        module.collection.update(torch.eye(3), labels)
        alone.update(torch.eye(3), labels)
    assert module.collection.compute()["a"] == alone.compute()


def test_large_tensors_are_taken_to_be_data_and_not_copied():
    module = nn.Module()
    module.data = torch.zeros(2**19)
    with preserved_attributes(module):
        module.data[0] = 1
    assert module.data[0] == 1


class Counting(torch.utils.data.IterableDataset):
    position = 0

    def __init__(self):
        self.position = 10

    def __iter__(self):
        for _ in range(4):
            self.position += 1
            yield self.position


class Noisy(torch.utils.data.Dataset):
    def __init__(self):
        self.random = random.Random(0)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.random.random()


def test_loaders_with_generators_and_positions_are_rewound():
    dataset = TensorDataset(torch.arange(8))
    generator = torch.Generator().manual_seed(0)
    loaders = [
        DataLoader(dataset, 2, shuffle=True, generator=torch.Generator().manual_seed(1)),
        DataLoader(dataset, 2, sampler=RandomSampler(dataset, generator=generator)),
        DataLoader(Counting(), 2),
        DataLoader(torch.utils.data.ConcatDataset([torch.utils.data.Subset(Noisy(), [0, 1]), dataset]), 1),
        [torch.zeros(1)],
    ]

    def order():
        return [[torch.as_tensor(batch[0]).tolist() for batch in loader] for loader in loaders]

    with preserved_rng(), preserved_loaders(loaders):
        first = order()
    with preserved_rng(), preserved_loaders(loaders):
        assert order() == first
    assert order() == first
    assert order() != first


class Scheduled(Toy):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=torch.tensor(0.1))
        parts = [torch.optim.lr_scheduler.StepLR(optimizer, 1), torch.optim.lr_scheduler.LinearLR(optimizer)]
        return [optimizer], [torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])]


def test_what_hooks_set_in_trainer_optimizers_and_schedulers_is_put_back(tmp_path):
    run = fit(make(Scheduled), tmp_path, max_steps=4)
    trainer, module = run.trainer, run.module
    (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
    module.out.weight.grad, module.out.bias.grad = torch.ones_like(module.out.weight), None
    kept = module.out.weight.grad

    def state():
        numbers = {
            name: value for name, value in vars(trainer).items() if value is None or isinstance(value, int | float)
        }
        trained = [parameter.requires_grad for parameter in module.parameters()]
        return copy.deepcopy([optimizer.state_dict(), config.scheduler.state_dict(), numbers, trained])

    before = state()
    with preserved_trainer(trainer):
        optimizer.param_groups[0]["lr"].mul_(2)
        optimizer.param_groups[0]["momentum"] = 0.5
        config.scheduler.step()
        trainer.should_stop, trainer.gradient_clip_val, trainer.accumulate_grad_batches = True, 1.0, 7
        module.out.weight.requires_grad_(False)
        module.out.weight.grad, module.out.bias.grad = None, torch.ones_like(module.out.bias)
        assert not same(state(), before)
    assert same(state(), before)
    assert module.out.weight.grad is kept
    assert module.out.bias.grad is None


def test_gradients_that_were_written_to_are_told_of(tmp_path):
    run = fit(make(Toy), tmp_path, max_steps=2)
    run.module.out.bias.grad = torch.ones_like(run.module.out.bias)
    with pytest.warns(UserWarning, match="writes to existing gradients"), preserved_trainer(run.trainer):
        run.module.out.bias.grad.add_(1)


def test_lists_of_any_length_hold_again_what_they_held_and_items_of_short_ones_too():
    module = nn.Linear(1, 1)
    module.short, module.long = [[0]], [[0] for _ in range(MAX_ITEMS + 1)]
    with preserved_attributes(module):
        for each in (module.short, module.long):
            each[0][0] = 1
            each.append([2])
    assert (len(module.short), len(module.long)) == (1, MAX_ITEMS + 1)
    # So many are not followed.
    assert (module.short[0], module.long[0]) == ([0], [1])


def test_what_a_signal_handler_sets_in_the_trainer_stays(tmp_path):
    trainer = fit(make(Toy), tmp_path, max_steps=2).trainer
    trainer.should_stop = False

    def handler(*_):
        trainer.should_stop = True

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with preserved_trainer(trainer):
            trainer.gradient_clip_val = 7.0
            os.kill(os.getpid(), signal.SIGUSR2)
        assert signal.getsignal(signal.SIGUSR2) is handler
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (trainer.should_stop, trainer.gradient_clip_val) == (True, None)
