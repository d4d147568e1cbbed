"""The torchmetrics: hand-worked numbers, accumulation, and reduction over ranks as torchmetrics does it."""

import math

import pytest
import torch

from merge_callback.prediction.metrics import AnnealPredictionError, RecoveredShare
from merge_callback.validation.router_agreement import RouterAgreement
from tests.helpers.processes import begin

BRANCHES = torch.tensor([[1.5056, 1.4081, 1.3967], [1.3892, 1.2886, 1.2771], [1.2, 1.25, 1.1]], dtype=torch.float64)
# Of two routers for nine tokens.
SCORES = torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(0))


def test_the_recovered_share_is_of_summed_gains():
    share = RecoveredShare()
    share.update(*BRANCHES.T)
    assert share.compute() == pytest.approx((0.0975 + 0.1006 - 0.05) / (0.1089 + 0.1121 + 0.1))


def test_the_error_is_signed_absolute_and_worst():
    error = AnnealPredictionError()
    error.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 1.0, 3.0]))
    assert {k: float(v) for k, v in error.compute().items()} == pytest.approx(
        {"mean_absolute": 0.5, "bias": 1 / 6, "worst": 1.0}
    )


METRICS = {RecoveredShare: (0, 1, 2), AnnealPredictionError: (1, 2)}


@pytest.mark.parametrize("make", METRICS)
def test_updates_add_up(make):
    whole, parts = make(), make()
    whole.update(*BRANCHES[:, METRICS[make]].T)
    for branch in BRANCHES[:, METRICS[make]]:
        parts.update(*branch)
    assert _flat(parts.compute()) == pytest.approx(_flat(whole.compute()))


def on_rank(rank, folder):
    """Two real processes share the branches; each writes what it computes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for make, columns in METRICS.items():
        metric = make()
        for branch in BRANCHES[rank::2, columns]:
            metric.update(*branch)
        torch.save(_flat(metric.compute()), f"{folder}/{make.__name__}-{rank}.pt")
    agreement = RouterAgreement(num_experts=4, num_active=2)
    agreement.update(*SCORES[:, rank::2])
    torch.save(_flat(agreement.compute()), f"{folder}/RouterAgreement-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_add_up(tmp_path):
    processes = [begin(on_rank, rank, str(tmp_path)) for rank in range(2)]
    for process in processes:
        process.join()
    for make, columns in METRICS.items():
        whole = make()
        whole.update(*BRANCHES[:, columns].T)
        for rank in range(2):
            found = torch.load(tmp_path / f"{make.__name__}-{rank}.pt", weights_only=True)
            assert found == pytest.approx(_flat(whole.compute()))
    routers = RouterAgreement(num_experts=4, num_active=2)
    routers.update(*SCORES)
    for rank in range(2):
        found = torch.load(tmp_path / f"RouterAgreement-{rank}.pt", weights_only=True)
        assert found == pytest.approx(_flat(routers.compute()))


def _flat(value):
    return [float(part) for part in value.values()] if isinstance(value, dict) else [float(value)]


def test_without_branches_there_is_no_number():
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(RecoveredShare().compute())
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(math.isnan(value) for value in AnnealPredictionError().compute().values())


def test_routers_agree_when_they_choose_the_same_experts_in_any_order():
    one = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 5.0, 4.0]])
    other = torch.tensor([[2.0, 3.0, 1.0, 0.0], [3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 4.0, 5.0]])
    agreement = RouterAgreement(num_experts=4, num_active=2)
    agreement.update(one, other)
    found = agreement.compute()
    assert found["agreement"] == pytest.approx(2 / 3)
    # One of three experts that either chooses, for one token of three.
    assert found["jaccard"] == pytest.approx((1 + 1 / 3 + 1) / 3)
    agreement.update(one[None, :1], one[None, :1])
    assert agreement.compute()["agreement"] == pytest.approx(3 / 4)


def test_load_is_even_at_one_and_the_violation_that_of_the_busiest_expert():
    agreement = RouterAgreement(num_experts=4, num_active=1)
    # Tokens for each expert: one each; and three, one, none, none.
    agreement.update(torch.eye(4), torch.eye(4)[[0, 0, 0, 1]])
    found = agreement.compute()
    assert found["entropy"] == pytest.approx(1)
    assert found["violation"] == pytest.approx(0)
    assert found["other_entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    assert found["other_violation"] == pytest.approx(3 - 1)
    assert found["agreement"] == found["jaccard"] == pytest.approx(1 / 4)


def test_choices_count_as_the_scores_that_led_to_them():
    scores, others = torch.rand(2, 5, 7, 6, generator=torch.Generator().manual_seed(0))
    by_score, by_choice = RouterAgreement(6, 2), RouterAgreement(6, 2)
    by_score.update(scores, others)
    by_choice.update(scores.topk(2).indices.to(torch.int16), others.topk(2).indices.flip(-1))
    assert by_score.compute() == by_choice.compute()


def test_routers_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"same tokens, \[..., 4\], got \[2, 4\] and \[3, 4\]"):
        RouterAgreement(4, 2).update(torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"same tokens, \[..., 4\], got \[2, 5\] and \[2, 5\]"):
        RouterAgreement(4, 2).update(torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"num_active must lie in 1 to num_experts=4, got 5"):
        RouterAgreement(4, 5)
