"""The tables of Ludwig's hyperopt; ``config/searching.py`` and ``search_settings.py`` say what is done with them."""

from __future__ import annotations

from llmfit.config.ludwig.rows import Table, idle, many, mapped, refused, table

__all__ = ["BINARY", "LOSS_OF", "SCORINGS", "SEARCHES", "SECTIONS"]

# scikit-learn's name of Ludwig's metric, whether more is better, and what it measures.
SCORINGS: dict[str, tuple[str, str, str]] = {
    "accuracy": ("balanced_accuracy", "maximize", "classes"),  # the mean over the classes; but see BINARY
    "accuracy_micro": ("accuracy", "maximize", "classes"),
    # Of one class, scorers must be told which: none asks the label "1".
    "precision": ("precision_macro", "maximize", "classes"),
    "recall": ("recall_macro", "maximize", "classes"),
    "roc_auc": ("roc_auc_ovr", "maximize", "classes"),  # with two classes the same as roc_auc
    "r2": ("r2", "maximize", "numbers"),
    "mean_squared_error": ("neg_mean_squared_error", "minimize", "numbers"),
    "mean_absolute_error": ("neg_mean_absolute_error", "minimize", "numbers"),
    "mean_absolute_percentage_error": ("neg_mean_absolute_percentage_error", "minimize", "numbers"),
    "root_mean_squared_error": ("neg_root_mean_squared_error", "minimize", "numbers"),
    "softmax_cross_entropy": ("neg_log_loss", "minimize", "classes"),
    "binary_weighted_cross_entropy": ("neg_log_loss", "minimize", "classes"),
}
BINARY = {
    "accuracy": "accuracy"
}  # unless the type is category: of a binary target Ludwig has another metric of that name
LOSS_OF = {"classes": "neg_log_loss", "numbers": "neg_mean_squared_error"}  # of one target
# Kind of search of Ludwig's algorithm; None is a grid where every axis lists its values, else so many draws.
SEARCHES: dict[str, str | None] = {"variant_generator": None, "random": None, "optuna": "optuna"}

_ELSEWHERE = "trials run one after another, in the process that calls fit"
_OF_ONE = "a setting of an algorithm that is refused"
HYPEROPT: Table = table(
    mapped("parameters", "axes of the search, by Ludwig's paths or llmfit's names", "mapping"),
    mapped(
        "metric",
        "scoring, by scikit-learn's names; 'loss' is the loss of the kind of target. Refused where it measures another "
        "kind of target than there is, and for sets, texts and several targets but numbers alone: there the "
        "estimator's own score is what is measured. Accuracy is the mean over the classes of a category, and else "
        "the share of right rows, as of a binary target in Ludwig. Precision and recall are the mean over all classes, "
        "where Ludwig has those of the positive class of a binary target; see metrics of a search",
        "text",
        "loss",
    ),
    mapped(
        "goal",
        "must be the metric's own direction, as scikit-learn's scores are better when greater",
        "text",
        "minimize",
    ),
    mapped("output_feature", "the target, or 'combined', which it must be with several targets", "text", "combined"),
    mapped("search_alg", "kind; see hyperopt.search_alg", "spec"),
    mapped("executor", "n_iter; see hyperopt.executor", "mapping"),
    refused("split", "candidates are measured by cross-validation.", "validation"),
    refused("eval_split", "candidates are measured by cross-validation.", "validation"),
)
SEARCH_ALG: Table = table(
    mapped("type", "kind: a grid or 'random' for variant_generator and random, 'optuna'; others are refused", "text"),
    many(
        "random_state seed random_state_seed",
        mapped,
        "random_state; a grid draws nothing, so that it changes nothing there",
        "int",
    ),
    many("points_to_evaluate evaluated_rewards", refused, "a search starts from nothing.", []),
    refused("constant_grid_search", "a grid holds every combination.", False),
    many("max_concurrent parallel_num", idle, _ELSEWHERE),
    many(
        "space dim_dict parameter_constraints outcome_constraints utility_kwargs random_search_steps", refused, _OF_ONE
    ),
    many("verbose patience skip_duplicate bohb_config optimizer domain n_initial_points gamma", refused, _OF_ONE),
    many("optimizer_kwargs convert_to_python algo budget", refused, _OF_ONE),
)
EXECUTOR: Table = table(
    mapped("type", "'ray' runs here as it is; 'optuna' is kind 'optuna'", "text", "ray"),
    mapped(
        "num_samples",
        "n_iter. Beside axes that are all a grid_search it repeats the grid in Ludwig, with the same seed; here each "
        "candidate is tried once, on every fold. Refused with kind: grid over other lists",
        "int",
        10,
    ),
    refused("time_budget_s", "a search runs until its candidates are done.", 3600),
    refused(
        "scheduler",
        "say kind: halving in hyperopt, or kind: fused_halving, which halves over epochs.",
        {},
        {"type": "fifo"},
        "fifo",
    ),
    many("trial_driver_resources cpu_resources_per_trial gpu_resources_per_trial", idle, _ELSEWHERE),
    many("kubernetes_namespace max_concurrent_trials", idle, _ELSEWHERE),
)
PARAMETER: Table = table(
    mapped(
        "space",
        "choice and grid_search list values, of which a grid_search has every one tried: beside it nothing is drawn; "
        "uniform, loguniform and randint are ranges; others are refused. The upper "
        "end of randint is never drawn, as in Ray Tune; Ludwig's executor 'optuna' draws it: add 1 for that",
    ),
    mapped("categories", "values", "list"),
    mapped("values", "values", "list"),
    many("lower upper", mapped, "the ends of a range", "number"),
    refused("q", "values are not rounded to steps."),
    refused("base", "a logarithm's base changes no distribution here.", 10, 2),
    many("mean sd", refused, "there are no ranges without ends."),
)
SECTIONS: dict[str, Table] = {
    "hyperopt": HYPEROPT,
    "hyperopt.search_alg": SEARCH_ALG,
    "hyperopt.executor": EXECUTOR,
    "hyperopt.parameters.<axis>": PARAMETER,
}
