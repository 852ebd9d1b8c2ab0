"""How good the answers are: one function per kind of output, each from plain arrays to a dict.

Takes true and answered labels or texts, and the class probabilities; gives dicts of Python floats and pandas frames.
"""

from llmfit.metrics.builtin import classification_metrics, text_metrics, token_f1, warn_unseen
from llmfit.metrics.extra import extra_metrics, metric_list
from llmfit.metrics.heads import regression_metrics, set_metrics

__all__ = [
    "classification_metrics",
    "extra_metrics",
    "metric_list",
    "regression_metrics",
    "set_metrics",
    "text_metrics",
    "token_f1",
    "warn_unseen",
]
