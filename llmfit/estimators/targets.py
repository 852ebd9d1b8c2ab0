"""Labels as a user writes them: one a row, or several as lists or as the columns of an indicator.

Takes Series and 2-d indicators; gives classes, their positions, weights of rows, and answers in the form in which the
labels came. Knows no model.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from datetime import date, timedelta
from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from llmfit.exceptions import DataError, ParameterError, check_number, parameter_error, quoted
from llmfit.features import is_set, label_text, row_name
from llmfit.frames import Table

TIMES = (date, timedelta, np.datetime64, np.timedelta64, pd.Period)

__all__ = [
    "answer_sets",
    "check_apart",
    "check_class_weight",
    "check_classes",
    "check_known",
    "chosen_sets",
    "class_weights",
    "holds_times",
    "indicator_form",
    "join_classes",
    "label_values",
    "learn_classes",
    "log_normalised",
    "one_column",
    "set_texts",
    "set_values",
    "to_indicator",
    "warn_of_unseen",
]


def label_values(y: pd.Series) -> np.ndarray:
    """Take labels as NumPy values of their own kind: nullable and categorical types undone."""
    dtype = y.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        return label_values(pd.Series(y.astype(object).to_numpy()))
    if pd.api.types.is_extension_array_dtype(dtype) and hasattr(dtype, "numpy_dtype"):
        kind = dtype.numpy_dtype
        return np.asarray(y.to_numpy(dtype=kind if kind.kind in "biuf" else object))
    return np.asarray(y.infer_objects().to_numpy())


def holds_times(y: pd.Series) -> bool:
    """Tell a target with dates, times of a day or spans of time in it, whatever its dtype."""
    return not pd.api.types.is_numeric_dtype(y.dtype) and any(isinstance(cell, TIMES) for cell in y.astype(object))


def learn_classes(y: pd.Series, form: dict[str, Any] | None = None) -> np.ndarray:
    """Find the classes of a target, sorted; of an indicator, its columns.

    Raises
    ------
    DataError
        If the labels cannot be classes.
    """
    if form is not None and "columns" in form:
        return np.array(form["columns"])
    labels = y if form is None else pd.Series([label for labels in set_values(y) for label in labels])
    if holds_times(labels):
        raise DataError(
            f"The labels of {y.name!r} are dates or times ({y.dtype}). Make them text first, for example with "
            f"df[{y.name!r}].astype(str)."
        )
    values = label_values(labels)
    try:
        classes = np.unique(values)
    except TypeError:
        kinds = sorted({type(value).__name__ for value in values})
        raise DataError(f"The labels of {y.name!r} are of kinds that cannot be sorted: {', '.join(kinds)}.") from None
    try:
        with warnings.catch_warnings():
            if values.dtype.kind not in "iufb":  # words are no numbers to regress on, however many there are
                warnings.filterwarnings("ignore", message="The number of unique classes")
            if len(values):
                check_classification_targets(values)
    except ValueError as error:
        raise DataError(f"The labels of {y.name!r} are no classes: {error}") from None
    return classes


def join_classes(before: np.ndarray, classes: np.ndarray, y: pd.Series, dtype: Any) -> np.ndarray:
    """Join the classes of the last fit with those of a target of the same dtype."""
    if y.dtype != dtype:
        raise DataError(f"warm_start goes on with labels of dtype {dtype}, but {y.name!r} is {y.dtype}.")
    return np.union1d(before, classes)


def check_class_weight(given: Any, owner: str) -> None:
    """Raise unless weights of classes are in one of the forms accepted."""
    if not (given is None or isinstance(given, dict) or (isinstance(given, str) and given == "balanced")):
        raise parameter_error("class_weight", owner, "None, 'balanced' or a dict", given)
    for label, weight in given.items() if isinstance(given, dict) else ():
        check_number(f"class_weight[{label!r}]", owner, weight, least=0)


def check_apart(ids: Sequence[tuple[int, ...]], texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Give the tokens of classes back, unless they do not tell them apart."""
    if len(set(ids)) < len(ids):
        raise DataError(f"Two of the classes {quoted(texts)} are the same tokens to this model. Rename one.")
    return list(ids)


def check_classes(
    classes: np.ndarray, y: pd.Series, form: dict[str, Any] | None, owner: str, *, binary: bool = False
) -> None:
    """Refuse classes that are too few, too many for a target declared as binary, or that read alike."""
    if len(classes) < (2 if form is None else 1):
        least, what = "one label", "every row is empty"
        if form is None:
            least, what = "two classes", f"every row is {classes[0]!r}: only one class"
        raise DataError(f"{owner} needs at least {least} in {y.name!r}, but {what}.")
    if binary and len(classes) > 2:
        raise DataError(f"The target {y.name!r} is declared as 'binary', but has {len(classes)} classes.")
    texts = [label_text(value) for value in classes]
    if len(set(texts)) < len(texts) or "" in texts:
        raise DataError(f"Each class of {y.name!r} needs a text of its own that is not empty. Got {quoted(texts)}.")


def check_known(y: pd.Series, classes: np.ndarray, form: dict[str, Any] | None) -> None:
    """Refuse a label, of rows to validate on, that is no class."""
    known = {label_text(label) for label in classes}  # by their texts, which are what is trained on: True is no 1
    rows = [[label] for label in label_values(y).tolist()] if form is None else set_values(y)
    for row, labels in enumerate(rows):
        for label in labels:
            if label_text(label) not in known:
                raise DataError(
                    f"{row_name(row, y.index)} has the label {label!r}, which no fitted row has. "
                    f"The classes are {quoted(classes.tolist())}."
                )


def chosen_sets(log_proba: np.ndarray, classes: np.ndarray) -> list[list[Any]]:
    """List every row's labels that are likelier than not."""
    chosen = log_proba >= np.log(0.5)
    return [[label for label, has in zip(classes.tolist(), row, strict=True) if has] for row in chosen]


def warn_of_unseen(truth: np.ndarray, classes: np.ndarray) -> None:
    """Say how many true labels no fitted row had: they cannot be answered."""
    from llmfit.metrics import warn_unseen

    known = set(classes.tolist())
    unseen = [label for label in truth.tolist() if label not in known]
    if unseen:
        warn_unseen(unseen, "score", "")


def class_weights(given: Any, y: pd.Series, classes: np.ndarray, form: dict[str, Any] | None) -> np.ndarray:
    """Weigh rows by their class; of several labels, by the mean of their weights, and by 1 where there is none.

    Raises
    ------
    ParameterError
        If a label is weighed that is no class.
    """
    known = classes.tolist()
    for label in given if isinstance(given, dict) else ():
        if label not in known:
            raise ParameterError(f"class_weight names the label {label!r}; the classes are {quoted(known)}.")
    rows = [[value] for value in label_values(y).tolist()] if form is None else set_values(y)
    counts = dict.fromkeys(known, 0)
    for label in (label for labels in rows for label in labels):
        counts[label] += 1
    present = [label for label in known if counts[label]]
    if isinstance(given, dict):
        weights = {label: float(given.get(label, 1.0)) for label in present}
    else:
        total = sum(counts.values())
        weights = {label: total / (len(present) * counts[label]) for label in present}
    return np.array([np.mean([weights[label] for label in labels]) if labels else 1.0 for labels in rows])


def log_normalised(scores: np.ndarray) -> np.ndarray:
    """Turn scores of classes, (n_rows, n_classes), into logarithms of probabilities."""
    log_proba: np.ndarray = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    return log_proba


# Several labels a row -----------------------------------------------------------------------------------


def indicator_form(y: Any) -> dict[str, Any] | None:
    """Describe a target whose columns say which labels a row has; None where it is none.

    Returns
    -------
    dict or None
        columns (the labels), dtype, and whether it came as a frame.
    """
    nested = isinstance(y, list) and len(y) > 0 and isinstance(y[0], list | tuple | np.ndarray)
    if not nested and len(getattr(y, "shape", ())) != 2:
        return None
    try:
        several = type_of_target(y) == "multilabel-indicator"
    except (TypeError, ValueError):  # rows of different lengths, or of values that cannot be sorted
        return None
    if not several:
        return None
    framed = isinstance(y, pd.DataFrame)
    array = np.asarray(y) if not hasattr(y, "toarray") else y.toarray()
    columns = [str(name) for name in y.columns] if framed else list(range(array.shape[1]))
    return {"columns": columns, "dtype": str(array.dtype), "frame": framed}


def one_column(y: Any, form: dict[str, Any] | None) -> Any:
    """Write an indicator as one column of tuples of labels; anything else stays what it is."""
    if form is None:
        return y
    array = np.asarray(y) if not hasattr(y, "toarray") else y.toarray()
    labels = [tuple(name for name, has in zip(form["columns"], row, strict=True) if has) for row in array]
    return pd.Series(labels, index=y.index if form["frame"] else None, dtype=object)


def set_values(y: pd.Series) -> list[list[Any]]:
    """Take every row's labels as a list without repetitions.

    Raises
    ------
    DataError
        If a cell holds no list, tuple or set; the row is named.
    """
    for row, cell in enumerate(y):
        if not is_set(cell):
            raise DataError(
                f"{row_name(row, y.index)}: the target {y.name!r} must hold a list, tuple or set of labels in every "
                f"row. Got {cell!r} instead."
            )
    return [list(dict.fromkeys(cell)) for cell in y]


def set_texts(y: pd.Series) -> list[str]:
    """Write every row's labels as one text."""
    return [", ".join(map(label_text, labels)) for labels in set_values(y)]


def to_indicator(y: pd.Series, classes: np.ndarray) -> np.ndarray:
    """Say of every row and class whether the row has it: bool, (n_rows, n_classes); other labels are left out."""
    known = list(map(label_text, classes))  # as in `check_known`
    rows: list[Collection[Any]] = [set(map(label_text, labels)) for labels in set_values(y)]
    return np.array([[label in labels for label in known] for labels in rows], dtype=bool).reshape(-1, len(known))


def answer_sets(table: Table, chosen: list[list[Any]], form: dict[str, Any], name: str) -> Any:
    """Give the chosen labels back in the form in which those of `fit` came."""
    if "columns" in form:
        array = np.array([[label in labels for label in form["columns"]] for labels in chosen]).astype(form["dtype"])
        array = array.reshape(len(chosen), len(form["columns"]))
        framed = form["frame"] and not table.as_array
        return pd.DataFrame(array, index=table.frame.index, columns=form["columns"]) if framed else array
    lists = np.empty(len(chosen), dtype=object)
    for row, labels in enumerate(chosen):
        lists[row] = labels
    return table.answer(lists, name)
