"""Text in CSV files, which spreadsheets would otherwise take for formulas and run."""

_BEGINS_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def cell_of_text(text: str) -> str:
    """Returns text for a cell. If it would begin a formula it has an apostrophe in front; numbers stay as they are.

    Examples:
        >>> cell_of_text("=HYPERLINK(0)"), cell_of_text("-0.5"), cell_of_text("sma")
        ("'=HYPERLINK(0)", '-0.5', 'sma')
    """
    return f"'{text}" if text.lstrip("'").startswith(_BEGINS_FORMULA) and not _is_number(text) else text


def text_of_cell(cell: str) -> str:
    """Returns the text for which `cell_of_text` has made the cell.

    Examples:
        >>> text_of_cell("'=HYPERLINK(0)"), text_of_cell("-0.5"), text_of_cell("'sma'")
        ('=HYPERLINK(0)', '-0.5', "'sma'")
    """
    return cell[1:] if cell.startswith("'") and cell.lstrip("'").startswith(_BEGINS_FORMULA) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
