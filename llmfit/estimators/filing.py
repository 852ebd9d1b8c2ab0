"""Estimators on files: rows are read, answered and written a chunk at a time.

Takes a fitted estimator; gives :mod:`llmfit.bulk` what answers a frame, and a digest of all that decides the answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from sklearn.utils.validation import check_is_fitted

from llmfit.exceptions import DataError, ParameterError, check_choice, check_int, parameter_error
from llmfit.features import label_text

if TYPE_CHECKING:
    from llmfit.bulk import Scored

__all__ = ["Filed", "find_places", "read_as"]

# Parameters that decide answers after `fit`; the others have shaped it, or are a matter of speed.
DECISIVE = ("device", "dtype", "generation", "quantization", "random_state")
# Libraries whose version may decide an answer's last digits.
COMPUTING = ("llmfit", "torch", "transformers", "peft")
# What a fit leaves that decides no answer.
IDLE = ("memory_footprint_", "evaluation_", "best_epoch_", "learning_rate_", "batch_size_", "trainable_parameters_")


class Filed:
    """What all estimators do with files."""

    verbose: Any

    def predict_files(
        self,
        inputs: Any,
        output: Any,
        *,
        proba: bool = False,
        keep: Sequence[str] | None = None,
        errors: Any = None,
        chunk_rows: int = 1000,
        resume: bool = False,
        overwrite: bool = False,
        strict: bool = False,
        format: str | None = None,  # noqa: A002 - the word of the command line
    ) -> Scored:
        """Answer the rows of files of any length, in memory that does not depend on it.

        The output is `output` once all rows are done; until then it grows in ``output.partial``, and
        ``output.manifest.json`` says how much of it counts. Killed at any moment and called again with ``resume=True``,
        the run ends with the same bytes as if it had not been killed, as long as answers are not drawn anew: with
        ``do_sample``, give an int `random_state`.

        Parameters
        ----------
        inputs : str, path or list of them
            CSV, TSV, JSON (a list of objects, or one behind the other), JSONL, Parquet or Excel, told by suffix; the
            first four also packed as ``.gz``. Globs; ``-`` for standard input, as CSV. Several files are one table.
        output : str or path
            CSV, TSV, JSONL or Parquet, told by suffix; the first three also ``.gz``. ``-`` for standard output, as CSV.
        proba : bool, default=False
            Write the probability of every class as well.
        keep : list of str or None, default=None
            Columns of the input that are written, behind the number of the row, which counts from 0. None writes all
            columns as they are, without the number.
        errors : str, path or None, default=None
            CSV, TSV or JSONL file for rows that cannot be answered: their number, file, line and the reason. None names
            it after the output, ``scores.errors.csv`` for ``scores.csv`` and ``scores.jsonl.errors.csv`` for
            ``scores.jsonl``. It is there only if there are such rows.
        chunk_rows : int, default=1000
            Rows that are answered and written at a time; what a kill can cost.
        resume : bool, default=False
            Go on with an earlier run that was stopped, or begin where there was none. Input, model, settings, versions
            of llmfit, torch, transformers and peft, the kind of device or processor and the dtype must be the same;
            `batch_tokens` and threads may not be, at the price of last digits. A run that was done is left as it is.
        overwrite : bool, default=False
            Begin anew, whatever is there.
        strict : bool, default=False
            Stop at the first row that cannot be answered, with a DataError that names it.
        format : str or None, default=None
            "csv", "tsv", "json", "jsonl", "parquet" or "excel", for files of another suffix and standard input.

        Returns
        -------
        Scored
            rows, bad_rows, output, errors (None where there are no bad rows).

        Raises
        ------
        DataError
            If files cannot be read at all or written, lack a column, or an earlier run was another one.
        ParameterError
            If a parameter cannot be used.
        NotFittedError
            If there is nothing to answer with yet.

        Examples
        --------
        >>> import tempfile
        >>> from llmfit import LLMClassifier
        >>> from llmfit.datasets import load_book_reviews
        >>> reviews = load_book_reviews()
        >>> clf = LLMClassifier(target="score", adapter=None, verbose=0).fit(reviews)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     reviews[:3].to_csv(f"{folder}/reviews.csv", index=False)
        ...     clf.predict_files(f"{folder}/reviews.csv", f"{folder}/scores.csv").rows
        3
        """
        from llmfit.bulk import score_files
        from llmfit.files import open_source

        check_is_fitted(self)
        for name, value in {"proba": proba, "resume": resume, "overwrite": overwrite, "strict": strict}.items():
            check_choice(name, "predict_files", value, [True, False])
        check_int("chunk_rows", "predict_files", chunk_rows, least=1)
        if keep is not None and (isinstance(keep, str) or not all(isinstance(name, str) for name in keep)):
            raise parameter_error("keep", "predict_files", "None or a list of column names", keep)
        place, where = find_places(output, errors, resume=resume, overwrite=overwrite)  # before much is read
        answering = _answering(self, proba)
        source = open_source(inputs, format=format)
        _check_apart(source, place, where)
        with _bar(self, source.n_rows) as bar:
            return score_files(
                source,
                place,
                answering,
                settings={"proba": proba, "chunk_rows": chunk_rows, "format": place.format},
                keep=keep,
                errors=where,
                chunk_rows=chunk_rows,
                resume=resume,
                overwrite=overwrite,
                strict=strict,
                progress=bar.update,
            )


def read_as(estimator: Any, given: Any, *, format: str | None = None) -> pd.DataFrame:  # noqa: A002 - as there
    """Read files whole for a fitted estimator: its columns are what they were in `fit`, whatever else the files hold.

    Parameters
    ----------
    estimator : LLMClassifier, LLMRegressor, LLMGenerator or LLMEstimator
        A fitted one.
    given, format
        As for :func:`llmfit.files.read_table`.

    Returns
    -------
    DataFrame of shape (n_rows, n_columns)
        A cell that is none of its column's values, a word among numbers for example, stays as it is.
    """
    from llmfit.files import read_table

    check_is_fitted(estimator)
    return read_table(given, format=format, kinds=vars(estimator).get("estimator_", estimator)._columns)


def _bar(estimator: Any, total: int) -> Any:
    bar = estimator._bar(total, "predict")
    bar.smoothing = 0.05
    return bar


def find_places(output: Any, errors: Any, *, resume: bool = False, overwrite: bool = False) -> tuple[Any, Any]:
    """Find where output and errors are to go, and refuse places that are taken; see :meth:`Filed.predict_files`."""
    from llmfit.bulk import check_free
    from llmfit.files import find_output

    place = find_output(output)
    where = _errors_place(errors, place)
    check_free(place, where, resume=resume, overwrite=overwrite)
    return place, where


def _errors_place(given: Any, output: Any) -> Any:
    from llmfit.files import find_output
    from llmfit.files.paths import STANDARD

    if given is None:
        if output.name == STANDARD:
            return None
        path = Path(output.name)  # the whole name: there may be an output of another format beside it
        return find_output(path.with_name(f"{path.name.removesuffix('.csv')}.errors.csv"))
    place = find_output(given)
    if place.format == "parquet" or place.name == STANDARD:
        raise parameter_error("errors", "predict_files", "a CSV, TSV or JSONL file", given)
    if output.name != STANDARD and place.path.resolve() == output.path.resolve():
        raise DataError(f"{place.name!r} was to be the output and the file of errors. Name another file.")
    return place


def _check_apart(source: Any, output: Any, errors: Any) -> None:
    """Refuse to write where something is read, or to one place twice."""
    from llmfit.files.paths import STANDARD

    written = [place for place in (output, errors) if place is not None and place.name != STANDARD]
    taken = {place.path.resolve() for place in source.places if place.name != STANDARD}
    for place in written:
        if place.path.resolve() in taken:
            raise DataError(f"{place.name!r} is read and was to be written. Name another file.")
        taken.add(place.path.resolve())


def _answering(estimator: Any, proba: bool) -> Any:
    from llmfit.bulk import Answering

    inner = _quiet(vars(estimator).get("estimator_", estimator))
    parts = _parts(inner)
    kinds = {name: kind for target, own in parts.items() for name, kind in _kinds(target, own, proba).items()}
    if proba and not any(hasattr(own, "classes_") for own in parts.values()):
        raise ParameterError(f"proba=True needs a target of classes, and {type(inner).__name__} has none.")

    def answer(frame: pd.DataFrame) -> dict[str, list[Any]]:
        table, rows = inner._read_rows(frame)
        raw = inner._respond(rows) if proba else inner._decide(rows)
        return {
            name: values
            for target, own in parts.items()
            for name, values in _columns(target, own, table, raw[target] if inner._targets else raw, proba).items()
        }

    return Answering(answer, kinds, _digest(inner), inner._columns, _made_by(inner))


def _made_by(inner: Any) -> dict[str, str]:
    """Say what the last digits of answers depend on beside the model."""
    import torch

    from llmfit.persistence import _versions

    base = inner._fitted_base()
    if base.device.type == "cuda":
        device = torch.cuda.get_device_name(base.device)
    else:
        device = torch.backends.cpu.get_cpu_capability() if base.device.type == "cpu" else ""
    versions = _versions()
    return {
        **{name: versions[name] for name in COMPUTING},
        "device": f"{base.device.type} ({device})" if device else base.device.type,
        "dtype": str(base.dtype).removeprefix("torch."),
    }


def _quiet(estimator: Any) -> Any:
    """Copy an estimator over the same tensors, without its bars, since a run has one, and without vectors kept.

    The last digits of a vector depend on the rows that it was computed beside. A run that goes on in another process
    has none of an earlier chunk's, and is to answer as one that was not stopped.
    """
    copy = object.__new__(type(estimator))
    vars(copy).update({**vars(estimator), "verbose": 0, "_keeps_vectors": False})
    if copy._prompts.retrieval is not None:
        copy._prompts = replace(copy._prompts, retrieval=replace(copy._prompts.retrieval, apart={}))
    if "estimators_" in vars(copy):
        copy.estimators_ = {name: _quiet(own) for name, own in copy.estimators_.items()}
    return copy


def _parts(inner: Any) -> dict[str, Any]:
    """List the targets, and what answers each."""
    return inner.estimators_ if inner._targets else {inner.target_: inner}


def _kinds(target: str, own: Any, proba: bool) -> dict[str, str]:
    """Name the columns of one target's answers, and say what they hold."""
    form = getattr(own, "_form", None)
    if not hasattr(own, "classes_"):
        is_number = hasattr(own, "target_mean_")
        return {f"{target}_predicted": "float" if is_number else "text"}
    if form is not None and "columns" in form:
        kinds = {f"{label_text(label)}_predicted": _kind_of(form["dtype"]) for label in form["columns"]}
    else:
        kinds = {f"{target}_predicted": "object" if form is not None else _kind_of(own.classes_.dtype)}
    if proba:
        kinds |= {f"{target}_proba_{label_text(label)}": "float" for label in own.classes_}
    return kinds


def _kind_of(dtype: Any) -> str:
    dtype = pd.api.types.pandas_dtype(dtype)
    of_kind = {"b": "bool", "i": "int", "u": "int", "f": "float", "U": "text"}
    return of_kind.get(getattr(dtype, "kind", "O"), "object")


def _columns(target: str, own: Any, table: Any, raw: Any, proba: bool) -> dict[str, list[Any]]:
    """Write one target's raw answers as columns."""
    import numpy as np

    from llmfit.files import plain_values

    answered = own._column(table, raw)
    names = list(_kinds(target, own, False))
    if getattr(answered, "ndim", 1) == 2:
        array = np.asarray(answered)
        columns = {name: array[:, place].tolist() for place, name in enumerate(names)}
    else:
        columns = {names[0]: plain_values(answered)}
    if proba and hasattr(own, "classes_"):
        chances = np.exp(raw)
        for place, label in enumerate(own.classes_):
            columns[f"{target}_proba_{label_text(label)}"] = chances[:, place].tolist()
    return columns


def _digest(inner: Any) -> str:
    """Digest all that decides an estimator's answers."""
    import torch

    from llmfit.estimators.saving import _fitted_to_json, _params_to_json

    params, fitted = _params_to_json(inner), _fitted_to_json(inner)
    content = {
        "class": type(inner).__name__,
        "params": {name: params.get(name) for name in DECISIVE},
        "fitted": {name: value for name, value in fitted.items() if name not in IDLE},
        "base_model": inner.base_model_["fingerprint"],
    }
    content["fitted"].pop("base_model_", None)  # where it lies does not matter
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted((inner._tensors or {}).items()):
        bare = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bare.view(torch.uint8).numpy().data)
    return digest.hexdigest()
