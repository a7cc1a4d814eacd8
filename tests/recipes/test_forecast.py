"What many workers make of a study: exact where it can be counted, and within bounds everywhere."
from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from subnet_explorer.core.errors import SubnetError
from subnet_explorer.recipes.forecast import forecast

FREE = {"start": 0.0, "load": 0.0, "handling": 0.0}


@pytest.mark.parametrize("cells, workers", [(1, 1), (7, 2), (100, 7), (3, 9)])
def test_equal_cells(cells, workers):
    row = forecast(cells, 10.0, (workers,), **FREE).iloc[0]
    assert row.seconds == 10 * -(-cells // workers)


def test_every_worker_starts_and_loads_every_model_it_meets():
    row = forecast(8, 10.0, (2,), models=4, start=5.0, load=1.0, handling=0.0, weights=100, result=7, parcel=50,
                   call=2).iloc[0]
    assert row.seconds == 5 + 4 * 11 and row.read == 8 * 100 and row.written == 56 and row.sent == 2 * 50 + 8 * 2


def test_a_slow_folder_says_how_long_it_takes():
    row = forecast(100, 1.0, (100,), **FREE, result=10, bandwidth=1.0).iloc[0]
    assert row.seconds == 1000 and row.limit == "folder"


def test_a_slow_caller_feeds_one_cell_after_another():
    row = forecast(100, 1.0, (100,), start=0.0, load=0.0, handling=2.0).iloc[0]
    assert row.seconds == 201 and row.limit == "caller"


TIMES = st.lists(st.floats(0.1, 50), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(TIMES, st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.floats(0, 5), st.floats(0, 5))
def test_bounds(times, cells, workers, models, start, load):
    how = {"models": models, "start": start, "load": load, "handling": 0.0, "seed": 3}
    table = forecast(cells, times, (1, workers), **how)
    alone, many = table.seconds
    total = alone - start - load * min(models, cells)
    assert many >= total / workers - 1e-6 and many <= alone + load * models + 1e-6
    assert (table.busy <= 1 + 1e-9).all() and table.speed_up[0] == 1
    assert forecast(cells, times, (1, workers), **how).equals(table)


@pytest.mark.parametrize("wrong", [{"cells": 0}, {"seconds": 0.0}, {"seconds": [1.0, -1.0]}, {"workers": (0,)},
                                   {"seconds": []}, {"start": -1.0}, {"bandwidth": 0.0}])
def test_what_cannot_be(wrong):
    with pytest.raises(SubnetError): forecast(**{"cells": 5, "seconds": 1.0, **wrong})
