"""The paper's table, and what lies between its rows."""

import math

import pytest

from merge_callback import Ema, MergeCallback, Window
from merge_callback.merging.recommended import DENSE_INTERVALS, MIXTURE_INTERVALS, recommended_window


@pytest.mark.parametrize(
    ("size", "moe", "tokens", "num_snapshots"),
    [
        (411e6, False, 2e9, 6),
        (2e9, False, 5e9, 6),
        (8e9, False, 15e9, 10),
        (70e9, False, 40e9, 10),
        (7e9, True, 4e9, 10),
        (13e9, True, 8e9, 10),
        (100e9, True, 80e9, 10),
    ],
)
def test_the_rows_of_the_table_are_given_back(size, moe, tokens, num_snapshots):
    assert recommended_window(size, 1e6, moe) == (round(tokens / 1e6), num_snapshots)


@pytest.mark.parametrize(("moe", "table"), [(False, DENSE_INTERVALS), (True, MIXTURE_INTERVALS)])
def test_the_interval_grows_with_the_model_also_beyond_the_table(moe, table):
    sizes = [min(table) * 1.3**power for power in range(-10, 30)]
    intervals = [recommended_window(size, 1e4, moe).every_n_train_steps for size in sizes]
    assert intervals == sorted(intervals)
    assert len(set(intervals)) == len(intervals)


def test_half_way_on_a_logarithmic_scale_is_the_geometric_mean():
    between = recommended_window(math.sqrt(2e9 * 8e9), 1e6)
    assert between.every_n_train_steps == round(math.sqrt(5e9 * 15e9) / 1e6)


def test_it_gives_the_arguments_of_the_callback():
    window = recommended_window(1e9, tokens_per_step=1e13)
    callback = MergeCallback(**window._asdict())
    assert (callback.every_n_train_steps, callback.num_snapshots) == (1, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1e6), "num_parameters must be above zero and finite, got 0"),
        ((1e9, -1), "tokens_per_step must be above zero and finite, got -1"),
        ((math.inf, 1), "num_parameters must be above zero and finite, got inf"),
        ((7, 4e6), "num_parameters must be the total number of parameters, such as 7e9, got 7"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        recommended_window(*arguments)


@pytest.mark.parametrize(
    ("made", "arguments"),
    [
        (recommended_window, {"num_parameters": "8B", "tokens_per_step": 4e6}),
        (Window, {"span_steps": "9"}),
        (Ema, {"half_life": "5"}),
    ],
)
def test_text_is_no_number(made, arguments):
    with pytest.raises(TypeError, match=r"must be a number, got '"):
        made(**arguments)
