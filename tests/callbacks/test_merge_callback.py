"""What a user asks of the callback: merges against the float64 twin, state dicts, coefficients, arguments."""

import math

import pytest
import torch
from torch.nn import functional as F

from merge_callback import Ema, MergeCallback, SnapshotDirectory, Window
from merge_callback.merging.rules import ema
from tests.helpers.toys import Toy, Tracker, batches, fit, make, same


@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.parametrize("rule", ["sma", "wma", "ema", "linear", "1-sqrt", "cosine", ema(0.5), Window(span_steps=7)])
@pytest.mark.sample(3)
def test_the_merge_agrees_with_the_float64_twin_of_the_run(tmp_path, rule):
    callback, tracker = MergeCallback(3, 4, merges=rule), Tracker()
    run = fit(make(Toy), tmp_path, callback, tracker)
    assert callback.snapshot_steps == [15, 18, 21, 24]
    expected = tracker.merged(callback.coefficients())
    state = callback.merged_state_dict()
    assert state.keys() == run.module.state_dict().keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name].double(), tensor, rtol=1e-6, atol=1e-7)


def test_frozen_tied_and_integer_tensors_and_buffers_are_each_treated_as_they_should(tmp_path):
    callback, tracker = MergeCallback(5, 3), Tracker()
    run = fit(make(Toy), tmp_path, callback, tracker, max_steps=24)
    state, live = callback.merged_state_dict(), run.module.state_dict()
    assert torch.equal(state["inner.weight"], state["tied.weight"])
    assert not torch.equal(state["inner.weight"], live["inner.weight"])
    assert torch.equal(state["frozen.weight"], live["frozen.weight"])
    assert torch.equal(state["position_ids"], live["position_ids"])
    assert state["norm.num_batches_tracked"] == live["norm.num_batches_tracked"] == 24
    newest = tracker.buffers[callback.snapshot_steps[-1]]
    assert callback.snapshot_steps[-1] == 20
    assert torch.equal(state["norm.running_mean"], newest["norm.running_mean"])
    assert not torch.equal(state["norm.running_mean"], live["norm.running_mean"])


def test_the_state_dict_loads_strictly_into_a_new_module_and_is_a_copy(tmp_path):
    callback = MergeCallback(2, 3)
    run = fit(make(Toy), tmp_path, callback)
    before = {name: tensor.clone() for name, tensor in run.module.state_dict().items()}
    other = make(Toy)
    other.load_state_dict(callback.merged_state_dict(), strict=True)
    for tensor in callback.merged_state_dict().values():
        tensor.zero_()
    assert same(dict(other.state_dict()), callback.merged_state_dict())
    assert same(dict(run.module.state_dict()), before)


def test_what_is_no_tensor_in_a_state_dict_is_kept(tmp_path):
    class Extra(Toy):
        def get_extra_state(self):
            return {"note": "kept"}

        def set_extra_state(self, state):
            self.note = state["note"]

    callback = MergeCallback(2, 3)
    fit(make(Extra), tmp_path, callback)
    other = make(Extra)
    other.load_state_dict(callback.merged_state_dict(), strict=True)
    assert other.note == "kept"


def test_a_window_of_one_is_the_latest_snapshot(tmp_path):
    callback = MergeCallback(1, 1)
    run = fit(make(Toy), tmp_path, callback)
    assert callback.snapshot_steps == [24]
    assert same(callback.merged_state_dict(), dict(run.module.state_dict()))


def test_bfloat16_parameters_and_float32_storage_of_them(tmp_path):
    callback, tracker = MergeCallback(3, 4, dtype="float32"), Tracker()
    fit(make(Toy), tmp_path, callback, tracker, precision="bf16-true")
    expected = tracker.merged(callback.coefficients())
    for name, tensor in expected.items():
        merged = callback.merged_state_dict()[name]
        assert merged.dtype == torch.bfloat16
        torch.testing.assert_close(merged.double(), tensor, rtol=2**-8, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_submodule_is_matched_by_its_clean_name(tmp_path):
    module, callback, tracker = make(Toy), MergeCallback(3, 4), Tracker()
    module.inner = torch.compile(module.inner, backend="eager")
    fit(module, tmp_path, callback, tracker)
    state = callback.merged_state_dict()
    assert set(state) == set(module.state_dict())
    expected = tracker.merged(callback.coefficients())["inner._orig_mod.weight"]
    torch.testing.assert_close(state["inner._orig_mod.weight"].double(), expected, rtol=1e-6, atol=1e-7)


def test_merged_weights_swaps_in_and_always_back(tmp_path):
    callback = MergeCallback(2, 3, merges={"sma": "sma", "newest": Window(span_steps=1)})
    run = fit(make(Toy), tmp_path, callback)
    before = {name: tensor.clone() for name, tensor in run.module.state_dict().items()}
    with pytest.raises(ZeroDivisionError), callback.merged_weights(run.module, "sma"):
        assert same(dict(run.module.state_dict()), callback.merged_state_dict("sma"))
        raise ZeroDivisionError
    assert same(dict(run.module.state_dict()), before)


@pytest.mark.usefixtures("both_lightnings")
def test_testing_the_merge_inside_the_context_uses_it_and_leaves_live_weights(tmp_path):
    class Tested(Toy):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    callback = MergeCallback(2, 3)
    run = fit(make(Tested), tmp_path, callback)
    before = {name: tensor.clone() for name, tensor in run.module.state_dict().items()}
    loader = batches(24, 8, shuffle=False, seed=1)
    with callback.merged_weights(run.module):
        (tested,) = run.trainer.test(run.module, loader, verbose=False)
    assert tested["test_loss"] == run.epoch_metrics[-1]["merged/val_loss"].item()
    assert same(dict(run.module.state_dict()), before)
    (live,) = run.trainer.test(run.module, loader, verbose=False)
    assert live["test_loss"] == run.epoch_metrics[-1]["val_loss"].item()


def test_before_anything_was_captured_asking_for_the_merge_says_so(tmp_path):
    callback = MergeCallback(100, 3)
    for ask in (callback.merged_state_dict, callback.coefficients, callback.implied_decay):
        with pytest.raises(
            RuntimeError, match=r"no fit has used this MergeCallback object. .* is in trainer.callbacks"
        ):
            ask()
    run = fit(make(Toy), tmp_path, callback)
    assert callback.snapshot_steps == []
    for ask in (callback.merged_state_dict, callback.coefficients, callback.implied_decay):
        with pytest.raises(RuntimeError, match=r"nothing was captured yet.*once the learning rate is constant"):
            ask()
    with pytest.raises(RuntimeError, match="nothing was captured yet"), callback.merged_weights(run.module):
        pass


def test_an_unknown_merge_is_refused_with_the_known_ones(tmp_path):
    callback = MergeCallback(2, 3, merges={"sma": "sma", "late": "wma"})
    fit(make(Toy), tmp_path, callback)
    with pytest.raises(ValueError, match="no merge called 'latest'; there are: sma, late"):
        callback.coefficients("latest")


def test_coefficients_and_implied_decay_belong_to_the_snapshot_steps(tmp_path):
    callback = MergeCallback(2, 4, merges={"sma": "sma", "sqrt": "1-sqrt"})
    fit(make(Toy), tmp_path, callback)
    assert callback.coefficients() == {18: 0.25, 20: 0.25, 22: 0.25, 24: 0.25}
    assert callback.implied_decay() == [(18, 1.0), (20, 0.75), (22, 0.5), (24, 0.25)]
    steps, multipliers = zip(*callback.implied_decay("sqrt"), strict=True)
    assert steps == (18, 20, 22, 24)
    assert multipliers == pytest.approx([1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])


def test_a_function_that_gives_no_weights_fails_at_its_first_use_and_names_itself(tmp_path):
    def hopeless(steps):
        return [math.nan] * len(steps)

    with pytest.raises(ValueError, match="merge rule hopeless gave a weight that is not finite"):
        fit(make(Toy), tmp_path, MergeCallback(2, 3, merges=hopeless))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every_n_train_steps": 0}, ValueError, "every_n_train_steps must be >= 1, got 0"),
        ({"every_n_train_steps": 2.5}, TypeError, "every_n_train_steps must be an int, got 2.5"),
        ({"num_snapshots": 0}, ValueError, "num_snapshots must be >= 1, got 0"),
        ({"num_snapshots": True}, TypeError, "num_snapshots must be an int, got True"),
        ({"evaluate_every_n_validations": 0}, ValueError, "evaluate_every_n_validations must be >= 1, got 0"),
        ({"limit_batches": -1}, ValueError, r"limit_batches must be .* >= 1 or a share in \(0, 1\], got -1"),
        ({"limit_batches": 0}, ValueError, "got 0"),
        ({"limit_batches": 1.5}, ValueError, "got 1.5"),
        ({"limit_batches": "all"}, TypeError, "limit_batches must be an int, a float or None, got 'all'"),
        ({"merges": "smaa"}, ValueError, "unknown merge rule 'smaa'; did you mean 'sma'"),
        ({"merges": {}}, ValueError, "merges must name at least one merge, got an empty mapping"),
        ({"merges": {"a/b": "sma"}}, ValueError, "without a slash, got 'a/b'"),
        ({"merges": {"late": "lineal"}}, ValueError, "did you mean 'linear'"),
        ({"merges": 3}, TypeError, "a merge rule is a name or a function"),
        (
            {"merges": ["sma", "ema"]},
            TypeError,
            "several merges must be a mapping of names to merges, .* got \\['sma', 'ema'\\]",
        ),
        ({"merges": Ema}, TypeError, "merges takes objects, got the class Ema; make one"),
        ({"start": "Stable"}, TypeError, "start must be 'stable', 'any' or an int, .*, got 'Stable'"),
        (
            {"higher_is_better": True},
            TypeError,
            "higher_is_better must be a pattern of names or a list of them, got True",
        ),
        ({"higher_is_better": [5]}, TypeError, "higher_is_better must be .*, got \\[5\\]"),
        ({"start": -1}, ValueError, "start must be >= 0, got -1"),
        ({"dtype": "int8"}, ValueError, "dtype must be .* or its name, such as 'bfloat16', got 'int8'"),
        ({"dtype": torch.int64}, ValueError, "got torch.int64"),
        ({"storage": __file__ + "/snapshots"}, ValueError, "cannot be written: .* is not a writable directory"),
        ({"storage": "cuda:0"}, ValueError, "storage must be 'device' .* or a directory, got 'cuda:0'; .* './cuda:0'"),
        ({"storage": ""}, ValueError, "storage must be 'device'"),
        ({"storage": SnapshotDirectory("")}, ValueError, "storage must have a path"),
        ({"storage": "/proc/snapshots"}, ValueError, "cannot be written"),
        ({"storage": 3}, TypeError, "storage must be 'device', 'cpu', a directory or a SnapshotMemory, got 3"),
        ({"max_overhead": 0.0}, ValueError, r"max_overhead must be a share in \(0, 1\), got 0.0"),
        ({"max_overhead": "2%"}, TypeError, "max_overhead must be a float or None, got '2%'"),
        ({"name": ""}, ValueError, "name must be a non-empty string, got ''"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_value(arguments, error, message):
    with pytest.raises(error, match=message):
        MergeCallback(**arguments)
