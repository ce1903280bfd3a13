"""Cells are checked before any work begins."""

import pytest

from pipeline.errors import InputError
from pipeline.settings import Cell
from pipeline.sweep.cells import prepare


def test_a_regression_that_would_not_fit_in_memory_is_refused(data, monkeypatch):
    monkeypatch.setattr("pipeline.sweep.cells.MAX_SOLVED", 1_200)
    few, many = Cell(concepts=700, inputs="bag"), Cell(concepts=1_500, inputs="bag")
    assert len(prepare([few, Cell(concepts=1_500)], data)) == 2  # 1,152 features
    with pytest.raises(InputError, match=r"--inputs bag: [\d,]+ features of 1,500 concepts; .* at most 1,200"):
        prepare([few, many], data)
