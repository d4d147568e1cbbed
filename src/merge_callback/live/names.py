"""Tensor names without the prefixes of wrappers, and patterns that select parameters by name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import nn

# Names that wrappers put into the path of a parameter: torch.compile, activation checkpointing, FSDP.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def clean_name(name: str) -> str:
    """Returns a tensor's name in the original module, without the parts that wrappers add.

    Examples:
        >>> clean_name("gpt._orig_mod.blocks.0._checkpoint_wrapped_module.mlp.weight")
        'gpt.blocks.0.mlp.weight'
    """
    return _WRAPPERS.sub("", name)


def fits(name: str, patterns: str | Iterable[str]) -> bool:
    """Returns True if a name matches the pattern, or any of several patterns (shell style, as in `fnmatch`).

    Examples:
        >>> fits("norm.running_var", "*running_var"), fits("norm.weight", ["*bias", "*running_var"])
        (True, False)
    """
    return any(fnmatch(name, pattern) for pattern in ((patterns,) if isinstance(patterns, str) else patterns))


@dataclass(frozen=True)
class Selection:
    """Selects the parameters to merge by patterns of their clean names. The others stay live.

    Args:
        include: Patterns of which at least one must match. ``"*"`` matches all names.
        exclude: Patterns of which none may match.

    Examples:
        >>> selection = Selection(exclude=("*.router.*",))
        >>> selection("blocks.0.router.weight"), selection("blocks.0.up")
        (False, True)
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __call__(self, name: str) -> bool:
        return fits(name, self.include) and not fits(name, self.exclude)

    @property
    def is_everything(self) -> bool:
        """Whether the selection includes every parameter of any model."""
        return "*" in self.include and not self.exclude


EVERYTHING = Selection()
# So many names show how parameters are called.
MAX_NAMES = 20


def check_patterns(module: nn.Module, selection: Selection) -> None:
    """Raises ValueError if a pattern matches no parameter, trainable or not, since it is probably mistyped.

    Raises:
        ValueError: If a pattern matches nothing. The message names the pattern and some of the parameters.
    """
    names = [clean_name(name) for name, _ in module.named_parameters()]
    for argument, patterns in (("include", selection.include), ("exclude", selection.exclude)):
        for pattern in patterns:
            if not any(fits(name, pattern) for name in names):
                known = ", ".join([*names[:MAX_NAMES], *(["..."] if len(names) > MAX_NAMES else [])])
                raise ValueError(f"{argument}={pattern!r} fits no parameter; there are {known}")
