"""Names of a model's tensors as its author wrote them, and patterns that select some of them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

from torch import nn

# Names that wrappers put into the path of a parameter: torch.compile, activation checkpointing, FSDP.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def clean_name(name: str) -> str:
    """The name that a tensor has in the module as its author wrote it, without what wrappers add.

    Examples:
        >>> clean_name("gpt._orig_mod.blocks.0._checkpoint_wrapped_module.mlp.weight")
        'gpt.blocks.0.mlp.weight'
    """
    return _WRAPPERS.sub("", name)


def fits(name: str, patterns: str | Iterable[str]) -> bool:
    """Whether a name fits one pattern, or any of several.

    Examples:
        >>> fits("norm.running_var", "*running_var"), fits("norm.weight", ["*bias", "*running_var"])
        (True, False)
    """
    return any(fnmatch(name, pattern) for pattern in ((patterns,) if isinstance(patterns, str) else patterns))


@dataclass(frozen=True)
class Selection:
    """Which parameters are merged, by patterns of their clean names; the others stay live.

    Args:
        include: One of these has to fit; ``"*"`` fits all.
        exclude: None of these may fit.

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
        """Whether it leaves nothing out, whatever the model."""
        return "*" in self.include and not self.exclude


EVERYTHING = Selection()


def check_patterns(module: nn.Module, selection: Selection) -> None:
    """Raises if a pattern fits no parameter, trainable or not: it would be mistyped.

    Raises:
        ValueError: The message names the pattern, and the parameters that there are.
    """
    names = [clean_name(name) for name, _ in module.named_parameters()]
    for argument, patterns in (("include", selection.include), ("exclude", selection.exclude)):
        for pattern in patterns:
            if not any(fits(name, pattern) for name in names):
                raise ValueError(f"{argument}={pattern!r} fits no parameter; there are {', '.join(names)}")
