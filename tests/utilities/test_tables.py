"""Tables of text, with rich and without it."""

import sys

import pytest

from merge_callback.utilities.tables import text_table

HEADER = ["what", "live", "predicted", "gain"]
ROWS = [["a long name of something that has to be folded so that the numbers have room", "1.5", "-", "+0.5"]]


@pytest.fixture(params=["rich", "none"])
def library(request, monkeypatch):
    if request.param == "none":
        for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "rich", None)
    return request.param


def test_a_table_has_its_title_cells_and_no_empty_column(library):
    text = text_table(HEADER, [*ROWS, ["b", "-", "-", "-0.25"]], title="A title")
    assert "A title" in text.splitlines()[0]
    for cell in ("what", "live", "gain", "1.5", "+0.5", "-0.25"):
        assert cell in text
    assert "predicted" not in text
    assert ("┃" in text) == (library == "rich")


@pytest.mark.usefixtures("library")
def test_numbers_stand_under_each_other():
    lines = text_table(["name", "n"], [["a", "1"], ["b", "1000"]], title="A title").splitlines()
    ends = [len(line.rstrip("│ ")) for line in lines if line.strip("│ ").startswith(("a ", "b "))]
    assert len(ends) == 2
    assert ends[0] == ends[1]


def test_long_names_are_folded_before_numbers():
    text = text_table(HEADER[:2], [[ROWS[0][0] * 2, "1.50001"]], title="")
    assert max(map(len, text.splitlines())) <= 80
    assert "1.50001" in text


def test_nothing_that_was_named_is_taken_for_markup():
    text = text_table(["[b]x[/b]", "n"], [["[red]y[/c]", "1"]], title="run[/a] :smile:")
    for part in ("run[/a]", ":smile:", "[b]x[/b]", "[red]y[/c]"):
        assert part in text
