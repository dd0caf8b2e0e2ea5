"""The table of versions, without any installation."""

import matrix
import pytest


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("....\n51 passed in 12.34s\n", "51 passed"),
        ("=== 1 failed, 50 passed in 12.34s (0:00:12) ===\n\n", "1 failed, 50 passed"),
        (
            "ERROR: No matching distribution found for torch==9.*",
            "ERROR: No matching distribution found for torch==9.*",
        ),
        ("a | b", "a / b"),
        ("", "nothing was said"),
    ],
)
def test_the_last_line(said, line):
    assert matrix.last_line(said) == line


def test_rows_are_renewed_and_others_stay():
    first = matrix.put(f"before\n{matrix.BEGIN}{matrix.END}after\n", ["| 2.13.0 | a |", "| 2.9 | b |"])
    assert first.startswith("before\n") and first.endswith("after\n")
    second = matrix.put(first, ["| 2.13.1 | c |"])
    rows = second.partition(matrix.BEGIN)[2].partition(matrix.END)[0].splitlines()[2:]
    assert rows == ["| 2.9 | b |", "| 2.13.1 | c |"]


def test_a_version_that_cannot_be_had_is_told(monkeypatch):
    monkeypatch.setattr(matrix, "installed", lambda version: "no such version")
    assert str(matrix.row("9.9")).startswith("| 9.9 |  |") and "not installed: no such version" in str(
        matrix.row("9.9")
    )


def test_the_page_has_a_place_for_it():
    page = matrix.PAGE.read_text()
    assert page.count(matrix.BEGIN) == page.count(matrix.END) == 1
