"""Metrics: numbers worked out by hand, the same numbers as scikit-learn, and whole sentences."""

from __future__ import annotations

import doctest
import functools
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

from llmfit import metrics
from llmfit.exceptions import DataError, DataWarning, LLMFitWarning, ParameterError
from llmfit.metrics import builtin, classification_metrics, extra, extra_metrics, text_metrics

pytestmark = pytest.mark.filterwarnings("error")

SCALARS = (
    "accuracy",
    "balanced_accuracy",
    "f1_macro",
    "f1_weighted",
    "precision_macro",
    "recall_macro",
    "log_loss",
    "roc_auc",
)


def one_hot(codes: list[int], k: int) -> np.ndarray:
    """Give probabilities that put 0.8 on one class and share 0.2 among the others."""
    proba = np.full((len(codes), k), 0.2 / max(k - 1, 1))
    proba[np.arange(len(codes)), codes] = 0.8 if k > 1 else 1.0
    return proba


# --- classification: by hand ---------------------------------------------------------------------------


def binary_case(**options: Any) -> dict[str, Any]:
    """Score four rows: one "no" and three "yes", of which the third is answered "no"."""
    classes = np.array(["no", "yes"])
    proba = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.95, 0.05]])[[0, 1, 2, 1]]
    return classification_metrics(
        pd.Series(["no", "yes", "yes", "yes"]),
        np.array(["no", "yes", "no", "yes"]),
        proba,
        classes,
        **options,
    )


def test_binary_by_hand() -> None:
    result = binary_case()
    assert result["accuracy"] == 3 / 4
    assert result["balanced_accuracy"] == pytest.approx((1 / 1 + 2 / 3) / 2)
    # no: precision 1/2, recall 1, f1 2/3. yes: precision 1, recall 2/3, f1 4/5.
    assert result["precision_macro"] == pytest.approx((1 / 2 + 1) / 2)
    assert result["recall_macro"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert result["f1_weighted"] == pytest.approx((1 * 2 / 3 + 3 * 4 / 5) / 4)
    assert result["log_loss"] == pytest.approx(-(math.log(0.9) + 2 * math.log(0.8) + math.log(0.4)) / 4)
    assert result["roc_auc"] == 1.0  # 0.8, 0.4 and 0.8 are all above the 0.1 of the only "no"


def test_the_keys_and_their_types() -> None:
    result = binary_case()
    assert list(result) == [*SCALARS, "confusion_matrix"]
    assert all(type(result[key]) is float for key in SCALARS)
    assert list(binary_case(per_class=True)) == [*SCALARS, "confusion_matrix", "per_class"]


def test_confusion_matrix_has_true_rows_and_predicted_columns() -> None:
    matrix = binary_case()["confusion_matrix"]
    wanted = pd.DataFrame(
        [[1, 0], [1, 2]],
        index=pd.Index(["no", "yes"], name="true"),
        columns=pd.Index(["no", "yes"], name="predicted"),
    )
    pd.testing.assert_frame_equal(matrix, wanted)


def test_per_class_by_hand() -> None:
    table = binary_case(per_class=True)["per_class"]
    assert table.index.tolist() == ["no", "yes"]
    assert table.columns.tolist() == ["precision", "recall", "f1", "support"]
    assert table.loc["no"].tolist() == pytest.approx([1 / 2, 1, 2 / 3, 1])
    assert table.loc["yes"].tolist() == pytest.approx([1, 2 / 3, 4 / 5, 3])
    assert pd.api.types.is_integer_dtype(table["support"])


def test_roc_auc_of_two_classes_counts_ordered_pairs() -> None:
    # P(yes) of the two "yes" rows 0.7, 0.4 and of the two "no" rows 0.5, 0.1: 3 of 4 pairs are in order.
    proba = np.array([[0.3, 0.7], [0.6, 0.4], [0.5, 0.5], [0.9, 0.1]])
    result = classification_metrics(
        ["yes", "yes", "no", "no"], ["yes", "no", "no", "no"], proba, np.array(["no", "yes"])
    )
    assert result["roc_auc"] == 3 / 4


# --- classification: as scikit-learn -------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_same_numbers_as_scikit_learn(k: int, dtype: Any) -> None:
    rng = np.random.default_rng(k)
    classes = np.array(["a", "b", "c", "d"])[:k]
    proba = rng.dirichlet(np.ones(k), size=60).astype(dtype)
    true, pred = classes[rng.integers(0, k, 60)], classes[proba.argmax(axis=1)]
    result = classification_metrics(true, pred, proba, classes, per_class=True)
    exact = proba.astype(np.float64) / proba.astype(np.float64).sum(axis=1, keepdims=True)
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(true, pred)
    area = (
        sklearn.metrics.roc_auc_score(true, exact[:, 1])
        if k == 2
        else sklearn.metrics.roc_auc_score(true, exact, multi_class="ovr", average="macro")
    )
    wanted = {
        "accuracy": sklearn.metrics.accuracy_score(true, pred),
        "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(true, pred),
        "f1_macro": sklearn.metrics.f1_score(true, pred, average="macro"),
        "f1_weighted": sklearn.metrics.f1_score(true, pred, average="weighted"),
        "precision_macro": sklearn.metrics.precision_score(true, pred, average="macro"),
        "recall_macro": sklearn.metrics.recall_score(true, pred, average="macro"),
        "log_loss": sklearn.metrics.log_loss(true, exact, labels=classes),
        "roc_auc": area,
    }
    assert {key: result[key] for key in SCALARS} == pytest.approx(wanted)
    matrix = sklearn.metrics.confusion_matrix(true, pred, labels=classes)
    np.testing.assert_array_equal(result["confusion_matrix"].to_numpy(), matrix)
    np.testing.assert_allclose(result["per_class"].to_numpy().T, [precision, recall, f1, support])


def test_classes_that_neither_side_has_do_not_lower_the_macro_scores() -> None:
    classes = np.array(["a", "b", "never"])
    result = classification_metrics(["a", "b"], ["a", "b"], one_hot([0, 1], 3), classes, per_class=True)
    assert result["f1_macro"] == result["precision_macro"] == result["recall_macro"] == 1.0
    assert result["per_class"].loc["never"].tolist() == [0, 0, 0, 0]
    assert result["confusion_matrix"].loc["never"].tolist() == [0, 0, 0]


def test_balanced_accuracy_where_an_answer_is_no_true_label() -> None:
    # sklearn's balanced_accuracy_score warns here; the number is the mean recall of "a" (1/2) and "b" (1).
    result = classification_metrics(["a", "a", "b"], ["a", "c", "b"], one_hot([0, 2, 1], 3), np.array(["a", "b", "c"]))
    assert result["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)


def test_many_classes_in_few_rows_do_not_warn() -> None:
    rng = np.random.default_rng(0)
    classes = np.arange(29)
    proba = rng.dirichlet(np.ones(29), size=30)
    result = classification_metrics(rng.integers(0, 29, 30), proba.argmax(axis=1), proba, classes)
    assert 0 < result["roc_auc"] < 1


# --- classification: edges -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "n"),
    [([7], 1), (["a", "b"], 2), ([3, 1, 2], 3), (["a", "b", "c", "d"], 4), ([False, True], 2)],
)
def test_all_right_for_one_to_four_classes_of_any_type(classes: list[Any], n: int) -> None:
    y = np.array(classes)
    result = classification_metrics(pd.Series(y), y, one_hot(list(range(n)), n), y, per_class=True)
    assert [result[key] for key in SCALARS[:6]] == [1.0] * 6
    assert result["log_loss"] == pytest.approx(-math.log(0.8) if n > 1 else 0.0)
    assert result["roc_auc"] == 1.0 if n > 1 else math.isnan(result["roc_auc"])
    assert result["confusion_matrix"].index.tolist() == classes
    assert result["per_class"].index.tolist() == classes
    np.testing.assert_array_equal(result["confusion_matrix"].to_numpy(), np.eye(n))


@pytest.mark.parametrize("kind", ["str", "category", "object"])
def test_pandas_dtypes_of_the_labels(kind: str) -> None:
    y = pd.Series(["b", "a"], dtype=kind, index=[10, 20])
    result = classification_metrics(y, y, one_hot([1, 0], 2), np.array(["a", "b"], dtype=object))
    assert result["accuracy"] == result["roc_auc"] == 1.0


def test_labels_of_mixed_types() -> None:
    classes = np.array([1, "one"], dtype=object)
    result = classification_metrics([1, "one", "one"], [1, "one", 1], one_hot([0, 1, 0], 2), classes)
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["confusion_matrix"].loc["one", 1] == 1


def test_nullable_and_numpy_integers_are_the_same_labels() -> None:
    y = pd.Series([0, 1], dtype="Int64")
    result = classification_metrics(y, np.array([0, 1], dtype=np.int8), one_hot([0, 1], 2), np.array([0, 1]))
    assert result["accuracy"] == 1.0


def test_classes_need_not_be_sorted() -> None:
    result = classification_metrics(["b", "a"], ["b", "a"], one_hot([0, 1], 2), np.array(["b", "a"]))
    assert result["log_loss"] == pytest.approx(-math.log(0.8))
    assert result["roc_auc"] == 1.0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_roc_auc_is_nan_where_one_class_is_present(k: int) -> None:
    result = classification_metrics([0, 0], [0, 0], one_hot([0, 0], k), np.arange(k))
    assert math.isnan(result["roc_auc"])
    assert result["accuracy"] == result["balanced_accuracy"] == result["f1_macro"] == 1.0
    assert result["log_loss"] == pytest.approx(-math.log(0.8) if k > 1 else 0.0)


def test_roc_auc_leaves_out_classes_that_are_absent() -> None:
    proba = np.array([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.55, 0.4, 0.05]])
    result = classification_metrics(["a", "b", "b"], ["a", "a", "a"], proba, np.array(["a", "b", "c"]))
    # a: 0.6 is above 0.5 and 0.55, area 1. b: of 0.2 and 0.4 one is above 0.3, area 1/2. c has no row.
    assert result["roc_auc"] == pytest.approx((1 + 1 / 2) / 2)


def test_a_probability_of_zero_gives_a_finite_log_loss() -> None:
    result = classification_metrics([0, 1], [0, 0], np.array([[1.0, 0.0], [1.0, 0.0]]), np.arange(2))
    assert math.isfinite(result["log_loss"])
    assert result["log_loss"] > 10


# --- classification: labels that fit never saw ---------------------------------------------------------


def test_unseen_labels_count_as_wrong_and_are_named() -> None:
    true = ["a", "x", "b", "y", "x"]
    with pytest.warns(DataWarning) as caught:
        result = classification_metrics(
            true, ["a", "a", "b", "b", "b"], one_hot([0, 0, 1, 1, 1], 2), np.array(["a", "b"]), per_class=True
        )
    assert [str(warning.message) for warning in caught] == [
        "evaluate: 3 rows hold labels that fit never saw: 'x', 'y'. "
        "They count as wrong; log_loss and roc_auc leave them out."
    ]
    assert result["accuracy"] == 2 / 5
    assert result["balanced_accuracy"] == 2 / 4  # recalls 1, 1, 0, 0
    assert result["precision_macro"] == pytest.approx((1 / 2 + 1 / 3) / 4)
    assert result["log_loss"] == pytest.approx(-math.log(0.8))
    assert result["roc_auc"] == 1.0
    matrix = result["confusion_matrix"]
    assert matrix.index.tolist() == matrix.columns.tolist() == ["a", "b", "x", "y"]
    assert matrix.loc["x"].tolist() == [1, 1, 0, 0]
    assert matrix.loc["y"].tolist() == [0, 1, 0, 0]
    assert result["per_class"].loc["x"].tolist() == [0, 0, 0, 2]


def test_one_unseen_row_has_its_own_sentence() -> None:
    with pytest.warns(DataWarning) as caught:
        result = classification_metrics([0, 5], [0, 1], one_hot([0, 1], 2), np.arange(2))
    assert [str(warning.message) for warning in caught] == [
        "evaluate: 1 row holds a label that fit never saw: 5. It counts as wrong; log_loss and roc_auc leave it out."
    ]
    assert result["accuracy"] == 1 / 2
    assert math.isnan(result["roc_auc"])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_row_with_a_known_label(k: int) -> None:
    with pytest.warns(DataWarning, match="2 rows hold labels that fit never saw: 'x'"):
        result = classification_metrics(["x", "x"], [0, 0], one_hot([0, 0], k), np.arange(k))
    assert math.isnan(result["log_loss"])
    assert math.isnan(result["roc_auc"])
    assert [result[key] for key in SCALARS[:6]] == [0.0] * 6


# --- classification: errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y_true", "y_pred", "shape", "sentence"),
    [
        ([], [], (0, 2), "evaluate needs at least one row. Got none."),
        (["a"], ["a", "b"], (1, 2), "evaluate needs one answer per row. Got 2 answers for 1 rows."),
        (["a", "b"], ["a", "b"], (2, 3), "evaluate: proba must have the shape (2, 2). Got (2, 3) instead."),
        (["a", None], ["a", "b"], (2, 2), "Row 1: y_true has no label. Drop the rows that have none."),
        (["a", "b"], [np.nan, "b"], (2, 2), "Row 0: y_pred has no label. Drop the rows that have none."),
    ],
)
def test_classification_errors(y_true: Any, y_pred: Any, shape: tuple[int, int], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        classification_metrics(y_true, y_pred, np.full(shape, 0.5), np.array(["a", "b"]))
    assert str(caught.value) == sentence


# --- text ----------------------------------------------------------------------------------------------


def test_exact_match_strips_both_sides() -> None:
    result = text_metrics([" Paris", "Rome", "Oslo"], ["Paris\n", "rome", "Oslo "])
    assert result["exact_match"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("reference", "prediction", "f1"),
    [
        ("The cat sat.", "a CAT, sat", 1.0),  # articles, case and punctuation do not count
        ("cat sat down", "cat sat", 0.8),  # precision 2/2, recall 2/3
        ("cat cat dog", "cat dog dog", 2 / 3),  # the bags share one cat and one dog
        ("cat", "dog", 0.0),
        ("", "", 1.0),
        ("the", "!", 1.0),  # both empty once articles and punctuation are gone
        ("cat", "", 0.0),
        ("", "cat", 0.0),
        ("theatre", "re", 0.0),  # an article inside a word stays
        ("über", "Über!", 1.0),
    ],
)
def test_token_f1_by_hand(reference: str, prediction: str, f1: float) -> None:
    assert text_metrics([reference], [prediction])["token_f1"] == pytest.approx(f1)


def test_token_f1_is_the_mean_over_rows() -> None:
    assert text_metrics(["cat", "cat sat down"], ["cat", "cat sat"])["token_f1"] == pytest.approx(0.9)


def test_rouge_by_hand() -> None:
    pytest.importorskip("rouge_score")
    result = text_metrics(["the cat sat", "one two three"], ["the cat", "three two one"])
    # Row 1: 1-grams P 2/2, R 2/3; 2-grams P 1/1, R 1/2; longest common subsequence 2.
    # Row 2: all 1-grams, no 2-gram, a common subsequence of 1 in 3.
    assert result["rouge1"] == pytest.approx((0.8 + 1) / 2)
    assert result["rouge2"] == pytest.approx((2 / 3 + 0) / 2)
    assert result["rougeL"] == pytest.approx((0.8 + 1 / 3) / 2)
    assert text_metrics(["cats running"], ["cat run"])["rouge1"] == 0.0  # no stemmer


def test_bleu_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    same = text_metrics(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert same["bleu"] == same["chrf"] == 100.0
    # Five of six words, the last one wrong: precisions 5/6, 4/5, 3/4, 2/3, no brevity penalty.
    near = text_metrics(["the cat sat on the mat"], ["the cat sat on the dog"])
    assert near["bleu"] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** (1 / 4))
    assert text_metrics(["cat"], ["cat"])["bleu"] == 0.0  # no 4-gram at all


def test_chrf_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    # Reference "ab", answer "ac". Only orders that both have count: 1-grams P 1/2, R 1/2; 2-grams P 0, R 0.
    # chrF2 from the mean P and R, 1/4 each, is 1/4.
    assert text_metrics(["ab"], ["ac"])["chrf"] == pytest.approx(25.0)


def test_bleu_is_of_the_whole_corpus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    references = ["one two three four five", "six seven eight nine", "ten"]
    predictions = ["one two three four", "six seven eight nine ten", "ten"]
    result = text_metrics(references, predictions)
    assert result["bleu"] == sacrebleu.corpus_bleu(predictions, [references]).score
    assert result["chrf"] == sacrebleu.corpus_chrf(predictions, [references]).score


def test_sacrebleu_gives_no_hint_to_detokenize(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("sacrebleu")
    text_metrics(["the cat sat ."] * 200, ["the cat sat ."] * 200)
    assert caplog.text == ""


def test_text_keys_and_types() -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    keys = ["exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf"]
    plain, with_perplexity = text_metrics(["a"], ["b"]), text_metrics(["a"], ["b"], perplexity=3)
    assert list(plain) == keys
    assert list(with_perplexity) == [*keys, "perplexity"]
    assert with_perplexity["perplexity"] == 3.0
    assert all(type(value) is float for value in with_perplexity.values())


@pytest.mark.parametrize("library", builtin._TEXT_LIBRARIES)
def test_every_library_gives_the_keys_that_it_is_listed_with(library: str) -> None:
    pytest.importorskip(library.replace("-", "_"))
    score, keys = builtin._TEXT_LIBRARIES[library]
    assert tuple(score(["a b"], ["a c"])) == keys


@pytest.mark.parametrize(
    ("hidden", "left", "sentence"),
    [
        (
            ["rouge_score"],
            ["exact_match", "token_f1", "bleu", "chrf"],
            "evaluate leaves out 'rouge1', 'rouge2', 'rougeL', which need rouge-score. "
            "Install with: pip install 'llmfit[text-metrics]'.",
        ),
        (
            ["sacrebleu"],
            ["exact_match", "token_f1", "rouge1", "rouge2", "rougeL"],
            "evaluate leaves out 'bleu', 'chrf', which need sacrebleu. "
            "Install with: pip install 'llmfit[text-metrics]'.",
        ),
        (
            ["rouge_score", "sacrebleu"],
            ["exact_match", "token_f1"],
            "evaluate leaves out 'rouge1', 'rouge2', 'rougeL', 'bleu', 'chrf', which need rouge-score and "
            "sacrebleu. Install with: pip install 'llmfit[text-metrics]'.",
        ),
    ],
)
def test_missing_libraries_are_named_once(
    monkeypatch: pytest.MonkeyPatch, hidden: list[str], left: list[str], sentence: str
) -> None:
    for library in {"rouge_score", "sacrebleu"} - set(hidden):
        pytest.importorskip(library)
    for library in list(sys.modules):
        if library.partition(".")[0] in hidden:
            monkeypatch.delitem(sys.modules, library)
    for library in hidden:
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.warns(LLMFitWarning) as caught:
        result = text_metrics(["a"], ["a"], perplexity=2.0)
    assert [str(warning.message) for warning in caught] == [sentence]
    assert list(result) == [*left, "perplexity"]


@pytest.mark.parametrize(
    ("references", "predictions", "sentence"),
    [
        ([], [], "evaluate needs at least one row. Got none."),
        (["a", "b"], ["a"], "evaluate needs one answer per row. Got 1 answers for 2 rows."),
    ],
)
def test_text_errors(references: list[str], predictions: list[str], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        text_metrics(references, predictions)
    assert str(caught.value) == sentence


# --- extra: callables ----------------------------------------------------------------------------------


def n_wrong(y_true: Any, y_pred: Any) -> Any:
    """Count the rows that differ."""
    return np.sum(np.asarray(y_true) != np.asarray(y_pred))


def two_numbers(y_true: Any, y_pred: Any) -> dict[str, Any]:
    """Return a dict."""
    return {"rows": np.int64(len(y_true)), "answers": len(y_pred)}


class Share:
    """A metric that is an object, and has no ``__name__``."""

    def __call__(self, y_true: Any, y_pred: Any) -> float:
        """Return the share of rows that agree."""
        return float(np.mean(np.asarray(y_true) == np.asarray(y_pred)))


def test_callables_of_each_kind() -> None:
    f1 = functools.partial(sklearn.metrics.f1_score, average="micro")
    result = extra_metrics([n_wrong, two_numbers, Share(), f1], ["a", "b", "b"], ["a", "a", "b"])
    assert result == {"n_wrong": 1, "rows": 3, "answers": 3, "Share": 2 / 3, "f1_score": pytest.approx(2 / 3)}
    assert [type(value) for value in result.values()] == [int, int, int, float, float]


def test_callables_get_the_answers_as_they_are() -> None:
    y_true, y_pred = pd.Series([1, 2]), np.array([1, 3])
    got = []

    def keep(*answers: Any) -> float:
        got.append(answers)
        return 0.0

    extra_metrics([keep], y_true, y_pred)
    assert got[0][0] is y_true
    assert got[0][1] is y_pred


def test_no_extra_metrics() -> None:
    assert extra_metrics([], ["a"], ["a"]) == {}
    assert extra_metrics(None, ["a"], ["a"]) == {}


def test_one_extra_metric_needs_no_list() -> None:
    assert extra_metrics(n_wrong, ["a"], ["b"]) == {"n_wrong": 1}


def test_an_extra_metric_does_not_replace_one_that_is_there() -> None:
    with pytest.raises(ParameterError, match="Two metrics of evaluate return the key 'n_wrong'"):
        extra_metrics([n_wrong], ["a"], ["a"], taken={"n_wrong": 0})


def test_an_error_of_a_callable_is_left_as_it_is() -> None:
    def broken(y_true: Any, y_pred: Any) -> float:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        extra_metrics([broken], [1], [1])


def nothing(y_true: Any, y_pred: Any) -> None:
    """Return no number."""


WANTED = (
    "The 'metrics' parameter of evaluate must be a callable (y_true, y_pred), a name or path of a metric, or a list "
    "of these. "
)


@pytest.mark.parametrize(
    ("specs", "sentence"),
    [
        ({"a": n_wrong}, None),
        ([n_wrong, 3], WANTED + "Got 3 instead."),
        ([None], WANTED + "Got None instead."),
        ([nothing], "The metric 'nothing' must return a number or a dict. Got None instead."),
        ([n_wrong, n_wrong], "Two metrics of evaluate return the key 'n_wrong'. Rename one."),
    ],
)
def test_extra_errors(specs: Any, sentence: str | None) -> None:
    with pytest.raises(ParameterError) as caught:
        extra_metrics(specs, [1, 2], [1, 1])
    if sentence is None:
        assert str(caught.value).startswith(WANTED)
    else:
        assert str(caught.value) == sentence


# --- extra: the evaluate library -----------------------------------------------------------------------

SCRIPT = """
import datasets
import evaluate

class Agreement(evaluate.Metric):
    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("KIND"), "references": datasets.Value("KIND")}
        )
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        same = [answer == true for answer, true in zip(predictions, references)]
        return {"agreement": sum(same) / len(same), "largest": max(references + predictions)}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder for scripts, with the library offline and its caches in there too."""
    pytest.importorskip("evaluate")
    import evaluate.config

    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    for cache in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE", "DOWNLOADED_EVALUATE_PATH"):
        monkeypatch.setattr(evaluate.config, cache, tmp_path / cache)
    # The package that the library makes for copies of scripts would stay that of an earlier test.
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def write_script(folder: Path, name: str, text: str) -> str:
    """Write ``folder/name/name.py`` and return its path."""
    path = folder / name / f"{name}.py"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_local_script_with_integer_labels(folder: Path) -> None:
    path = write_script(folder, "agreement_int", SCRIPT.replace("KIND", "int32"))
    result = extra_metrics([path], np.array([1, 0, 1]), pd.Series([1, 1, 1]))
    assert result == {"agreement": pytest.approx(2 / 3), "largest": 1}


def test_local_folder_and_callable_together(folder: Path) -> None:
    path = write_script(folder, "agreement_dir", SCRIPT.replace("KIND", "int32"))
    result = extra_metrics([str(Path(path).parent), n_wrong], [0, 1], [0, 0])
    assert result == {"agreement": 1 / 2, "largest": 1, "n_wrong": 1}


def test_string_labels_that_the_metric_refuses_become_codes(folder: Path) -> None:
    path = write_script(folder, "agreement_codes", SCRIPT.replace("KIND", "int32"))
    result = extra_metrics([path], pd.Series(["yes", "no", "yes"]), np.array(["yes", "maybe", "no"]))
    assert result == {"agreement": pytest.approx(1 / 3), "largest": 2}  # maybe 0, no 1, yes 2


def test_string_labels_that_the_metric_takes_stay(folder: Path) -> None:
    path = write_script(folder, "agreement_str", SCRIPT.replace("KIND", "string"))
    result = extra_metrics([path], ["yes", "no"], ["yes", "maybe"])
    assert result == {"agreement": 1 / 2, "largest": "yes"}


def test_bool_labels(folder: Path) -> None:
    path = write_script(folder, "agreement_bool", SCRIPT.replace("KIND", "int32"))
    assert extra_metrics([path], [True, False], [True, True])["agreement"] == 1 / 2


@pytest.mark.parametrize("answers", [["yes", "no"], [1, 0]])
def test_a_metric_that_cannot_be_computed(folder: Path, answers: list[Any]) -> None:
    script = SCRIPT.replace("KIND", "int32").replace("same = ", "raise ValueError('too few rows') #")
    path = write_script(folder, "agreement_raises", script)
    with pytest.raises(ParameterError) as caught:
        extra_metrics([path], answers, answers)
    assert str(caught.value) == f"The metric {path!r} cannot be computed on these answers: too few rows"


@pytest.mark.parametrize("name", ["nosuchmetric", "nobody/nosuchmetric", "./no/such/script.py"])
def test_a_name_that_cannot_be_loaded(folder: Path, name: str) -> None:
    with pytest.raises(ParameterError) as caught:
        extra_metrics([name], [1], [1])
    assert str(caught.value) == (
        f"The metric {name!r} cannot be loaded. "
        "The path of a local metric script or a callable (y_true, y_pred) works too."
    )


def test_a_script_that_fails_says_why(folder: Path) -> None:
    path = write_script(folder, "agreement_broken", "raise RuntimeError('no good')\n")
    with pytest.raises(ParameterError) as caught:
        extra_metrics([path], [1], [1])
    assert str(caught.value) == (
        f"The metric {path!r} cannot be loaded (no good). "
        "The path of a local metric script or a callable (y_true, y_pred) works too."
    )


def test_a_script_without_a_metric_is_refused(folder: Path) -> None:
    path = write_script(folder, "agreement_empty", "answer = 42\n")
    with pytest.raises(ParameterError, match="cannot be loaded"):
        extra_metrics([path], [1], [1])


def test_evaluate_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ParameterError) as caught:
        extra_metrics(["accuracy"], [1], [1])
    assert str(caught.value) == ("The metric 'accuracy' needs evaluate. Install it with: pip install evaluate.")
    assert extra_metrics([n_wrong], [1], [1]) == {"n_wrong": 0}


# --- the module ----------------------------------------------------------------------------------------


def test_public_names() -> None:
    assert metrics.__all__ == [
        "classification_metrics",
        "extra_metrics",
        "metric_list",
        "regression_metrics",
        "set_metrics",
        "text_metrics",
        "token_f1",
        "warn_unseen",
    ]


def test_the_examples_run() -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in (builtin, extra):
            failed, tried = doctest.testmod(module)
            assert (failed, tried > 2) == (0, True)
