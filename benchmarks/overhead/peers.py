"""The averagers that ours is compared with: each an action that does one update, or one merge."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from models import Weights
from protocol import DECAY
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn


def timm_model_ema() -> Any:
    """timm's class, from its own file: timm as a whole needs torchvision."""
    package = find_spec("timm")
    assert package is not None
    assert package.submodule_search_locations is not None
    spec = spec_from_file_location(
        "timm_model_ema", Path(package.submodule_search_locations[0], "utils", "model_ema.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelEmaV3


def ema_peers(model: nn.Module) -> dict[str, Callable[[], object]]:
    """Name -> one update of its average of the model's weights."""
    # Only this part needs the package.
    from ema_pytorch import EMA  # noqa: PLC0415

    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    timm = timm_model_ema()(model, decay=DECAY)
    ema = EMA(
        model, beta=DECAY, update_after_step=0, update_every=1, use_foreach=True, include_online_model=False, power=1e9
    )
    by_hand = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def update_by_hand() -> None:
        for name, tensor in model.state_dict().items():
            by_hand[name].mul_(DECAY).add_(tensor, alpha=1 - DECAY)

    return {
        "torch AveragedModel, foreach": lambda: averaged.update_parameters(model),
        "timm ModelEmaV3": lambda: timm.update(model),
        "ema-pytorch EMA, foreach": ema.update,
        "loop over a state dict": update_by_hand,
    }


def merge_peers(snapshots: Sequence[Weights], coefficients: Sequence[float]) -> dict[str, Callable[[], object]]:
    """Name -> one merge of the snapshots: means, and a weighted sum."""
    states = [snapshot.state_dict() for snapshot in snapshots]

    def mean_of_stack() -> dict[str, Tensor]:
        return {name: torch.stack([state[name] for state in states]).float().mean(0) for name in states[0]}

    def weighted_sum() -> dict[str, Tensor]:
        merged = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in states[0].items()}
        for coefficient, state in zip(coefficients, states, strict=True):
            for name, tensor in state.items():
                merged[name] += coefficient * tensor.float()
        return merged

    peers: dict[str, Callable[[], object]] = {
        "torch.stack(...).mean(0) over state dicts": mean_of_stack,
        "weighted sum over state dicts": weighted_sum,
    }
    if next(iter(states[0].values())).dtype == torch.float32:
        averaged = AveragedModel(snapshots[0], multi_avg_fn=get_swa_multi_avg_fn())

        def averaged_model() -> None:
            averaged.n_averaged.zero_()
            for snapshot in snapshots:
                averaged.update_parameters(snapshot)

        peers["torch AveragedModel, an update a snapshot"] = averaged_model
    return peers
