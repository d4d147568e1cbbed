"""Compares how a mixture of experts routes tokens under merged and under live weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from merge_callback.live.names import clean_name, fits
from merge_callback.live.sharding import all_gather_dict
from merge_callback.utilities.checks import check_count, patterns
from merge_callback.validation.router_agreement import RouterAgreement

# Logged name -> name in `RouterAgreement`, whose first router is the merge's and whose other is the live model's.
LOGGED = {
    "router_agreement": "agreement",
    "router_jaccard": "jaccard",
    "router_entropy": "entropy",
    "router_entropy_live": "other_entropy",
    "router_violation": "violation",
    "router_violation_live": "other_violation",
}


@dataclass
class Choices:
    """The choices of one router: its number of experts, and for each of its calls the chosen experts.

    Each call is an int16 tensor, ``[..., num_active]``.
    """

    num_experts: int
    calls: list[Tensor]


@dataclass(frozen=True)
class Routers:
    """The routers of a mixture of experts, whose choices are compared between merge and live model.

    Both models see the same batches, the first ones of the validation, in separate passes. The results are logged as
    ``merge/router_agreement`` and related names, as means over layers.

    Args:
        modules: Patterns of the names of modules that return the scores of the experts, ``[..., num_experts]``; or a
            function that takes the LightningModule after each of its validation steps and returns name -> scores.
        num_active: Number of experts that a token uses.
        num_batches: Number of batches of each validation loader.
        per_layer: Whether each router is also logged separately.

    Raises:
        ValueError: If a number is below one.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> from merge_callback import MergeCallback, Parts
        >>> callback = MergeCallback(parts=Parts(routers=Routers("*.router", num_active=2)))
    """

    modules: str | Sequence[str] | Callable[[Any], Mapping[str, Tensor]]
    num_active: int
    num_batches: int = 4
    per_layer: bool = False

    def __post_init__(self) -> None:
        if not callable(self.modules):
            object.__setattr__(self, "modules", patterns("modules", self.modules))
        check_count("num_active", self.num_active)
        check_count("num_batches", self.num_batches)

    def find(self, module: nn.Module) -> dict[str, nn.Module]:
        """Returns clean name -> module of each router; empty if a function returns the scores.

        Raises:
            ValueError: If a pattern fits no module.
        """
        if callable(self.modules):
            return {}
        named = {clean_name(name): each for name, each in module.named_modules() if name}
        for pattern in self.modules:
            if not any(fits(name, pattern) for name in named):
                raise ValueError(f"Routers({pattern!r}) fits no module; there are {', '.join(named)}")
        return {name: each for name, each in named.items() if fits(name, self.modules)}

    def choices(self, module: nn.Module, run: Callable[[], Any]) -> dict[str, Choices]:
        """Returns what the routers choose while ``run`` runs.

        Args:
            module: The module that has the routers.
            run: Runs the module, for example in a validation.

        Returns:
            Name -> choices of each router.

        Raises:
            ValueError: If a router was not called, or does not return scores.
        """
        found: dict[str, Choices] = {}
        with self._recording(module, found):
            run()
        if missing := [name for name in self.find(module) if name not in found] or [*([] if found else ["any router"])]:
            raise ValueError(
                f"the validation did not call {missing[0]}, or called it from compiled code, which runs no hooks;"
                " a function may return the scores instead: Routers(function, ...)"
            )
        return found

    def compare(self, merged: Mapping[str, Choices], live: Mapping[str, Choices]) -> dict[str, float]:
        """Returns the values to log. All ranks must call it together.

        A router that sees other tokens in the merge than in the live model, such as one behind another router, is left
        out with a warning.
        """
        by_layer = {}
        differing = all_gather_dict(
            {name: None for name in {**merged, **live} if _shapes(merged, name) != _shapes(live, name)}
        )
        if differing:
            rank_zero_warn(
                f"{', '.join(differing)} saw other tokens in the merge than in the live model, and is left out of"
                " merge/router_agreement and the like"
            )
        compared = {name: choices for name, choices in merged.items() if name not in differing}
        if not compared:
            return {}
        for name, choices in compared.items():
            agreement = RouterAgreement(choices.num_experts, self.num_active).to(choices.calls[0].device)
            for ours, theirs in zip(choices.calls, live[name].calls, strict=True):
                agreement.update(ours, theirs)
            found = agreement.compute()
            by_layer[name] = {logged: float(found[value]) for logged, value in LOGGED.items()}
        means = {logged: sum(each[logged] for each in by_layer.values()) / len(by_layer) for logged in LOGGED}
        if not self.per_layer:
            return means
        return means | {f"{logged}/{name}": of[logged] for name, of in by_layer.items() for logged in LOGGED}

    @contextmanager
    def _recording(self, module: nn.Module, found: dict[str, Choices]) -> Iterator[None]:
        def note(name: str, scores: Any) -> None:
            if not isinstance(scores, Tensor) or scores.shape[-1:] < (self.num_active,):
                what = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise ValueError(
                    f"{name} must return the scores of its experts, [..., num_experts], got {what};"
                    " a function may return them instead: Routers(function, ...)"
                )
            scores = scores.full_tensor() if isinstance(scores, DTensor) else scores
            chosen = scores.detach().topk(self.num_active).indices.to(torch.int16)
            found.setdefault(name, Choices(scores.shape[-1], [])).calls.append(chosen)

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _, inputs, scores: note(name, scores)

        if not callable(self.modules):
            handles = [each.register_forward_hook(hook(name)) for name, each in self.find(module).items()]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
            return
        read, step = self.modules, module.validation_step

        def validation_step(*arguments: Any, **options: Any) -> Any:
            result = step(*arguments, **options)  # type: ignore[operator]
            for name, scores in read(module).items():
                note(name, scores)
            return result

        is_own = "validation_step" in vars(module)
        module.validation_step = validation_step  # type: ignore[assignment]
        try:
            yield
        finally:
            if is_own:
                module.validation_step = step
            else:
                del module.validation_step


def _shapes(choices: Mapping[str, Choices], name: str) -> list[tuple[int, ...]]:
    """Returns the shapes of a router's calls; empty if it was not called."""
    return [tuple(call.shape) for call in choices[name].calls] if name in choices else []
