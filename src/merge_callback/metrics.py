"""torchmetrics for merges and anneals: they accumulate over branches or batches, and reduce over ranks."""

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
    """Share of tokens for which two routers of a mixture of experts choose the same experts, in whatever order.

    Args:
        num_active: How many experts a token uses.

    Examples:
        >>> agreement = RouterAgreement(num_active=1)
        >>> agreement.update(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([[0.2, 0.8], [0.4, 0.6]]))
        >>> agreement.compute()
        tensor(0.5000)
    """

    full_state_update = False
    higher_is_better = True
    num_equal: Tensor
    num_tokens: Tensor

    def __init__(self, num_active: int) -> None:
        super().__init__()
        self.num_active = num_active
        for name in ("num_equal", "num_tokens"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, other: Tensor) -> None:
        """Adds tokens.

        Args:
            logits: Scores of the one router, ``[..., num_experts]``.
            other: Scores of the other for the same tokens, of the same shape.

        Raises:
            ValueError: If the shapes differ.
        """
        if logits.shape != other.shape:
            raise ValueError(f"both routers must score the same tokens, got {list(logits.shape)}, {list(other.shape)}")
        chosen, others = (chosen_experts(scores, self.num_active) for scores in (logits, other))
        self.num_equal += (chosen == others).all(-1).sum()
        self.num_tokens += chosen[..., 0].numel()

    def compute(self) -> Tensor:
        """The share, a scalar."""
        return self.num_equal / self.num_tokens


def chosen_experts(logits: Tensor, num_active: int) -> Tensor:
    """Which experts a router chooses: ``[..., num_experts]`` scores to bools of the same shape."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(num_active).indices, True)
