"""Selects the parts of a model to merge, and the routers to compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from merge_callback.live.names import Selection, check_patterns
from merge_callback.utilities.checks import patterns
from merge_callback.validation.routers import Routers


@dataclass(frozen=True)
class Parts:
    """The parts of a model that are merged; the others stay live, as frozen parameters do.

    Args:
        include: Patterns (``"*lora*"``) of the names of parameters to merge; ``"*"`` fits all.
        exclude: Patterns (``"*.router.*"``) of parameters to leave live. A tied parameter goes by its first name.
        routers: The routers of a mixture of experts, for ``merge/router_agreement``; see `Routers`. None compares none.

    Raises:
        ValueError: If ``include`` is empty.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> Parts(exclude="*.router.*").selection("blocks.0.router.weight")
        False
    """

    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    routers: Routers | None = None

    def __post_init__(self) -> None:
        if not self.selection.include:
            raise ValueError(f"include must name at least one pattern, got {self.include!r}")
        if not isinstance(self.routers, Routers | None):
            raise TypeError(f"routers must be a Routers or None, got {self.routers!r}")

    @cached_property
    def selection(self) -> Selection:
        """The selection that decides by name whether a parameter is merged."""
        return Selection(patterns("include", self.include), patterns("exclude", self.exclude))

    def check(self, module: nn.Module) -> None:
        """Raises ValueError if a pattern fits nothing in the module, since it is probably mistyped."""
        check_patterns(module, self.selection)
        if self.routers is not None:
            self.routers.find(module)
