"""Pictures of a fit, of answers and of a search: one function each.

Takes a fitted estimator or what it gives (its history, predictions, probabilities, a search), and an Axes to draw in;
draws in a new figure where there is none; gives scikit-learn's display where it has one, else the Axes. Knows no torch;
matplotlib is imported when something is drawn.
"""

from llmfit.plots.answers import confusion_matrix, predicted_against_true, reliability
from llmfit.plots.fits import learning_curve, token_lengths
from llmfit.plots.searching import search_results

__all__ = [
    "confusion_matrix",
    "learning_curve",
    "predicted_against_true",
    "reliability",
    "search_results",
    "token_lengths",
]
