"""Read out of a metric's name which of its values are better."""

from __future__ import annotations

import re
from typing import Literal

_SMALLER = {"loss", "error", "err", "nll", "bce", "mse", "mae", "rmse", "mape", "perplexity", "ppl"}
_SMALLER |= {"ece", "brier", "wer", "cer"}
_LARGER = {"acc", "accuracy", "auc", "auroc", "f1", "precision", "recall", "iou", "miou", "r2"}
_LARGER |= {"psnr", "ssim", "bleu", "rouge", "ndcg", "mrr"}
# A name with one of these does not say which values are better: a gap between two accuracies should be small.
_UNCLEAR = {"neg", "negative", "minus", "inverse", "gap", "drop", "diff", "difference", "delta", "change", "std"}
_UNCLEAR |= {"reduction", "improvement", "ratio", "gain", "decrease", "increase", "skill", "free", "explained"}
_UNCLEAR |= {"var", "variance", "uncertainty", "spread", "norm", "entropy", "scale", "weight"}
# A map may be a picture, and a Dice loss is often named "dice".
_UNCLEAR |= {"map", "ap", "dice"}


def mode_of(metric: str) -> Literal["min", "max"] | None:
    """Return whether the best value of a metric is its smallest, from words in its name; ``None`` if they do not say.

    Example::

        >>> mode_of("val_loss"), mode_of("valid/accuracy"), mode_of("score")
        ('min', 'max', None)
        >>> mode_of("neg_loss"), mode_of("-loss"), mode_of("1 - accuracy"), mode_of("accuracy_gap")
        (None, None, None, None)
    """
    words = re.findall("[a-z0-9]+", metric.lower())
    smaller, larger = not _SMALLER.isdisjoint(words), not _LARGER.isdisjoint(words)
    subtracted = re.search(r"(?<!top)(?<!top.)(?<![a-z0-9])(1|one)[^a-z0-9]+[a-z]", metric.lower())
    negated = re.search(r"(?<![a-z0-9])-", metric.lower())
    if smaller == larger or subtracted or negated or not _UNCLEAR.isdisjoint(words):
        return None
    return "min" if smaller else "max"
