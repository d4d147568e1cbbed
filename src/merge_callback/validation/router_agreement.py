"""A torchmetrics metric that compares how two mixtures of experts route. It sums over batches and ranks."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class RouterAgreement(Metric):
    """How often two routers of a mixture of experts agree, and how evenly each of them loads the experts.

    Args:
        num_experts: Number of experts.
        num_active: Number of experts that a token uses.

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
        # Number of tokens of each expert under both routers: [2, num_experts].
        self.add_state("load", torch.zeros(2, num_experts, dtype=torch.int64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, logits: Tensor, other: Tensor) -> None:
        """Adds what both routers choose for some tokens.

        Args:
            logits: Scores of one router, ``[..., num_experts]``; or, as integers, the experts that it chose,
                ``[..., num_active]``.
            other: The same of the other router for the same tokens, in the same shape.

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
        """Returns scalars by name; NaN before the first update.

        ``agreement`` is the share of tokens for which both routers choose the same experts, in any order. ``jaccard``
        is the number of experts that both choose over the number that either chooses, averaged over tokens.
        ``entropy`` is the entropy of the load over experts, divided by its largest value, so that one is an even load.
        ``violation`` is the load of the busiest expert minus the mean load, divided by the mean load (MaxVio, arXiv
        2408.15664, section 3). ``other_entropy`` and ``other_violation`` are those of the other router.
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
    """Returns which experts a router chooses: ``[..., num_experts]`` scores to bools of the same shape."""
    return _as_bools(logits.topk(num_active).indices, logits.shape[-1])


def _as_bools(choices: Tensor, num_experts: int) -> Tensor:
    chosen = torch.zeros(*choices.shape[:-1], num_experts, dtype=torch.bool, device=choices.device)
    return chosen.scatter(-1, choices.long(), True)
