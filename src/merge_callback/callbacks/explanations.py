"""Explains to the user why nothing is captured, and what a window costs."""

from collections.abc import Callable, Iterable

from torch import nn
from torch.optim import Optimizer

from merge_callback.capture.capture import SnapshotCapture
from merge_callback.capture.memory import mebibytes
from merge_callback.capture.merge_set import MergeSet
from merge_callback.live.weights import training_bytes
from merge_callback.utilities.messages import Messages

# A smaller ring is no burden, however small the model is.
LARGE_RING_BYTES = 2**30


def explain_phase(
    merges: MergeSet, messages: Messages, step: int, planned_steps: Callable[[], float], *, is_end: bool = False
) -> None:
    """Says once that the window is frozen, or why there is none.

    Args:
        merges: The merges of the run.
        messages: Where it is said.
        step: Optimizer steps so far.
        planned_steps: Returns the length of the run in steps: infinite if unknown, zero if it is over.
        is_end: Whether the run is over.
    """
    window, steps = merges.capture.window, merges.capture.steps
    if not window.is_frozen:
        return
    if merges.are_any_ready:
        size = f"{len(steps)} snapshot{'s' if len(steps) > 1 else ''}"
        kept = f"the window of {size} up to step {steps[-1]}" if steps else "the average"
        messages.say(
            f"the learning rate moved at step {step}: {kept} stays as it is until the rate is constant again",
            "frozen",
        )
    elif window.phase.never_settled(planned_steps()):
        messages.warn(
            f"the learning rate was not constant in {window.phase.num_unsettled_steps} steps (a cosine"
            " schedule? a schedule-free optimizer?), so nothing was captured. start='any' captures whatever the rate"
            " does, and start=STEP from a step on; what the merge says about annealing then is less certain",
            "unsettled",
        )
    elif window.phase.num_waiting_steps and not is_end:
        messages.say(
            "the learning rate is set rarely, so capturing begins once it has been set again to the same value;"
            " start='any' captures whatever it does, and start=STEP from a step on",
            "waiting",
        )


def explain_costs(
    capture: SnapshotCapture, messages: Messages, module: nn.Module, optimizers: Iterable[Optimizer], *, is_saved: bool
) -> None:
    """Says once by how much checkpoints grow, and warns of a ring that is larger than all else that is trained.

    Call it after an optimizer step, when the optimizers have their states.

    Args:
        capture: What the run captures.
        messages: Where it is said.
        module: The module that is trained.
        optimizers: Its optimizers.
        is_saved: Whether checkpoints with the captured tensors are saved.
    """
    if messages.is_said("costs") or (costs := capture.costs) is None:
        return
    trained = training_bytes(module, optimizers)
    ring = costs.ring_bytes
    text = ""
    if capture.storage.in_checkpoints and is_saved:
        sizes = f"{mebibytes(trained)} -> {mebibytes(trained + costs.checkpoint_bytes)}"
        where = " on each rank" if capture.sharding.is_sharded else ""
        text = f"each checkpoint {sizes}{where}, once the window is full"
    if ring <= max(trained, LARGE_RING_BYTES):
        messages.say(text, "costs")
        return
    large = f"the window takes {mebibytes(ring)}, and model and optimizer {mebibytes(trained)}"
    advice = "four means in bfloat16 (num_snapshots=4, snapshot='mean', dtype='bfloat16') merge about as well"
    if capture.storage.merge_device is None:
        advice += "; storage='cpu' or a directory leaves the device alone"
    messages.warn(f"{'; '.join(filter(None, (large, text)))}. For less, {advice}", "costs")
