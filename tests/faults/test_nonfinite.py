"""A row that is not a number on one rank of two: no rank makes that update, and nothing else changes."""

import pytest
from faults.nonfinite_kit import BAD_STEP, LIMIT, work
from rank_kit import of_two_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return of_two_ranks(work, tmp_path_factory.mktemp("nonfinite"))


@pytest.mark.parametrize("where", ["on rank 0", "on rank 1"])
def test_the_run_is_the_one_without_that_update(ranks, where):
    for own in ranks:
        assert own[where]["hash"] == own["left out"]["hash"]
        assert own[where]["hash"] != own["undisturbed"]["hash"]
        assert own[where]["skipped"] == 1
        assert own[where]["message"] == ""
    assert ranks[0][where]["hash"] == ranks[1][where]["hash"]


def test_too_many_in_a_row_stop_every_rank_and_name_the_term(ranks):
    for own in ranks:
        assert own["too often"]["skipped"] == LIMIT
        message = own["too often"]["message"]
        assert message.startswith(
            f"step {BAD_STEP + LIMIT - 1}, phase 'joint': {LIMIT} steps in a row had a gradient that is not finite"
        )
        assert "first suspect: term 'supervised'" in message or "first suspect: term 'reconstruction'" in message
    assert ranks[0]["too often"] == ranks[1]["too often"]
