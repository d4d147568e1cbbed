"""torchmetrics metrics of predictions of anneals. They accumulate over branches and reduce over ranks."""

import torch
from torch import Tensor
from torchmetrics import Metric


class RecoveredShare(Metric):
    """The share of the gain of decays that merges recover: summed gains of merges over summed gains of decays.

    Gains are summed over branches before the division, so that a branch with almost no gain does not dominate. The
    share is NaN before the first update.

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
        """Adds one or more branches.

        Args:
            live: Values of the live model, of any shape.
            merged: Values of the merge; live, merged and annealed are broadcast against each other.
            annealed: Values after a real decay.
        """
        live, merged, annealed = torch.broadcast_tensors(live, merged, annealed)
        self.merge_gain += (live - merged).sum(dtype=torch.float64)
        self.anneal_gain += (live - annealed).sum(dtype=torch.float64)

    def compute(self) -> Tensor:
        """Returns the share, a scalar."""
        return (self.merge_gain / self.anneal_gain).float()


class AnnealPredictionError(Metric):
    """The error of predicted annealed values: mean absolute error, signed bias and worst error.

    All are NaN before the first update.

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
        """Adds predictions and the values after real decays, of the same shape and in the metric's own unit."""
        errors = predicted.double() - annealed.double()
        self.absolute += errors.abs().sum()
        self.signed += errors.sum()
        self.worst = torch.maximum(self.worst, errors.abs().max())
        self.num_branches += errors.numel()

    def compute(self) -> dict[str, Tensor]:
        """Returns the scalars ``mean_absolute``, ``bias`` (predicted minus annealed) and ``worst`` absolute error."""
        is_empty = self.num_branches == 0
        values = {
            "mean_absolute": self.absolute / self.num_branches,
            "bias": self.signed / self.num_branches,
            "worst": torch.where(is_empty, torch.nan, self.worst),
        }
        return {name: value.float() for name, value in values.items()}
