"""After a spike the run goes on from a merge of snapshots from before it; a healthy run is left alone, to the bit."""

import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from merge_callback import AnnealBranch, Ema, MergeCallback, SpikeDetector, SpikeRecovery
from tests.helpers import reference
from tests.helpers.toys import ResumableBatches, Toy, Tracker, assert_same_training, batches, fit, lightning, make, same

# It says what it does, and a test that expects an action expects that.
pytestmark = pytest.mark.filterwarnings("default:SpikeRecovery:UserWarning")


class Accident(Callback):
    """Something goes wrong in the middle of a training batch."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            if self.what == "weights":
                with torch.no_grad():
                    pl_module.out.weight.mul_(50)
            elif self.what == "batch":
                batch[0][0, 0] = math.nan
            elif self.what == "gradient":
                handle = pl_module.out.weight.register_hook(lambda gradient: gradient * math.inf)
                self.handle = handle

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        if hasattr(self, "handle"):
            self.handle.remove()
            del self.handle


def slow():
    """A toy whose loss is the same all along, but for noise."""
    module = make(Toy, learning_rate=1e-4)
    # What it draws would not go on where a checkpoint was saved.
    module.dropout.p = 0.0
    return module


def recovering(**options):
    merge = MergeCallback(5, 6)
    # Few losses say little about their noise, and accidents here are large.
    detector = SpikeDetector(threshold=8, patience=2, window=20)
    return merge, SpikeRecovery(merge, detector=detector, **options)


@pytest.mark.usefixtures("both_lightnings")
@pytest.mark.parametrize("what", ["weights", "batch", "gradient"])
@pytest.mark.sample(1)
def test_a_run_goes_on_from_the_merge_of_snapshots_from_before_an_accident(tmp_path, what):
    tracker = Tracker()
    merge, recovery = recovering()
    run = fit(slow(), tmp_path, merge, recovery, tracker, Accident(32, what), max_steps=60)
    (acted,) = recovery.recoveries
    assert 33 <= acted <= 36
    # The merge was made of the snapshots of these steps; the tracker saw it written at the step of the recovery.
    expected = reference.merge([tracker.parameters[step] for step in (20, 25, 30)], [1 / 3] * 3)
    for name, tensor in expected.items():
        torch.testing.assert_close(tracker.parameters[acted][name].double(), tensor, rtol=1e-6, atol=1e-7)
    assert torch.equal(tracker.buffers[acted]["norm.running_mean"], tracker.buffers[30]["norm.running_mean"])
    assert all(tensor.isfinite().all() for tensor in run.module.state_dict().values() if tensor.ndim)
    # Nothing of the accident is in the window.
    assert not [step for step in merge.snapshot_steps if 32 < step < acted]
    assert merge.snapshot_steps[-1] == 60
    assert run.logged("recovery/num_recoveries")[0] == (acted - 1, 1)


@pytest.mark.parametrize("what", ["weights", "gradient"])
@pytest.mark.slow
def test_under_mixed_precision_it_acts_as_well(tmp_path, what):
    merge, recovery = recovering()
    run = fit(slow(), tmp_path, merge, recovery, Accident(32, what), max_steps=50, precision="bf16-mixed")
    (acted,) = recovery.recoveries
    assert 33 <= acted <= 36
    assert all(tensor.isfinite().all() for tensor in run.module.state_dict().values() if tensor.ndim)
    assert run.module.out.weight.abs().max() < 5


class Embedding(Toy):
    """Gradients of its first layer are sparse."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 6, sparse=True)

    def forward(self, x):
        return super().forward(x + self.table((x[:, 0] > 0).long()))

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def test_sparse_gradients_are_looked_at_too(tmp_path):
    class Inf(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 32:
                pl_module.table.weight.grad = pl_module.table.weight.grad * math.inf

    merge, recovery = recovering()
    run = fit(make(Embedding), tmp_path, merge, recovery, Inf(), max_steps=40)
    assert recovery.recoveries == [33]
    assert run.module.table.weight.isfinite().all()


def test_snapshots_that_were_taken_since_the_spike_began_are_dropped(tmp_path, recwarn):
    class Late(SpikeDetector):
        def update(self, step, loss):
            return 34 if step == 37 else None

    merge = MergeCallback(5, 6)
    fit(slow(), tmp_path, merge, SpikeRecovery(merge, detector=Late()), max_steps=38)
    assert merge.snapshot_steps == [10, 15, 20, 25, 30]
    assert any("which began at step 34. Back to the merge of steps [20, 25, 30]" in str(w.message) for w in recwarn)


def test_without_it_the_same_accident_leaves_nan_for_good(tmp_path):
    with pytest.warns(UserWarning, match="holds NaN or inf"):
        run = fit(slow(), tmp_path, MergeCallback(5, 6), Accident(32, "batch"), max_steps=60)
    assert run.module.out.weight.isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}])
def test_a_healthy_run_is_bit_identical_with_and_without_it(tmp_path, arguments):
    merge, recovery = recovering(rate_factor=0.5, rate_steps=5)
    bare = fit(slow(), tmp_path / "bare", max_steps=40, **arguments)
    watched = fit(slow(), tmp_path / "watched", merge, recovery, max_steps=40, **arguments)
    assert recovery.recoveries == []
    assert_same_training(bare, watched)


@pytest.mark.parametrize("state", ["reset", "keep"])
@pytest.mark.slow
def test_optimizers_begin_anew_or_keep_their_states(tmp_path, state):
    class Steps(Callback):
        def __init__(self):
            self.counts = {}

        def on_train_batch_end(self, trainer, pl_module, *arguments):
            states = list(trainer.optimizers[0].state.values())
            self.counts[trainer.global_step] = int(states[0]["step"]) if states else 0

    merge, recovery = recovering(optimizer_state=state)
    steps = Steps()
    fit(slow(), tmp_path, merge, recovery, steps, Accident(32, "weights"), max_steps=50)
    (acted,) = recovery.recoveries
    assert steps.counts[acted] == (0 if state == "reset" else acted)
    assert steps.counts[50] == (50 - acted if state == "reset" else 50)


def test_rates_are_lowered_for_some_steps_and_the_schedulers_own_again(tmp_path):
    rates = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    class Recorded(Toy):
        def configure_optimizers(self):
            return Recording(self.parameters(), lr=1e-4)

    merge, recovery = recovering(rate_factor=0.25, rate_steps=8)
    fit(make(Recorded), tmp_path, merge, recovery, Accident(32, "weights"), max_steps=60)
    (acted,) = recovery.recoveries
    lowered = [step for step, rate in enumerate(rates) if rate == pytest.approx(0.25e-4)]
    assert lowered == list(range(acted, acted + 8))
    assert all(rate == 1e-4 for step, rate in enumerate(rates) if step not in lowered)


def test_the_run_is_saved_as_it_was_before_the_recovery(tmp_path):
    merge, recovery = recovering(folder=tmp_path / "saved")
    fit(slow(), tmp_path, merge, recovery, Accident(32, "weights"), max_steps=50)
    (acted,) = recovery.recoveries
    saved = torch.load(tmp_path / "saved" / f"before-recovery-{acted}.ckpt", weights_only=True)
    # A weight fifty times as large is still there, and so are its optimizer's states.
    assert saved["state_dict"]["out.weight"].abs().max() > 5
    assert saved["optimizer_states"][0]["state"]


def test_the_next_recoveries_reach_further_back_and_the_last_one_too_many_ends_the_run(tmp_path, recwarn):
    class Accidents(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step in (40, 43, 46):
                batch[0][0, 0] = math.nan

    merge = MergeCallback(5, 8)
    recovery = SpikeRecovery(merge, max_recoveries=2, num_snapshots=3)
    with pytest.raises(RuntimeError, match=r"at step 47 the loss is nan.*max_recoveries=2 allows no further recovery"):
        fit(slow(), tmp_path, merge, recovery, Accidents(), max_steps=60)
    assert recovery.recoveries == [41, 44]
    said = [str(warning.message) for warning in recwarn if "Back to the merge" in str(warning.message)]
    assert "Back to the merge of steps [30, 35, 40]" in said[0]
    assert "Back to the merge of steps [15, 20, 25]" in said[1]


class Poison(Callback):
    """NaN in the batches of some steps."""

    def __init__(self, *steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.steps:
            batch[0][0, 0] = math.nan


def test_lowered_rates_do_not_end_the_window(tmp_path, recwarn):
    merge = MergeCallback(2, 8)
    recovery = SpikeRecovery(merge, rate_factor=0.5, rate_steps=20)
    fit(slow(), tmp_path, merge, recovery, Poison(21, 27), max_steps=50)
    assert recovery.recoveries == [22, 28]
    said = [str(warning.message) for warning in recwarn if "Back to the merge" in str(warning.message)]
    assert "Back to the merge of steps [16, 18, 20]" in said[0]
    # Soon after the first, so the latest three are left out: 20, and two since then.
    assert "Back to the merge of steps [14, 16, 18]" in said[1]
    assert merge.snapshot_steps == list(range(36, 51, 2))


def test_the_merge_has_no_buffers_of_the_spike(tmp_path):
    merge = MergeCallback(4, 4, recalibrate_batches=5)
    plain = MergeCallback(4, 4, name="plain")
    recovery = SpikeRecovery(merge, num_snapshots=2)

    class Forgetting(Callback):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            if recovery.recoveries == [trainer.global_step]:
                plain.session.forget_since(trainer.global_step, recovery._buffers[8])

    run = fit(slow(), tmp_path, merge, plain, recovery, Forgetting(), Poison(11), max_steps=13)
    assert recovery.recoveries == [12]
    for callback in (merge, plain):
        assert all(tensor.isfinite().all() for tensor in callback.merged_state_dict().values())
    for name in ("merged", "merged_plain"):
        assert all(math.isfinite(value) for _, value in run.logged(f"{name}/val_loss"))


def test_validations_of_a_spike_teach_nothing(tmp_path):
    class Late(SpikeDetector):
        def update(self, step, loss):
            return 34 if step == 42 else None

    merge = MergeCallback(5, 6)
    fit(slow(), tmp_path, merge, SpikeRecovery(merge, detector=Late()), max_steps=42)
    assert [known["step"] for known in merge.state_dict()["history"]] == [8, 12, 16, 20, 24, 28, 32]


def test_buffers_are_known_where_a_step_without_a_loss_took_the_snapshot(tmp_path):
    class Leaving(Toy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if self._trainer.global_step % 5 == 4 else loss

    module = make(Leaving, learning_rate=1e-4)
    merge, recovery = recovering()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`training_step` returned `None`")
        fit(module, tmp_path, merge, recovery, Accident(33, "batch"), max_steps=45)
    assert recovery.recoveries == [34]
    assert module.norm.running_mean.isfinite().all()


def test_a_recovery_that_is_added_on_resume_knows_the_buffers_of_the_newest_snapshot(tmp_path):
    first = fit(slow(), tmp_path / "first", MergeCallback(5, 6), max_steps=30, train=ResumableBatches())
    path = str(tmp_path / "at-30.ckpt")
    first.trainer.save_checkpoint(path)
    merge, recovery = recovering()
    again = slow()
    options = {"max_steps": 40, "train": ResumableBatches(), "ckpt_path": path}
    fit(again, tmp_path / "second", merge, recovery, Poison(32), **options)
    assert recovery.recoveries == [33]
    assert again.norm.running_mean.isfinite().all()


def test_after_a_recovery_further_back_the_merge_has_the_buffers_of_its_newest_snapshot(tmp_path):
    merge, tracker = MergeCallback(5, 8), Tracker()
    recovery = SpikeRecovery(merge)
    fit(slow(), tmp_path, merge, recovery, tracker, Poison(32, 36), max_steps=38)
    assert recovery.recoveries == [33, 37]
    assert merge.snapshot_steps[-1] == 35
    assert torch.equal(merge.merged_state_dict()["norm.running_mean"], tracker.buffers[35]["norm.running_mean"])


def test_averages_alone_are_nothing_to_go_back_to():
    with pytest.raises(ValueError, match="must keep snapshots, but all its merges are averages over every step"):
        SpikeRecovery(MergeCallback(merges=Ema(half_life_steps=10)))


def test_another_fit_of_the_same_module_recovers_with_its_buffers_too(tmp_path):
    merge = MergeCallback(4, 4)
    recovery = SpikeRecovery(merge, num_snapshots=2)
    first = fit(slow(), tmp_path / "first", merge, recovery, Poison(13), max_steps=12)
    first.trainer.fit_loop.epoch_loop.max_steps = 16
    first.trainer.fit(first.module, ResumableBatches(), batches(24, shuffle=False))
    assert recovery.recoveries == [14]
    assert first.module.norm.running_mean.isfinite().all()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_leaves_out_a_batch_is_passed_over_and_one_without_any_loss_is_refused(tmp_path):
    class Leaving(Toy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 3 == self.left_out or self.left_out < 0 else loss

    def leaving(left_out):
        module = make(Leaving)
        module.left_out = left_out
        return module

    bare = fit(leaving(1), tmp_path / "bare")
    merge = MergeCallback(5, 6)
    watched = fit(leaving(1), tmp_path / "watched", merge, SpikeRecovery(merge))
    assert_same_training(bare, watched)
    merge = MergeCallback(5, 6)
    with pytest.raises(ValueError, match="it returned none in the first 20 steps"):
        fit(leaving(-1), tmp_path / "none", merge, SpikeRecovery(merge))


@pytest.mark.slow
def test_under_a_decay_the_rates_are_left_to_it(tmp_path, recwarn):
    trunk = MergeCallback(2, 8)
    run = fit(slow(), tmp_path / "trunk", trunk, max_steps=40, train=ResumableBatches())
    path = str(tmp_path / "at-40.ckpt")
    run.trainer.save_checkpoint(path)
    merge = MergeCallback(2, 8)
    recovery = SpikeRecovery(merge, rate_factor=0.5, rate_steps=20)
    branch = AnnealBranch(span_steps=20, record=tmp_path / "anneals.jsonl")
    fit(
        slow(),
        tmp_path / "branch",
        merge,
        recovery,
        branch,
        Poison(45),
        max_steps=-1,
        train=ResumableBatches(),
        ckpt_path=path,
    )
    assert recovery.recoveries == [46]
    (said,) = [str(warning.message) for warning in recwarn if "Back to the merge" in str(warning.message)]
    assert "rates are" not in said


def test_a_spike_before_the_first_snapshot_ends_the_run_with_what_is_missing(tmp_path):
    merge = MergeCallback(5, 6, start=1000)
    with pytest.raises(RuntimeError, match="there is no earlier snapshot to go back to"):
        fit(slow(), tmp_path, merge, SpikeRecovery(merge), Accident(3, "batch"))


@pytest.mark.slow
def test_averages_over_every_step_begin_anew_after_a_recovery(tmp_path):
    merge = MergeCallback(5, 6, merges={"sma": "sma", "ema": Ema(half_life_steps=50)})
    recovery = SpikeRecovery(merge, detector=SpikeDetector(threshold=8, patience=2, window=20))
    fit(slow(), tmp_path, merge, recovery, Accident(32, "weights"), max_steps=60)
    # Fifty times the weight would still be felt half as much fifty steps later.
    assert merge.merged_state_dict("ema")["out.weight"].abs().max() < 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_run_that_is_interrupted_after_a_recovery_ends_as_the_one_that_was_not(tmp_path):
    def run(folder, ckpt_path=None):
        merge, recovery = recovering(rate_factor=0.5, rate_steps=20)
        checkpoints = ModelCheckpoint(folder / "kept", "{step}", every_n_train_steps=1, save_top_k=-1)
        result = fit(
            slow(),
            folder,
            merge,
            recovery,
            Accident(22, "weights"),
            checkpoints,
            max_steps=50,
            train=ResumableBatches(),
            ckpt_path=ckpt_path,
            enable_checkpointing=True,
        )
        return result, merge, recovery

    whole, merge, recovery = run(tmp_path / "whole")
    (acted,) = recovery.recoveries
    for step in (acted - 1, acted, acted + 7):
        again, merge_again, recovery_again = run(
            tmp_path / f"from {step}", str(tmp_path / "whole" / "kept" / f"step={step}.ckpt")
        )
        assert recovery_again.recoveries == [acted]
        assert same(again.module.state_dict(), whole.module.state_dict())
        assert same(merge_again.merged_state_dict(), merge.merged_state_dict())
        states = [each.trainer.optimizers[0].state_dict() for each in (again, whole)]
        assert same(*states)


def test_it_has_to_stand_behind_its_callback(tmp_path):
    merge, recovery = recovering()
    for callbacks in ([recovery, merge], [recovery]):
        with pytest.raises(ValueError, match="must come after its MergeCallback"):
            fit(slow(), tmp_path, *callbacks)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_snapshots": 0}, ValueError, "num_snapshots must be >= 1, got 0"),
        ({"optimizer_state": "lose"}, ValueError, "optimizer_state must be 'reset' or 'keep', got 'lose'"),
        ({"rate_factor": 2.0, "rate_steps": 1}, ValueError, r"rate_factor must lie in \(0, 1\], got 2.0"),
        ({"rate_factor": 0.5}, ValueError, "rate_factor and rate_steps go together, got 0.5 and 0"),
        ({"merge_callback": None}, TypeError, "merge_callback must be a MergeCallback, got None"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SpikeRecovery(**({"merge_callback": MergeCallback()} | arguments))


def test_a_module_that_returns_no_loss_is_named(tmp_path):
    class Manual(Toy):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    merge, recovery = recovering()
    with pytest.raises(ValueError, match="needs the loss that training_step returns"):
        fit(make(Manual), tmp_path, merge, recovery)
    assert lightning() is not None
