"""Looks through wrappers that add no parameters, such as DDP's and Fabric's."""

from torch import nn


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the model inside wrappers that keep it under the name ``module`` and have no parameters of their own.

    Examples:
        >>> wrapper = nn.Module()
        >>> wrapper.module = nn.Linear(2, 2)
        >>> unwrapped(wrapper)
        Linear(in_features=2, out_features=2, bias=True)
    """
    inner = getattr(module, "module", None)
    while isinstance(inner, nn.Module) and {*map(id, module.parameters())} == {*map(id, inner.parameters())}:
        module, inner = inner, getattr(inner, "module", None)
    return module
