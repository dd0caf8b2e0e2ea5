"""What one process makes for others."""

from ras_compile.execute import shelf as shelves
from ras_compile.execute.shelf import Shelf, name_of


def test_what_was_made_here_is_for_others_alone():
    shelf = Shelf()
    shelf.put("a", b"1")
    assert shelf.get("a") is None and shelf.all() == {"a": b"1"}
    shelf.load({"b": b"2"})
    assert shelf.get("b") == b"2" and shelf.all() == {"a": b"1", "b": b"2"}


def test_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(shelves, "MOST", 5)
    shelf = Shelf()
    for name in "abca":
        shelf.put(name, b"12")
    assert list(shelf.all()) == ["c", "a"]


def test_names():
    assert len({name_of("a", "b"), name_of("ab"), name_of("a\0b", ""), name_of("b", "a")}) == 4
