import pytest

from merge_callback.demo.__main__ import closing_table
from merge_callback.report import Validation, plot_validations, read_validations

ROWS = [Validation(75, 2.5, None, None), Validation(150, 2.25, 2.125, 0.125)]


def test_validations_are_read_back_with_the_number_of_steps_done(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(
        "step,train_loss,val_loss,merged/val_loss,merge_gain/val_loss\n74,,2.5,,\n99,2.4,,,\n149,,2.25,2.125,0.125\n"
    )
    assert read_validations(file, "val_loss") == ROWS
    with pytest.raises(ValueError, match="has no metric 'val/loss'; it has: step, train_loss, val_loss"):
        read_validations(file, "val/loss")


def test_the_figure_shows_both_curves_and_the_gain():
    upper, lower = plot_validations(ROWS, "val_loss", "a run").axes
    live, merged = upper.lines
    assert live.get_xydata().tolist() == [[75, 2.5], [150, 2.25]]
    assert merged.get_xydata().tolist() == [[150, 2.125]]
    assert [bar.get_height() for bar in lower.patches] == [0.125]


def test_the_table_leaves_open_what_was_not_evaluated():
    cells = [list(column.cells) for column in closing_table(ROWS).columns]
    assert cells == [["75", "150"], ["2.5000", "2.2500"], ["-", "2.1250"], ["-", "+0.1250"]]
