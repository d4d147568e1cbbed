"""The torchmetrics: hand-worked numbers, accumulation, and reduction over ranks as torchmetrics does it."""

import math

import pytest
import torch

from merge_callback.metrics import AnnealPredictionError, RecoveredShare, RouterAgreement

BRANCHES = torch.tensor([[1.5056, 1.4081, 1.3967], [1.3892, 1.2886, 1.2771], [1.2, 1.25, 1.1]], dtype=torch.float64)


def reduced(ranks):
    """What each rank would see after torchmetrics has gathered and reduced the states of all."""
    for name, reduce in ranks[0]._reductions.items():
        state = reduce(torch.stack([getattr(rank, name) for rank in ranks]))
        setattr(ranks[0], name, state)
    return ranks[0]


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


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(("make", "columns"), [(RecoveredShare, (0, 1, 2)), (AnnealPredictionError, (1, 2))])
def test_updates_and_ranks_add_up(make, columns, num_ranks):
    whole, ranks = make(), [make() for _ in range(num_ranks)]
    whole.update(*BRANCHES[:, columns].T)
    for index, branch in enumerate(BRANCHES[:, columns]):
        ranks[index % num_ranks].update(*branch)
    together = reduced(ranks).compute()
    for ours, theirs in zip(torch.as_tensor(_flat(together)), torch.as_tensor(_flat(whole.compute())), strict=True):
        assert ours == pytest.approx(float(theirs))


def _flat(value):
    return list(value.values()) if isinstance(value, dict) else [value]


def test_without_branches_there_is_no_number():
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(RecoveredShare().compute())
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(math.isnan(value) for value in AnnealPredictionError().compute().values())


def test_routers_agree_when_they_choose_the_same_experts_in_any_order():
    one = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 5.0, 4.0]])
    other = torch.tensor([[2.0, 3.0, 1.0, 0.0], [3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 4.0, 5.0]])
    agreement = RouterAgreement(num_active=2)
    agreement.update(one, other)
    assert agreement.compute() == pytest.approx(2 / 3)
    agreement.update(one[None, :1], one[None, :1])
    assert agreement.compute() == pytest.approx(3 / 4)


def test_routers_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"same tokens, got \[2, 4\], \[3, 4\]"):
        RouterAgreement(2).update(torch.zeros(2, 4), torch.zeros(3, 4))
