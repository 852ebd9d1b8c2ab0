"""Where commands write to, looked at before anything is loaded or trained.

Takes paths as the user wrote them; raises where nothing could be written there. Makes nothing.
"""

from __future__ import annotations

from pathlib import Path

from llmfit.exceptions import DataError, ParameterError

__all__ = ["check_folder", "check_report", "check_results"]


def check_folder(path: str, *, manifest: str | None = None, what: str = "saved llmfit model") -> None:
    """Refuse a folder that cannot be saved to; what `manifest`, the name of a file, tells from others is replaced."""
    from llmfit.files import check_writable
    from llmfit.persistence import MANIFEST

    folder = Path(path).expanduser()
    known = (folder / (manifest or MANIFEST)).is_file()
    if folder.exists() and not (known or (folder.is_dir() and not any(folder.iterdir()))):
        raise DataError(f"{path!r} exists and is no {what}. Choose another.")
    check_writable(path, folder=True)


def check_report(path: str) -> str:
    """Refuse a report that cannot be written; gives its suffix."""
    from llmfit.files import check_writable

    suffix = Path(path).suffix.lower()
    if suffix not in (".html", ".json"):
        raise ParameterError(f"The report {path!r} must end in .html or .json.")
    check_writable(path)
    if suffix == ".html":
        from llmfit.plots.drawing import check_installed

        check_installed("A report in HTML")
    return suffix


def check_results(path: str) -> None:
    """Refuse a table that cannot be written."""
    from llmfit.files import check_writable

    if not path.lower().endswith((".csv", ".csv.gz")):
        raise ParameterError(f"The results are written as CSV: {path!r} must end in .csv or .csv.gz.")
    check_writable(path)
