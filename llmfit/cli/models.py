"""Commands that begin with a saved model: ``predict``, ``evaluate``, ``export``, ``show``.

Takes parsed arguments; writes files, or data to standard output. Everything heavy is imported where it is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmfit.cli.saying import put_measures, put_pairs, say
from llmfit.exceptions import ParameterError

__all__ = ["evaluate", "export", "predict", "show"]

ROWS_FAILED = 3


def predict(given: Any) -> int:
    """Answer the rows of files."""
    from llmfit.files import find_inputs, find_output

    find_inputs(given.data, format=given.format)  # a name that is wrong is said before a model is loaded
    find_output(given.output)
    scored = _load(given).predict_files(
        given.data,
        given.output,
        proba=given.proba,
        keep=given.keep,
        errors=given.errors,
        chunk_rows=given.chunk_rows,
        resume=given.resume,
        overwrite=given.overwrite,
        strict=given.strict,
        format=given.format,
    )
    if scored.bad_rows:
        say(f"{scored.bad_rows} of {scored.rows} row(s) have no answer: see {scored.errors!r}.")
        return ROWS_FAILED
    if given.output != "-":
        say(f"{scored.rows} row(s) answered in {given.output!r}.")
    return 0


def evaluate(given: Any) -> None:
    """Measure a model."""
    from llmfit.estimators.filing import read_as
    from llmfit.files import find_inputs

    suffix = Path(given.output).suffix.lower() if given.output else ""
    if given.output and suffix not in (".html", ".json"):
        raise ParameterError(f"The report {given.output!r} must end in .html or .json.")
    find_inputs(given.data, format=given.format)
    estimator = _load(given)
    frame = read_as(estimator, given.data, format=given.format)
    if suffix == ".html":
        from llmfit.report import write_report

        write_report(estimator, frame, given.output)
    elif suffix == ".json":
        text = json.dumps(_plain(estimator.evaluate(frame)), indent=2, ensure_ascii=False, allow_nan=False)
        Path(given.output).expanduser().write_text(text + "\n", encoding="utf-8")
    else:
        put_measures({"rows": len(frame), **estimator.evaluate(frame)})
    if given.output:
        say(f"{len(frame)} row(s) measured; the report is in {given.output!r}.")


def export(given: Any) -> None:
    """Write a model for others to load."""
    _load(given).export(given.output, merge=given.merge, dtype=given.dtype)
    say(f"The model is in {given.output!r}.")


def show(given: Any) -> None:
    """Say what a saved model is."""
    from llmfit.persistence import from_json, read_folder

    _, manifest = read_folder(given.model)
    fitted, params = from_json(manifest["fitted"]), from_json(manifest["params"])
    base = fitted["base_model_"]
    pairs: dict[str, Any] = {
        "estimator": manifest["fitted_class"],
        "base model": f"{base['name']} ({base['kind']})",
        "adapter": _named(fitted["adapter"]),
        "head": _named(fitted.get("head")) if fitted.get("head") else "words",
        "target": fitted["target_"] if isinstance(fitted["target_"], str) else ", ".join(fitted["target_"]),
        "features": ", ".join(f"{name} ({kind})" for name, kind in fitted["features_"].items()),
        "trained weights": f"{fitted['trainable_parameters_']:,}",
        "max_length": fitted["max_length_"],
    }
    if "classes" in fitted:
        pairs["classes"] = ", ".join(map(str, fitted["classes"]["values"]))
    if params.get("quantization") is not None:
        pairs["quantization"] = params["quantization"]
    for name, value in fitted.get("evaluation_", {}).items():
        pairs[f"evaluation: {name}"] = value
    pairs["made by"] = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    put_pairs(pairs.items())


def _named(spec: Any) -> str:
    """Write a spec as its type and what it says of sizes."""
    if spec is None:
        return "none"
    sizes = [f"{name}={spec[name]}" for name in ("r", "alpha", "num_virtual_tokens", "pooling") if spec.get(name)]
    return f"{spec['type']} ({', '.join(sizes)})" if sizes else str(spec["type"])


def _load(given: Any) -> Any:
    import llmfit

    settings = {name.replace(".", "__"): value for name, value in given.settings}
    return llmfit.load(given.model, base_model=given.base_model, **{"verbose": int(not given.quiet), **settings})


def _plain(value: Any) -> Any:
    """Write measures as JSON can hold them; a frame as its rows by name."""
    from llmfit.files.writing import json_value

    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return {str(name): _plain(row) for name, row in value.to_dict("index").items()}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return json_value(value)
