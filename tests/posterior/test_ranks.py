"""Passes divided among processes, batches divided among processes, both: the same as one process."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tests.posterior.ranks import RANKS, SCENARIOS, alone, main
from tests.support import assert_same, close

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
]
SECONDS = 240.0


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of every scenario on all ranks; started once for all tests of this file."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(main, args=(str(folder),), nprocs=RANKS, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > end:
                raise TimeoutError(f"the ranks did not finish within {SECONDS:g} seconds")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_four_ranks_equal_one_with_the_same_draws(ranks: list[dict[str, Any]], scenario: str):
    expected = alone(scenario)
    for rank in ranks:
        found = rank[scenario]
        for part in ("weights", "blocks", "variance"):
            assert found[part].keys() == expected[part].keys()
            for name, value in expected[part].items():
                close(found[part][name], value, rtol=1e-9)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-12)
    for rank in ranks[1:]:
        for part in ("weights", "blocks", "variance"):
            assert_same(rank[scenario][part], ranks[0][scenario][part])


def test_a_dropped_pass_is_counted_by_the_rank_that_ran_it(ranks: list[dict[str, Any]]):
    assert [rank["one pass drops"]["dropped"] for rank in ranks] == [1, 0, 0, 0]
    assert alone("one pass drops")["dropped"] == 1


def test_fewer_samples_than_ranks_are_refused(ranks: list[dict[str, Any]]):
    for rank in ranks:
        assert "3 weight samples cannot be divided among 4 ranks. Use at least one sample per rank." in rank["too few"]
