"""Whether more of a metric is better: by what monitors it, or by its name."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Words in names of metrics where more is better.
_MORE = frozenset(
    """
    acc accuracy auc auprc auroc ap bleu chrf dice exactmatch em f1 fscore hits iou jaccard kappa map
    mcc meteor miou mrr ndcg pearson precision psnr r2 recall reward rouge score sensitivity spearman
    specificity ssim success
    """.split()  # noqa: SIM905 - lists of words
)
# Words in names where less is better. They decide where both kinds occur.
_LESS = frozenset(
    """
    bpb bpc brier cer crossentropy distance divergence ece entropy err error errors fid fpr kl loss
    losses mae mape mse nll perplexity ppl regret rmse wer
    """.split()  # noqa: SIM905 - lists of words
)
# Words in names of what is no quality at all.
_NEITHER = frozenset(["batch", "count", "epoch", "iteration", "lr", "num", "seconds", "size", "step", "steps", "time"])
# Prefixes of the names that a callback logs for a merge.
_OF_MERGES = re.compile(r"^merged(_[A-Za-z0-9_.-]+)?/")


def more_is_better(metric: str) -> bool | None:
    """Returns whether more of a metric is better, by the words in its name; None if they do not tell.

    Examples:
        >>> more_is_better("val/acc@5"), more_is_better("val_loss"), more_is_better("score_error")
        (True, False, False)
        >>> more_is_better("valAccuracy"), more_is_better("rouge2"), more_is_better("diversity")
        (True, True, None)
    """
    words = set(_words(metric))
    if any(word in _LESS or word.endswith(("loss", "error")) for word in words):
        return False
    return True if any(word in _MORE or word.endswith(("accuracy", "score")) for word in words) else None


def is_a_quality(metric: str) -> bool:
    """Returns whether a metric may say how good a model is, other than a count, a time or a learning rate."""
    return not _NEITHER & set(_words(plain_name(metric)))


def plain_name(metric: str) -> str:
    """Returns the name under which a module has logged a metric, without what Lightning adds to it.

    Examples:
        >>> plain_name("acc_epoch"), plain_name("acc/dataloader_idx_0")
        ('acc', 'acc')
    """
    return metric.partition("/dataloader_idx_")[0].removesuffix("_epoch")


def first_loss(metrics: Mapping[str, bool]) -> str | None:
    """Returns the metric to show where there is room for one: the first loss, else the first quality, else the first.

    Args:
        metrics: Metric -> whether more of it is better. The result is None if there is none.

    Examples:
        >>> first_loss({"step": False, "accuracy": True, "loss": False})
        'loss'
    """
    qualities = [metric for metric in metrics if is_a_quality(metric)]
    losses = [metric for metric in qualities if not metrics[metric]]
    return next(iter([*losses, *qualities, *metrics]), None)


def first_loss_by_name(metrics: Iterable[str]) -> str | None:
    """Returns the same as `first_loss`, where only names are known."""
    return first_loss({metric: more_is_better(metric) is not False for metric in metrics})


def _words(metric: str) -> Iterable[str]:
    # Between a small and a capital letter another word may begin.
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", metric)
    for word in re.split(r"[^a-z0-9]+", f"{metric} {parted}".lower()):
        yield word
        yield word.rstrip("0123456789")


def monitored(callbacks: Iterable[Any]) -> dict[str, bool]:
    """Returns plain metric -> whether more is better, according to callbacks with a ``monitor`` and a ``mode``.

    The monitor of a merged value tells of the live one.
    """
    found: dict[str, bool] = {}
    for callback in callbacks:
        monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        if isinstance(monitor, str) and mode in ("min", "max"):
            found.setdefault(plain_name(_OF_MERGES.sub("", monitor)), mode == "max")
    return found
