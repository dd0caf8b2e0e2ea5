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
    def line(torch: str, diffusers: str, python: str, said: str) -> str:
        return f"| {torch} | 3.7 | {diffusers} | {python} | {said} | core |"

    old = [line("2.13.0", "0.42.1", "3.11", "a"), line("2.9.1", "0.42.1", "3.11", "b")]
    first = matrix.put(f"before\n{matrix.BEGIN}{matrix.END}after\n", old)
    assert first.startswith("before\n") and first.endswith("after\n")
    new = [
        line("2.13.1", "0.42.1", "3.11", "c"),
        line("2.13.1", "0.38.0", "3.11", "d"),
        line("2.13.1", "0.42.1", "3.12", "e"),
    ]
    rows = matrix.put(first, new).partition(matrix.BEGIN)[2].partition(matrix.END)[0].splitlines()[2:]
    assert rows == [old[1], new[1], new[0], new[2]]


def test_a_version_that_cannot_be_had_is_told(monkeypatch):
    monkeypatch.setattr(matrix, "installed", lambda version: "no such version")
    monkeypatch.setattr(matrix, "beside", lambda version: None)
    told = str(matrix.row("9.9"))
    assert told.startswith("| 9.9 |  |") and "not installed: no such version" in told
    assert str(matrix.row("diffusers-9.9")).startswith("|  |  | 9.9 |")


@pytest.mark.parametrize(("set_before", "path"), [("mine", ["folder", "mine"]), (None, ["folder"])])
def test_a_folder_rules_over_the_environment(monkeypatch, set_before, path):
    asked = []

    def run(command, env, **options):
        asked.append((command[1:], env["PYTHONPATH"]))
        return matrix.subprocess.CompletedProcess(
            command, 0, "3 passed in 1s" if command[1] == "-m" else "2.13 3.7 0.38", ""
        )

    monkeypatch.delenv("PYTHONPATH", raising=False)
    if set_before:
        monkeypatch.setenv("PYTHONPATH", set_before)
    monkeypatch.setattr(matrix.subprocess, "run", run)
    assert matrix.tested("python", ["core"], "folder") == matrix.Row("2.13", "3.7", "0.38", "3 passed", "3 passed")
    assert {found for _, found in asked} == {matrix.os.pathsep.join(path)} and asked[-1][0][-1] == "core"


def test_the_page_has_a_place_for_it():
    page = matrix.PAGE.read_text()
    assert page.count(matrix.BEGIN) == page.count(matrix.END) == 1
