"""Tables of text."""

from merge_callback.utilities.tables import text_table

HEADER = ["what", "live", "predicted", "gain"]


def test_a_table_has_its_title_cells_and_no_empty_column():
    text = text_table(HEADER, [["a", "1.5", "-", "+0.5"], ["b", "-", "-", "-0.25"]], title="A title")
    assert text.splitlines() == [
        "A title",
        "what  live   gain",
        "----  ----  -----",
        "a      1.5   +0.5",
        "b        -  -0.25",
    ]


def test_long_names_stand_above_their_rows_and_are_never_broken():
    names = ["val/" + "a_long_name_" * 6, "val_loss"]
    rows = [[names[0], "sma", "1.5000"], [names[0], "ema", "1.25"], [names[1], "sma", "2.0"]]
    lines = text_table(["metric", "merge", "live"], rows, title="A title", num_left=2).splitlines()
    assert lines == [
        "A title",
        "metric",
        "  merge    live",
        "  -----  ------",
        names[0],
        "  sma    1.5000",
        "  ema      1.25",
        names[1],
        "  sma       2.0",
    ]


def test_a_table_as_wide_as_the_terminal_stays_as_it_is():
    wide = "a" * 74
    assert text_table(["metric", "live"], [[wide, "1.25"]], title="").splitlines()[-1] == f"{wide}  1.25"
    assert text_table(["metric", "live"], [[wide + "a", "1.25"]], title="").splitlines()[-1] == "  1.25"


def test_nothing_that_was_named_is_taken_for_markup():
    text = text_table(["[b]x[/b]", "n"], [["[red]y[/c]", "1"]], title="run[/a] :smile:")
    for part in ("run[/a]", ":smile:", "[b]x[/b]", "[red]y[/c]"):
        assert part in text
