"""`Merger` in a plain loop: what it captures, that it changes nothing, that it resumes exactly, and its errors."""

import copy
import io
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from merge_callback import Ema, MergeCallback, Merger, Window
from tests.helpers import reference
from tests.helpers.loops import Loop, Net, assert_same_loop, warmup_stable_decay
from tests.helpers.toys import Toy, batches, fit, make, same

MERGES: dict[str, Any] = {"sma": "sma", "wma": "wma", "ema": Ema(half_life_steps=3)}
KINDS: list[dict[str, Any]] = [
    {},
    {"snapshot": "mean"},
    {"storage": "cpu"},
    {"storage": "cpu", "snapshot": "mean", "dtype": "bfloat16"},
]


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_training_with_it_is_bit_identical(kind):
    alone = Loop().run(20)
    rng = torch.get_rng_state()
    watched = Loop(Merger(2, 4, merges=MERGES, forecast=0.1, **kind)).run(20)
    assert torch.equal(rng, torch.get_rng_state())
    assert_same_loop(alone, watched)
    assert set(watched.logged) == {5, 10, 15, 20}


def test_snapshots_in_a_folder_change_nothing_either(tmp_path):
    alone, watched = Loop().run(20), Loop(Merger(2, 4, storage=str(tmp_path))).run(20)
    assert_same_loop(alone, watched)
    assert sum(file.is_file() for file in tmp_path.rglob("*")) == 4
    merged = watched.merger.merged_state_dict(watched.model)
    expected = reference.merge([watched.weights[step] for step in (14, 16, 18, 20)], [0.25] * 4)
    torch.testing.assert_close(merged["first.weight"].double(), expected["first.weight"], rtol=1e-6, atol=1e-7)


def test_the_merge_is_that_of_the_snapshots_weights():
    loop = Loop(Merger(3, 4, merges=MERGES)).run(20)
    merger = loop.merger
    assert merger.snapshot_steps == [9, 12, 15, 18]
    for name in ("sma", "wma"):
        made = merger.coefficients(name)
        assert list(made.values()) == pytest.approx(reference.coefficients(name, list(made)))
        expected = reference.merge([loop.weights[step] for step in made], list(made.values()))
        merged = merger.merged_state_dict(loop.model, name)
        for key, value in expected.items():
            torch.testing.assert_close(merged[key].double(), value, rtol=1e-6, atol=1e-7)
    before = copy.deepcopy(loop.model.state_dict())
    Net().load_state_dict(merger.merged_state_dict(loop.model), strict=True)
    assert same(loop.model.state_dict(), before)


def without_dropout():
    module = make(Toy)
    module.dropout.p = 0.0
    return module


def test_it_merges_as_the_callback_does(tmp_path):
    callback = MergeCallback(2, 4, merges=MERGES)
    fit(without_dropout(), tmp_path, callback, train=batches(shuffle=False), max_steps=16)
    module, merger = without_dropout(), Merger(2, 4, merges=MERGES)
    module.log = lambda *arguments, **options: None
    optimizer = module.configure_optimizers()["optimizer"]
    for _ in range(2):
        for batch in batches(shuffle=False):
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
            merger.step(module, optimizer)
    assert merger.num_steps == 16
    for name in ("sma", "wma"):
        assert merger.coefficients(name) == callback.coefficients(name)
        assert same(merger.merged_state_dict(module, name), callback.merged_state_dict(name))


def test_it_captures_while_the_rate_is_constant_whether_told_before_or_after_the_schedulers_step():
    loop = Loop(Merger(1, 40, forecast=0.2), warmup_stable_decay).run(40)
    # The rate is full with step 5; step 33 is the first of the decay.
    assert loop.merger.snapshot_steps == list(range(5, 34))

    class Before(Loop):
        def run(self, until, begin=0):
            self.scheduler.step, step = (lambda: None), self.scheduler.step
            told, self.merger = self.merger, None
            for now in range(begin + 1, until + 1):
                super().run(now, now - 1)
                told.step(self.model, self.optimizer)
                step()
            self.merger = told
            return self

    early = Before(Merger(1, 40), warmup_stable_decay).run(40)
    # One step later each: of the next step's rate nothing is known then.
    assert early.merger.snapshot_steps == list(range(6, 35))


def test_a_scheduler_that_steps_once_an_epoch_is_told():
    def run(**told):
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        merger = Merger(1, 10)
        given = {"schedulers": scheduler} if told else {}
        for _ in range(5):
            for _ in range(4):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                merger.step(model, optimizer, **given)
            scheduler.step()
        return merger

    assert run().is_ready
    assert not run(schedulers=True).is_ready


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [3, 11, 20])
@pytest.mark.sample(4)
def test_a_run_that_is_interrupted_goes_on_as_if_it_were_not(kind, cut):
    def new():
        return Loop(Merger(2, 4, merges=MERGES, forecast=0.2, **kind), warmup_stable_decay)

    whole = new().run(40)
    first = new().run(cut)
    state = saved_and_loaded(first.state())
    resumed = new().load(state)
    assert same(saved_and_loaded(resumed.state())["merger"], state["merger"])
    resumed.run(40, cut)
    assert same(whole.state(), resumed.state())
    for name in MERGES:
        ours, theirs = (loop.merger.merged_state_dict(loop.model, name) for loop in (whole, resumed))
        assert same(ours, theirs)
    assert {s: v for s, v in whole.logged.items() if s > cut} == resumed.logged


def test_a_loaded_state_gives_its_merge_before_the_first_step():
    loop = Loop(Merger(2, 4)).run(12)
    later = Merger(2, 4)
    later.load_state_dict(saved_and_loaded(loop.merger.state_dict()))
    assert later.num_steps == 12
    assert same(later.merged_state_dict(loop.model), loop.merger.merged_state_dict(loop.model))
    assert later.snapshot_steps == [6, 8, 10, 12]


def test_observe_returns_what_is_logged_and_forecasts_from_it():
    merger = Merger(4, 10, merges={"sma": "sma", "wma": "wma"}, forecast=0.1)
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, 401):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        merger.step(model, optimizer)
        if step % 20 == 0:
            for name in merger.merges:
                with merger.merged_weights(model, name):
                    pass
            river = 2 + 3 * step**-0.5
            logged = merger.observe({"val_loss": river + 0.1}, {"val_loss": river + 0.02}, {"wma": {"val_loss": river}})
    assert logged["merged/val_loss"] == pytest.approx(river + 0.02)
    assert logged["merge_gain/val_loss"] == pytest.approx(0.08)
    assert logged["merged_wma/val_loss"] == pytest.approx(river)
    assert logged["forecast/val_loss/low"] < logged["forecast/val_loss"] < logged["forecast/val_loss/high"]
    assert logged["merge/forecast_end"] == 444
    made = merger.forecast("val_loss", span=0.1)
    assert made.value == pytest.approx(logged["forecast/val_loss"])
    assert made.value < river


def test_gains_of_what_is_better_higher_have_their_sign():
    loop = Loop(Merger(2, 4, higher_is_better="acc*")).run(8)
    with loop.merger.merged_weights(loop.model):
        pass
    logged = loop.merger.observe({"accuracy": 0.5}, {"accuracy": 0.75})
    assert logged["merge_gain/accuracy"] == 0.25


def test_steps_that_a_scaler_skips_are_not_counted(recwarn):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler, merger = torch.amp.GradScaler("cpu", init_scale=2.0), Merger(1, 10, start="any")
    for step in range(6):
        loss = model(torch.full((1, 2), float("inf") if step in (1, 2) else 1.0)).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        merger.step(model, optimizer)
    assert merger.num_steps == 4
    assert merger.snapshot_steps == [1, 2, 3, 4]
    said = [str(each.message) for each in recwarn if "no optimizer has stepped" in str(each.message)]
    assert len(said) == 1
    assert "since step 1 was counted" in said[0]


def test_errors_say_what_to_do():
    loop = Loop(Merger(2, 4))
    with pytest.raises(RuntimeError, match="nothing was captured yet"):
        loop.merger.merged_state_dict(loop.model)
    with pytest.raises(RuntimeError, match="nothing was captured yet"):
        loop.merger.coefficients()
    loop.run(4)
    with pytest.raises(RuntimeError, match=r"the merge 'sma' was not validated at step 4: observe\(\) takes values"):
        loop.merger.observe({"val_loss": 1.0}, {"val_loss": 1.0})
    with loop.merger.merged_weights(loop.model):
        pass
    loop.run(6, 4)
    with pytest.raises(RuntimeError, match=r"the merge 'sma' was not validated at step 6"):
        loop.merger.observe({"val_loss": 1.0}, {"val_loss": 1.0})
    with loop.merger.merged_weights(loop.model):
        pass
    with pytest.raises(ValueError, match="there is no merge called 'late'; there are: sma"):
        loop.merger.observe({"val_loss": 1.0}, {"val_loss": 1.0}, {"late": {"val_loss": 1.0}})
    other = torch.optim.SGD(loop.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizers must be those of the first step, AdamW, got SGD"):
        loop.merger.step(loop.model, other)
    with pytest.raises(TypeError, match=r"optimizers must be torch.optim.Optimizer, one or several, got 'adam"):
        Merger().step(loop.model, ["adamw"])
    with pytest.raises(RuntimeError, match=r"load_state_dict comes before the first step\(\)"):
        loop.merger.load_state_dict({})
    with pytest.raises(ValueError, match="every_n_steps must be >= 1, got 0"):
        Merger(0)
    with pytest.raises(RuntimeError, match="it needs 4 validations with finite values at this rate, and there are 1"):
        loop.merger.forecast("val_loss", 4)


def test_a_writer_that_comes_before_the_next_step_waits_for_copies_under_way():
    class Noting(Merger):
        finished = 0

        def finish(self):
            self.finished += 1
            super().finish()

    loop = Loop(Noting(2, 4, storage="cpu")).run(6)
    # Before each step but the first, of which the optimizer was not known.
    assert loop.merger.finished == 5


def test_an_optimizer_keeps_no_merger_alive():
    loop = Loop(Merger(2, 4)).run(6)
    known = weakref.ref(loop.merger)
    loop.merger = None
    assert known() is None
    loop.run(8, 6)


def test_wrappers_are_looked_through():
    plain = Loop(Merger(2, 4)).run(8)
    wrapped = Loop(Merger(2, 4))
    wrapped.inner, wrapped.model = wrapped.model, torch.compile(nn.DataParallel(wrapped.model), backend="eager")
    wrapped.run(8)
    merged = wrapped.merger.merged_state_dict(wrapped.inner)
    assert same(merged, plain.merger.merged_state_dict(plain.model))


def test_windows_and_implied_decays_are_those_of_the_callback():
    loop = Loop(Merger(1, 20, merges={"late": Window("wma", span_steps=3)})).run(20)
    made = loop.merger.coefficients()
    assert {step for step, value in made.items() if value} == {18, 19, 20}
    assert [step for step, _ in loop.merger.implied_decay()] == loop.merger.snapshot_steps
