"""`row_numbers`: the places of a joint sequence, and its fake twin."""

import pytest
import torch

from ras_compile.kernels import row_numbers


@pytest.mark.parametrize(
    ("rows", "sizes", "want"),
    [
        ([[2, 0], [1, 2]], (2, 4, 3), [[0, 1, 4, 2, 6, 7, 8], [0, 1, 3, 4, 6, 7, 8]]),
        ([[3, 1]], (0, 4, 0), [[3, 1]]),
        ([[1]], (0, 2, 1), [[1, 2]]),
    ],
)
def test_places_in_a_joint_sequence(rows, sizes, want):
    assert row_numbers(torch.tensor(rows), *sizes).tolist() == want


def test_without_active_rows_it_counts():
    assert row_numbers(torch.empty(1, 0, dtype=torch.int64), 4, 0, 0).tolist() == [[0, 1, 2, 3]]


def test_as_an_op():
    torch.library.opcheck(torch.ops.ras_compile.row_numbers.default, (torch.tensor([[2, 0], [1, 2]]), 2, 4, 3))
