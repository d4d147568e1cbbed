"""What a callback tells its user."""

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn


class Messages:
    """Messages under a callback's name, on one rank; what has a topic is said once a fit.

    Args:
        name: Of the callback.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: set[str] = set()

    def begin(self) -> None:
        """Another fit: every topic may be said again."""
        self._said.clear()

    def say(self, text: str, topic: str) -> None:
        """For whoever reads along."""
        if topic not in self._said:
            self._said.add(topic)
            rank_zero_info(f"{self._name}: {text}")

    def warn(self, text: str, topic: str | None = None) -> None:
        """For whoever has to know; without a topic every time."""
        if topic in self._said:
            return
        if topic is not None:
            self._said.add(topic)
        rank_zero_warn(f"{self._name}: {text}")
