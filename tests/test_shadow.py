"""Averages over every step: their mean age against theory, other widths by synthesis, dtypes, resume."""

import math

import pytest
import torch
from torch import nn

from merge_callback import Ema, PowerEma
from merge_callback.shadow import Shadow, is_average, synthesis_coefficients
from merge_callback.snapshots import RowLayout


def ramp(average, gap, last, first=0):
    """The average of x_t = t, updated every so many steps."""
    shadow = Shadow(average)
    for step in range(first + gap, last + 1, gap):
        shadow.update(step, {"x": torch.tensor([float(step)], dtype=torch.float64)})
    return shadow.tensors["x"].item()


@pytest.mark.parametrize("gap", [1, 3, 10, 40])
@pytest.mark.parametrize("half_life_steps", [5, 20, 100.5])
def test_the_mean_age_of_a_half_life_average_is_that_of_theory(half_life_steps, gap):
    last = 4800
    beta = 0.5 ** (gap / half_life_steps)
    assert last - ramp(Ema(half_life_steps=half_life_steps), gap, last) == pytest.approx(gap * beta / (1 - beta))


@pytest.mark.parametrize("gap", [1, 2, 5])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_the_mean_age_of_a_power_function_average_is_that_of_theory(sigma_rel, gap):
    # The mean of s under s^gamma on [0, t] is t (gamma + 1) / (gamma + 2), up to half an update interval.
    last, average = 20_000, PowerEma(sigma_rel)
    mean = last * (average.gamma + 1) / (average.gamma + 2)
    assert ramp(average, gap, last) == pytest.approx(mean + gap / 2, abs=gap / 2 + 1)
    assert average.span_steps(last) == pytest.approx(2 * (last - mean))


def test_the_mean_age_of_a_share_of_training_grows_with_training():
    average = Ema(half_life=0.05)
    for last in (2000, 20_000):
        assert last - ramp(average, 1, last) == pytest.approx(average.span_steps(last) / 2, rel=0.01)


def test_a_half_life_of_a_fixed_length_stands_for_a_span_of_twice_the_mean_age():
    average = Ema(half_life_steps=200)
    assert 2 * (9000 - ramp(average, 1, 9000)) == pytest.approx(average.span_steps(9000), rel=0.01)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.1, 0.2])
def test_a_power_function_average_has_the_width_it_says(sigma_rel):
    gamma = PowerEma(sigma_rel).gamma
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(sigma_rel)


@pytest.mark.parametrize("wanted", [0.04, 0.07, 0.12, 0.15])
def test_another_width_is_synthesised_from_stored_averages(wanted):
    """On x_t = sqrt(t): the combination of averages stored along the run against the average kept directly."""
    last = 4000
    shadows = {width: Shadow(PowerEma(width)) for width in (0.05, 0.1)}
    direct = Shadow(PowerEma(wanted))
    stored = []
    for step in range(1, last + 1):
        live = {"x": torch.tensor([math.sqrt(step)], dtype=torch.float64)}
        direct.update(step, live)
        for width, shadow in shadows.items():
            shadow.update(step, live)
            if step % 250 == 0:
                stored.append((step, PowerEma(width), shadow.tensors["x"].item()))
    coefficients = synthesis_coefficients([(step, average) for step, average, _ in stored], last, PowerEma(wanted))
    assert sum(coefficients) == pytest.approx(1)
    synthesised = sum(c * value for c, (_, _, value) in zip(coefficients, stored, strict=True))
    assert synthesised == pytest.approx(direct.tensors["x"].item(), abs=2e-3 * math.sqrt(last))
    nearest = min(abs(value - direct.tensors["x"].item()) for step, _, value in stored if step == last)
    assert abs(synthesised - direct.tensors["x"].item()) < nearest / 10


def test_nothing_is_synthesised_from_nothing():
    with pytest.raises(ValueError, match="no stored averages"):
        synthesis_coefficients([], 100, PowerEma(0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_of_narrow_weights_are_not_lost(dtype):
    # The increment is far below half a unit in the last place of bfloat16 near one.
    shadow = Shadow(Ema(half_life_steps=1000))
    shadow.update(0, {"x": torch.ones(3, dtype=dtype)})
    for step in range(1, 1001):
        shadow.update(step, {"x": torch.full((3,), 1.5, dtype=dtype)})
    assert shadow.tensors["x"].dtype == torch.float32
    assert torch.allclose(shadow.tensors["x"], torch.tensor(1.25), atol=1e-4)


def test_a_shadow_follows_float64_and_mixed_dtypes():
    live = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(3), "c": torch.zeros(1, dtype=torch.bfloat16)}
    shadow = Shadow(Ema(half_life_steps=1))
    shadow.update(1, live)
    shadow.update(2, {name: tensor + 1 for name, tensor in live.items()})
    assert [tensor.dtype for tensor in shadow.tensors.values()] == [torch.float64, torch.float32, torch.float32]
    assert all(torch.all(tensor == 0.5) for tensor in shadow.tensors.values())
    views = RowLayout(live).views(shadow.row(RowLayout(live)))
    assert {name: view.dtype for name, view in views.items()} == {name: t.dtype for name, t in live.items()}


def test_a_step_seen_twice_counts_once():
    shadow = Shadow(Ema(half_life_steps=1))
    for step in (1, 2, 2):
        shadow.update(step, {"x": torch.tensor([float(step)])})
    assert shadow.tensors["x"].item() == 1.5


def test_a_shadow_owns_its_weights():
    weight = nn.Parameter(torch.ones(2))
    shadow = Shadow(Ema(half_life_steps=1))
    shadow.update(1, {"x": weight})
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(shadow.tensors["x"], torch.ones(2))
    assert not shadow.tensors["x"].requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Ema, "exactly one of half_life_steps and half_life, got half_life_steps=None"),
        (lambda: Ema(half_life_steps=1, half_life=0.1), "exactly one"),
        (lambda: Ema(half_life_steps=0), "half_life_steps must be > 0 and finite, got 0"),
        (lambda: Ema(half_life=1.5), r"half_life must be a share of training in \(0, 1\], got 1.5"),
        (lambda: PowerEma(0.3), r"sigma_rel must lie in \(0, 0.2887\), got 0.3"),
        (lambda: PowerEma(0.0), "got 0.0"),
    ],
)
def test_a_wrong_width_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_averages_are_averages():
    assert is_average(Ema(half_life=0.1))
    assert is_average(PowerEma(0.1))
    assert not is_average("sma")
    assert not is_average(len)
