"""The rows of files, answered and written: each once, in order, or into the file of errors with the reason.

Takes a :class:`~llmfit.files.Source` and what answers frames; a frame of which one row cannot be answered is halved
until that row stands alone, so that the others are. Knows no model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import pandas as pd

from llmfit.bulk.gathering import gathering
from llmfit.bulk.journal import Journal, State
from llmfit.bulk.pipe import Pipe
from llmfit.exceptions import DataError, ParameterError, quoted
from llmfit.files import Bad, Chunk, Place, Source, Writer, is_binary, is_infinite, make_writer, plain_values
from llmfit.files.paths import STANDARD

__all__ = ["Answering", "Scored", "check_free", "score_files"]

ERRORS = {"row": "int", "file": "text", "line": "int", "reason": "text"}
ROW = "row"
NAMED_ROW = re.compile(r"Row \d+ \(index .*?\): ")


class Answering(NamedTuple):
    """What answers rows.

    Parameters
    ----------
    answer : callable (frame) -> dict of column to list
        Raises DataError where a row cannot be answered.
    kinds : dict of column to str
        The columns of answers, and their kinds of llmfit.files.KINDS.
    digest : str
        Of all that decides the answers.
    reads : dict of column to str
        What columns of the rows are known to hold: kinds of llmfit.files.KINDS.
    made_by : dict of str to str
        What the last digits of answers depend on beside the model: versions of libraries, the device.
    """

    answer: Callable[[pd.DataFrame], dict[str, list[Any]]]
    kinds: dict[str, str]
    digest: str
    reads: Mapping[str, str]
    made_by: Mapping[str, str]


@dataclass(frozen=True)
class Scored:
    """What came of a run.

    Parameters
    ----------
    rows : int
        Rows of the input, over all runs that it took.
    bad_rows : int
        How many of them have no answer and stand in the file of errors.
    output : str
    errors : str or None
        None where there are no such rows.
    """

    rows: int
    bad_rows: int
    output: str
    errors: str | None


def score_files(
    source: Source,
    output: Place,
    answering: Answering,
    *,
    settings: dict[str, Any],
    keep: Sequence[str] | None = None,
    errors: Place | None = None,
    chunk_rows: int = 1000,
    resume: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> Scored:
    """Answer the rows of files and write them; see :meth:`llmfit.LLMClassifier.predict_files`.

    Parameters
    ----------
    source : Source
    output : Place
    answering : Answering
    settings : dict of str to JSON value
        What else decides the bytes of the output; a run goes on only where they are the same.
    keep : sequence of str or None
        Columns of the input to write beside a row's number; None for all, without the number.
    errors : Place or None
        None only for standard output.
    chunk_rows, resume, overwrite, strict
        As there.
    progress : callable (rows) -> None, or None
        Told of each chunk, and first of the rows that an earlier run did.

    Returns
    -------
    Scored
    """
    kept, kinds = _columns(source, keep, answering)
    answering.answer(_no_rows(source))  # what is wrong with the columns is wrong with all rows
    _check_form(output, kinds)
    writer = make_writer(output, kinds)
    run = {
        "inputs": source.digest(),
        "model": answering.digest,
        **settings,
        **answering.made_by,
        "keep": None if keep is None else list(keep),
        "errors": _named_from(errors, output),
    }
    with _writing(output):
        sink = _begin(output, errors, run, answering, writer, resume=resume, overwrite=overwrite)
    tell = progress or (lambda _: None)
    stops = strict or errors is None
    with closing(sink), _writing(output):
        tell(sink.state.rows)
        if not sink.state.done:
            with gathering() as gathered:
                for chunk in source.chunks(chunk_rows, start=sink.state.rows):
                    columns, bad = _answered(chunk, answering, kept, keep is not None, writer, gathered)
                    if bad and stops:
                        _stop(sink, writer, columns, bad[0], strict)
                    listed = _listed(bad, errors, first=not sink.state.errors_length)
                    sink.append(writer.rows(columns), listed, rows=chunk.size, bad=len(bad))
                    tell(chunk.size)
            sink.finish(writer.finish)
    state = sink.state
    return Scored(state.rows, state.bad, output.name, errors.name if errors is not None and state.bad else None)


def _columns(source: Source, keep: Sequence[str] | None, answering: Answering) -> tuple[list[str], dict[str, Any]]:
    """Say which columns of the input are written, and all columns of the output."""
    kept = list(source.kinds) if keep is None else list(keep)
    for name in kept:
        if name not in source.kinds:
            raise DataError(f"keep names the column {name!r}, but the input has only {quoted(source.kinds)}.")
    number = {} if keep is None else {ROW: "int"}
    twice = [name for name in kept if name in answering.kinds or name in number]
    if twice:
        raise DataError(
            f"The input has the column {twice[0]!r} already, which the output is to have. Leave it out with keep."
        )
    copied = {name: "text" if source.textual and _is_text(name, answering) else source.kinds[name] for name in kept}
    return kept, {**number, **copied, **answering.kinds}


def _is_text(name: str, answering: Answering) -> bool:
    return answering.reads.get(name) == "text"


def _check_form(output: Place, kinds: Mapping[str, Any]) -> None:
    """Refuse columns for which the output has no form."""
    for name, kind in kinds.items():
        if output.format != "parquet" and is_binary(kind):
            raise DataError(
                f"The column {name!r} is binary, which {output.format} cannot hold. Leave it out with keep, or write "
                "Parquet."
            )


def _named_from(errors: Place | None, output: Place) -> str | None:
    """Name the file of errors as it is seen from the output: both may move together."""
    if errors is None or output.name == STANDARD:
        return None
    return os.path.relpath(errors.path.absolute(), output.path.absolute().parent)


def _no_rows(source: Source) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series([], dtype=object) for name in source.kinds})


def _begin(
    output: Place,
    errors: Place | None,
    run: dict[str, Any],
    answering: Answering,
    writer: Writer,
    *,
    resume: bool,
    overwrite: bool,
) -> Any:
    """Open what is written to: anew, or where an earlier run stopped."""
    if output.name == STANDARD or errors is None:
        check_free(output, errors, resume=resume, overwrite=overwrite)
        pipe = Pipe(errors)
        pipe.append(writer.head())
        return pipe
    with ExitStack() as failed:
        journal = Journal(output.path, errors.path)
        failed.callback(journal.close)
        journal.lock()  # before anything is read that another run may write
        check_free(output, errors, resume=resume, overwrite=overwrite)
        before = journal.read() if resume else None
        if before is not None and (before.rows or before.done):  # else nothing is there that it would have to fit
            # What is done stays done, whatever it would be made by now.
            _check_same(
                output, before, {name: run[name] for name in run if not (before.done and name in answering.made_by)}
            )
        if before is not None and before.done:
            _check_whole(output, errors, journal, before)
        elif before is not None and before.rows:
            journal.go_on(before)
        else:
            journal.begin(run, writer.head(), before)
        failed.pop_all()
    return journal


def check_free(output: Place, errors: Place | None, *, resume: bool, overwrite: bool) -> None:
    """Refuse to write over anything, unless that is wanted.

    Raises
    ------
    ParameterError
        If both are wanted, to go on and to begin anew.
    DataError
        If there is something already.
    """
    if resume and overwrite:
        raise ParameterError("resume=True goes on with an earlier run, overwrite=True begins anew. Pass one of them.")
    if output.name == STANDARD or errors is None:
        _check_free_beside(errors, resume=resume, overwrite=overwrite)
        return
    if overwrite:
        return
    before = Journal(output.path, errors.path).read()
    if resume:
        if before is None and output.path.exists():
            raise DataError(
                f"{output.name!r} exists and has no manifest: it cannot be resumed. Pass overwrite=True, or name "
                "another file."
            )
        if before is None:
            _check_gone(errors)
        return
    if before is not None and not before.done and before.rows:
        raise DataError(
            f"{output.name!r} was begun by an earlier run, which did {before.rows} row(s). Pass resume=True to go on, "
            "or overwrite=True to begin anew."
        )
    _check_gone(output)
    _check_gone(errors)


def _check_free_beside(errors: Place | None, *, resume: bool, overwrite: bool) -> None:
    """As :func:`check_free`, where the output is standard output."""
    if resume:
        raise ParameterError("resume=True needs an output that is a file: what went to standard output is not kept.")
    if overwrite and errors is None:
        raise ParameterError(
            "overwrite=True has nothing to write over: the output is standard output, and no file of errors is named."
        )
    if errors is not None and not overwrite:
        _check_gone(errors)


def _check_gone(place: Place) -> None:
    if place.path.exists():
        raise DataError(f"{place.name!r} exists: nothing was written. Pass overwrite=True, or name another file.")


def _check_same(output: Place, before: State, run: dict[str, Any]) -> None:
    """Refuse to go on with what another run began."""
    for name, now in run.items():
        then = before.run.get(name)
        if then != now:
            what = WORDS.get(name, f"{name}={then!r}, not {name}={now!r}")
            raise DataError(
                f"{output.name!r} was begun with {what}: it cannot go on. Pass overwrite=True to begin anew."
            )


def _check_whole(output: Place, errors: Place, journal: Journal, before: State) -> None:
    """Leave a run that is done as it is, as long as its files are as it left them."""
    for path, how in journal.changed(before).items():
        name = output.name if path == journal.output else errors.name
        raise DataError(f"{name!r} was finished by an earlier run, and {how}. Pass overwrite=True to begin anew.")
    journal.state = before
    journal.tidy()


def _answered(
    chunk: Chunk,
    answering: Answering,
    kept: Sequence[str],
    numbered: bool,
    writer: Writer,
    gathered: Callable[[], Any],
) -> tuple[dict[str, list[Any]], list[Bad]]:
    """Answer a chunk: the columns of the output, and the rows that have no answer."""
    frame = chunk.read_as(answering.reads)
    answers, reasons = _halving(frame, 0, answering, gathered)
    good = [place for place in range(len(frame)) if place not in reasons]
    rows = frame.index
    columns: dict[str, list[Any]] = {ROW: [int(rows[place]) for place in good]} if numbered else {}
    for name in kept:
        typed = frame if _is_text(name, answering) else chunk.frame
        cells = chunk.cells[name]
        if chunk.textual and not writer.textual:
            # Of inf as of 1e999, for which there is no other form, the text stands.
            cells = [
                cell if is_infinite(value) and not writer.infinite else value
                for cell, value in zip(cells, plain_values(typed[name]), strict=True)
            ]
        columns[name] = [cells[place] for place in good]
    bad = [Bad(int(rows[place]), *chunk.spots[place], reason) for place, reason in reasons.items()]
    return {**columns, **answers}, sorted([*chunk.bad, *bad])


def _halving(
    frame: pd.DataFrame, first: int, answering: Answering, gathered: Callable[[], Any]
) -> tuple[dict[str, list[Any]], dict[int, str]]:
    """Answer rows, those that can be; the others by their place in the chunk, with the reason."""
    if not len(frame):
        return {name: [] for name in answering.kinds}, {}
    try:
        with gathered():
            return answering.answer(frame), {}
    except DataError as error:
        if len(frame) == 1:
            return {name: [] for name in answering.kinds}, {first: NAMED_ROW.sub("", str(error), count=1)}
    middle = len(frame) // 2
    answers, bad = _halving(frame.iloc[:middle], first, answering, gathered)
    more, later = _halving(frame.iloc[middle:], first + middle, answering, gathered)
    return {name: [*answers[name], *more[name]] for name in answering.kinds}, bad | later


def _listed(bad: Sequence[Bad], errors: Place | None, *, first: bool) -> bytes:
    """Write rows of the file of errors, which has a head only where it has rows."""
    if not bad or errors is None:
        return b""
    writer = make_writer(errors, ERRORS)
    columns = {name: [getattr(row, name) for row in bad] for name in ERRORS}
    return (writer.head() if first else b"") + writer.rows(columns)


def _stop(sink: Any, writer: Writer, columns: Mapping[str, list[Any]], bad: Bad, strict: bool) -> NoReturn:
    """Write the rows before the first that has no answer, and say what is wrong with that one."""
    if before := bad.row - sink.state.rows:
        some = {name: cells[:before] for name, cells in columns.items()}
        sink.append(writer.rows(some), rows=before, whole=False)
    advice = "" if strict else " Name a file with errors=, and such rows go there."
    raise DataError(f"{bad.where}: {bad.reason}{advice}")


@contextmanager
def _writing(output: Place) -> Iterator[None]:
    """Say what kept the output from being written; what is done stays."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if output.name == STANDARD:  # of which nothing is kept; a file of errors has its own name
            what = f"{str(error.filename)!r}" if error.filename else "The output"
            raise DataError(f"{what} cannot be written: {error.strerror or error}.") from error
        raise DataError(
            f"{output.name!r} cannot be written: {error.strerror or error}. The rows that are done are kept: run it "
            "again with resume=True."
        ) from error


WORDS = {"inputs": "another input", "model": "another model"}
