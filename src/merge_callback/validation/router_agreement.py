"""torchmetrics for merges and anneals: they accumulate over branches or batches, and reduce over ranks."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class RecoveredShare(Metric):
    """Share of what decays gain that merges have already: summed gains of merges over summed gains of decays.

    The sum over branches, rather than the mean of their shares, keeps a branch that gained next to nothing from
    dominating. NaN before the first update.

    Examples:
        >>> share = RecoveredShare()
        >>> live, merged = torch.tensor([1.5, 1.25]), torch.tensor([1.375, 1.125])
        >>> share.update(live, merged, annealed=torch.tensor(1.0))
        >>> share.compute()
        tensor(0.3333)
    """

    full_state_update = False
    higher_is_better = True
    merge_gain: Tensor
    anneal_gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("merge_gain", "anneal_gain"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, live: Tensor, merged: Tensor, annealed: Tensor) -> None:
        """Adds branches.

        Args:
            live: Values of the live model, of any shape.
            merged: Values of the merge; live, merged and annealed are broadcast against each other.
            annealed: Values after a real decay.
        """
        live, merged, annealed = torch.broadcast_tensors(live, merged, annealed)
        self.merge_gain += (live - merged).sum(dtype=torch.float64)
        self.anneal_gain += (live - annealed).sum(dtype=torch.float64)

    def compute(self) -> Tensor:
        """The share, a scalar."""
        return (self.merge_gain / self.anneal_gain).float()


class AnnealPredictionError(Metric):
    """How wrong predictions of annealed values were: mean absolute error, signed bias, and the worst error.

    NaN before the first update.

    Examples:
        >>> error = AnnealPredictionError()
        >>> error.update(predicted=torch.tensor([1.25, 1.0]), annealed=torch.tensor([1.0, 1.125]))
        >>> {name: round(float(value), 4) for name, value in error.compute().items()}
        {'mean_absolute': 0.1875, 'bias': 0.0625, 'worst': 0.25}
    """

    full_state_update = False
    higher_is_better = False
    absolute: Tensor
    signed: Tensor
    worst: Tensor
    num_branches: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("absolute", "signed"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("worst", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("num_branches", torch.tensor(0), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, predicted: Tensor, annealed: Tensor) -> None:
        """Adds predictions, of any shape, and what really came; both in the metric's own unit."""
        errors = predicted.double() - annealed.double()
        self.absolute += errors.abs().sum()
        self.signed += errors.sum()
        self.worst = torch.maximum(self.worst, errors.abs().max())
        self.num_branches += errors.numel()

    def compute(self) -> dict[str, Tensor]:
        """``mean_absolute``, ``bias`` (predicted minus annealed) and ``worst`` absolute error, scalars."""
        is_empty = self.num_branches == 0
        values = {
            "mean_absolute": self.absolute / self.num_branches,
            "bias": self.signed / self.num_branches,
            "worst": torch.where(is_empty, torch.nan, self.worst),
        }
        return {name: value.float() for name, value in values.items()}


class RouterAgreement(Metric):
    """How alike two routers of a mixture of experts choose, and how evenly each of them loads the experts.

    Args:
        num_experts: How many there are.
        num_active: How many a token uses.

    Examples:
        >>> agreement = RouterAgreement(num_experts=2, num_active=1)
        >>> agreement.update(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([[0.2, 0.8], [0.4, 0.6]]))
        >>> found = agreement.compute()
        >>> [float(found[name]) for name in ("agreement", "entropy", "other_entropy", "other_violation")]
        [0.5, 1.0, 0.0, 1.0]
    """

    full_state_update = False
    higher_is_better = True
    num_equal: Tensor
    jaccard: Tensor
    num_tokens: Tensor
    load: Tensor

    def __init__(self, num_experts: int, num_active: int) -> None:
        super().__init__()
        if not 1 <= num_active <= num_experts:
            raise ValueError(f"num_active must lie in 1 to num_experts={num_experts}, got {num_active}")
        self.num_experts = num_experts
        self.num_active = num_active
        for name in ("num_equal", "num_tokens"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("jaccard", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        # Tokens of each expert, of both routers: [2, num_experts].
        self.add_state("load", torch.zeros(2, num_experts, dtype=torch.int64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, logits: Tensor, other: Tensor) -> None:
        """Adds tokens.

        Args:
            logits: Scores of the one router, ``[..., num_experts]``; or, as integers, the experts that it has chosen,
                ``[..., num_active]``.
            other: Those of the other for the same tokens, of the same shape.

        Raises:
            ValueError: If the shapes differ.
        """
        width = self.num_experts if logits.is_floating_point() else self.num_active
        if logits.shape != other.shape or logits.shape[-1:] != (width,):
            shapes = f"{list(logits.shape)} and {list(other.shape)}"
            raise ValueError(f"both routers must judge the same tokens, [..., {width}], got {shapes}")
        if logits.is_floating_point():
            chosen, others = (chosen_experts(each, self.num_active) for each in (logits, other))
        else:
            chosen, others = (_as_bools(each, self.num_experts) for each in (logits, other))
        common = (chosen & others).sum(-1)
        self.num_equal += (common == self.num_active).sum()
        self.jaccard += (common.double() / (chosen | others).sum(-1)).sum()
        self.num_tokens += common.numel()
        self.load += torch.stack([each.flatten(0, -2).sum(0) for each in (chosen, others)])

    def compute(self) -> dict[str, Tensor]:
        """Scalars; NaN before the first update.

        ``agreement`` is the share of tokens for which both choose the same experts, in whatever order, and ``jaccard``
        the mean share of common ones among those that either chooses. ``entropy`` is that of the load over experts,
        over its largest value, so one is an even load. ``violation`` is how far the busiest expert lies above the mean
        load, in means (MaxVio, arXiv 2408.15664, section 3). ``other_entropy`` and ``other_violation`` are the other
        router's.
        """
        shares = self.load / self.load.sum(-1, keepdim=True)
        entropies = torch.special.entr(shares).sum(-1) / math.log(max(2, self.num_experts))
        violations = shares.amax(-1) * self.num_experts - 1
        values = {
            "agreement": self.num_equal / self.num_tokens,
            "jaccard": self.jaccard / self.num_tokens,
            "entropy": entropies[0],
            "other_entropy": entropies[1],
            "violation": violations[0],
            "other_violation": violations[1],
        }
        return {name: value.float() for name, value in values.items()}


def chosen_experts(logits: Tensor, num_active: int) -> Tensor:
    """Which experts a router chooses: ``[..., num_experts]`` scores to bools of the same shape."""
    return _as_bools(logits.topk(num_active).indices, logits.shape[-1])


def _as_bools(choices: Tensor, num_experts: int) -> Tensor:
    chosen = torch.zeros(*choices.shape[:-1], num_experts, dtype=torch.bool, device=choices.device)
    return chosen.scatter(-1, choices.long(), True)
