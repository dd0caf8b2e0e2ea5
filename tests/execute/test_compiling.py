"""What holds while something is compiled: one thread at a time, and no garbage is collected."""

import gc

import pytest

from ras_compile.execute.compiling import compiling, uncollected


@pytest.mark.parametrize("held", [compiling, uncollected])
def test_no_garbage_is_collected_meanwhile(held):
    with held(), held():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError), held():
        raise ValueError
    assert gc.isenabled()


@pytest.mark.parametrize("held", [compiling, uncollected])
def test_a_collector_that_the_user_has_stopped_stays_so(held):
    gc.disable()
    try:
        with held():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
