"""Slow twins in float64, written from the formulas and sharing no code with the package."""

from collections.abc import Sequence
from math import cos, pi, sqrt

import numpy as np
import torch
from torch import Tensor


def merge(snapshots: Sequence[dict[str, Tensor]], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """sum_j c_j x_j, tensor by tensor, in float64 or complex128."""
    merged = {}
    for name in snapshots[0]:
        dtype = torch.promote_types(snapshots[0][name].dtype, torch.float64)
        total = torch.zeros_like(snapshots[0][name], dtype=dtype)
        for snapshot, coefficient in zip(snapshots, coefficients, strict=True):
            total = total + coefficient * snapshot[name].to(dtype)
        merged[name] = total
    return merged


def spread(snapshots: Sequence[dict[str, Tensor]], merged: dict[str, Tensor]) -> float:
    """RMS over snapshots of |x_i - m|, over |m|."""
    square = 0.0
    for snapshot in snapshots:
        square += sum(float(((snapshot[name].double() - merged[name]) ** 2).sum()) for name in merged)
    return sqrt(square / len(snapshots)) / sqrt(sum(float((tensor**2).sum()) for tensor in merged.values()))


def coefficients(rule: str, steps: Sequence[int]) -> list[float]:
    """Merge coefficients of every named rule, by its definition."""
    number = len(steps)
    if rule == "sma":
        return [1.0 / number for _ in range(number)]
    if rule == "wma":
        return [rank / sum(range(1, number + 1)) for rank in range(1, number + 1)]
    if rule == "ema":
        weights = [1.0]
        for _ in range(number - 1):
            weights = [0.8 * weight for weight in weights] + [0.2]
        return weights
    # A snapshot's cell reaches half way to its neighbours, and as far on its free side where it is the first or last.
    if number == 1:
        return [1.0]
    first = steps[0] - (steps[1] - steps[0]) / 2
    last = steps[-1] + (steps[-1] - steps[-2]) / 2
    edges = [first] + [(steps[i] + steps[i + 1]) / 2 for i in range(number - 1)] + [last]
    shares = [(edge - first) / (last - first) for edge in edges]
    rate = {
        "linear": lambda u: 1 - u,
        "1-sqrt": lambda u: 1 - sqrt(min(u, 1)),
        "cosine": lambda u: 0.5 * (1 + cos(pi * u)),
    }["linear" if rule == "qam" else rule]
    if rule == "qam":
        # The probability of each number of successes is a coefficient of a product of polynomials.
        product = np.array([1.0])
        for share in shares[1:-1]:
            product = np.convolve(product, [1 - rate(share), rate(share)])
        return [float(value) for value in product]
    return [rate(shares[i]) - rate(shares[i + 1]) for i in range(number)]


def uniform(intervals: Sequence[tuple[int, int]]) -> list[float]:
    """Coefficients with which means over these intervals become the mean over all their steps."""
    total = sum(end - begin for begin, end in intervals)
    return [(end - begin) / total for begin, end in intervals]


def decayed_sum(updates: Sequence[float], steps: Sequence[int], coefs: Sequence[float]) -> tuple[float, float]:
    """The merge of a random walk's snapshots, and the same walk with its updates multiplied by the implied decay."""
    position = {0: 0.0}
    for step, update in enumerate(updates, start=1):
        position[step] = position[step - 1] - update
    merged = sum(c * position[step] for c, step in zip(coefs, steps, strict=True))
    walked = 0.0
    for step, update in enumerate(updates, start=1):
        if step <= steps[-1]:
            walked -= update * sum(c for c, at in zip(coefs, steps, strict=True) if at >= step)
    return merged, walked
