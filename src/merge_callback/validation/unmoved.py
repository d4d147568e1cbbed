"""Notices merges that do not reach the model: their values are those of the live weights, digit by digit."""

from collections.abc import Mapping

from merge_callback.live.evaluate import LoggedValue
from merge_callback.utilities.messages import Messages

# So many validations in a row are no coincidence, as one may be where only an accuracy is logged.
NUM_VALIDATIONS = 3


class UnmovedValues:
    """Warns if all values of a merge equal the live ones although its weights differ.

    Args:
        messages: Where the warning goes.
    """

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        self._num_equal = 0

    def look(self, merged: Mapping[str, LoggedValue], live: Mapping[str, LoggedValue], spread: float) -> None:
        """Compares the values of a validation.

        Args:
            merged: Metric -> value of the merge.
            live: Metric -> live value.
            spread: Distance of the merged snapshots from their merge; zero if all weights are the same.
        """
        pairs = [(merged[name].value, live[name].value) for name in merged.keys() & live.keys()]
        is_equal = bool(pairs) and spread > 0 and all(float(ours) == float(theirs) for ours, theirs in pairs)
        self._num_equal = self._num_equal + 1 if is_equal else 0
        if self._num_equal == NUM_VALIDATIONS:
            self._messages.warn(
                f"the merge has had exactly the values of the live model {NUM_VALIDATIONS} times, although its weights"
                " differ; does a validation hook replace the weights, or does the model read them through a view that"
                " was made before?",
                "unmoved",
            )
