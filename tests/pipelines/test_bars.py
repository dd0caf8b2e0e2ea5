"""While a program is compiled, the pipeline's bar says so."""

import io

import torch
from pipelines import EAGER, draw_sd3, sd3

import ras_compile
from ras_compile.pipelines.bars import WORDS


def test_the_bar_says_that_something_is_compiled():
    """In the first picture alone, and no longer than that; a detached pipeline has its own bar back."""
    pipe, shown = sd3(), io.StringIO()
    pipe.set_progress_bar_config(file=shown, mininterval=0)
    torch._dynamo.reset()
    with ras_compile.attach(pipe, **EAGER):
        draw_sd3(pipe)
        first = shown.getvalue()
        assert WORDS in first and WORDS not in first.rpartition("\r")[2]
        draw_sd3(pipe)
        assert WORDS not in shown.getvalue()[len(first) :]
    assert "progress_bar" not in vars(pipe)
    draw_sd3(pipe)


def test_a_bar_of_another_kind_is_left_alone():
    """One that no weak reference can be made of, and that has nothing to be told."""

    class Bar:
        __slots__ = ()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def update(self):
            return None

    pipe = sd3()

    class Pipeline(type(pipe)):
        def progress_bar(self, iterable=None, total=None):
            return Bar()

    pipe.__class__ = Pipeline
    torch._dynamo.reset()
    with ras_compile.attach(pipe, **EAGER):
        draw_sd3(pipe)
