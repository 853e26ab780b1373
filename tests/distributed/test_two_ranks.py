"""Two processes with half a batch each equal one process with the whole batch."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from tests.distributed.worker import RANKS, SCENARIOS, main
from tests.support import assert_same, close

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
]
SECONDS = 180.0


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of every scenario on both ranks; one pair of processes for all tests of this file."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(main, args=(str(folder),), nprocs=RANKS, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > end:
                raise TimeoutError(f"the ranks did not finish within {SECONDS:g} seconds: a collective that not all joined")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert left.keys() == right.keys()
    for name in left:
        close(left[name], right[name], rtol=rtol)


EQUAL = [
    "kronecker factored exact",
    "kronecker exact exact",
    "eigenbasis factored exact",
    "kronecker factored empirical",
    "momentum, intervals",
    "wrapper",
    "accumulation",
    "diagonal",
    "no sync",
    "experts kronecker",
    "experts eigenbasis",
    "nothing left",
]


@pytest.mark.parametrize("scenario", EQUAL)
def test_two_ranks_equal_one(ranks, scenario):
    alone = SCENARIOS[scenario](None)
    for rank in ranks:
        assert_close(rank[scenario]["weights"], alone["weights"])
        assert_close(rank[scenario]["blocks"], alone["blocks"])
    assert_same(ranks[0][scenario]["weights"], ranks[1][scenario]["weights"])
    assert_same(ranks[0][scenario]["blocks"], ranks[1][scenario]["blocks"])


def test_unequal_halves_are_joined_by_sums_and_counts(ranks):
    alone = SCENARIOS["unequal"](None)
    for rank in ranks:
        assert_close(rank["unequal"]["blocks"], alone["blocks"])


def test_a_rank_that_drops_a_pass_joins_with_zeros(ranks):
    alone = SCENARIOS["one rank drops"](None)
    for rank in ranks:
        assert_close(rank["one rank drops"]["blocks"], alone["blocks"])
    assert [rank["one rank drops"]["dropped"] for rank in ranks] == [0, 1]


def test_a_step_that_all_ranks_drop_leaves_the_curvature(ranks):
    alone = SCENARIOS["all ranks drop"](None)
    for rank in ranks:
        assert_close(rank["all ranks drop"]["blocks"], alone["blocks"])
        assert rank["all ranks drop"]["dropped"] == 1


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_every_matrix_is_factorised_once_and_the_owners_are_balanced(ranks, curvature):
    scenario = f"factorizations {curvature}"
    alone = SCENARIOS[scenario](None)["sizes"]
    each = [rank[scenario]["sizes"] for rank in ranks]
    assert sorted(each[0] + each[1]) == sorted(alone)
    assert len(alone) == 16
    assert sum(n**3 for n in each[0]) == sum(n**3 for n in each[1])


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_weights_stay_equal_with_sampled_labels(ranks, curvature):
    left, right = (rank[f"sampled {curvature}"] for rank in ranks)
    assert_same(left["weights"], right["weights"])
    assert_same(left["blocks"], right["blocks"])
    assert all(w.isfinite().all() for w in left["weights"].values())


def test_ranks_draw_different_labels(ranks):
    """Three equally likely classes, one example per rank: the sum of two scores' squares tells equal labels."""
    factors = ranks[0]["labels"]["factors"]
    assert_same(factors, ranks[1]["labels"]["factors"])
    equal = sum(int(torch.linalg.matrix_rank(f) == 1) for f in factors)
    # with independent labels a third of 40 is equal: 13.3, standard error 2.98
    assert abs(equal - 40 / 3) <= 4 * 2.98


def test_resuming_is_bitwise_identical_on_every_rank(ranks):
    for rank in ranks:
        assert_same(rank["resume"]["straight"], rank["resume"]["resumed"])


def test_a_given_process_group_is_used(ranks):
    alone = SCENARIOS["own group"](None)
    assert_close(ranks[0]["own group"]["blocks"], alone["blocks"])
    assert any(
        not torch.allclose(ranks[0]["own group"]["blocks"][n], ranks[1]["own group"]["blocks"][n]) for n in alone["blocks"]
    )


def test_sharded_linear_layers_are_right_or_refused_clearly(ranks):
    for rank in ranks:
        found = rank["sharded"]
        if "refused" in found:
            assert "FSDP2" in found["refused"]
            assert "DistributedDataParallel" in found["refused"]
            assert "'0.weight'" in found["refused"]
        else:
            assert_close(found["weights"], SCENARIOS["sharded"](None)["weights"])


def test_a_use_of_a_weight_that_one_rank_finds_holds_for_all(ranks):
    first, second = (found["hidden use"] for found in ranks)
    assert list(first["blocks"]) == list(second["blocks"]) == ["inner.weight", "inner.bias", "head"]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert float(first["blocks"]["inner.weight"].diagonal().sum()) > 0


def test_a_rank_without_a_forward_joins_with_zeros(ranks):
    alone = SCENARIOS["missing forward"](None)
    for rank in ranks:
        assert_close(rank["missing forward"]["blocks"], alone["blocks"])


def test_where_no_rank_ran_the_model_all_say_so(ranks):
    for rank in ranks:
        assert "the forward of the model was not seen" in rank["no forward at all"]["error"]


def test_what_one_rank_cannot_factorise_all_raise(ranks):
    assert "rank 1 says why" in ranks[0]["not factorised"]["error"]
    assert "broken on purpose" in ranks[1]["not factorised"]["error"]
    assert "Raise damping" in ranks[0]["not factorised"]["error"]


def test_squared_gradients_of_unequal_batches_count_all_terms(ranks):
    for found in (*(rank["unequal squares"] for rank in ranks), SCENARIOS["unequal squares"](None)):
        assert_close(found["found"], found["expected"])
