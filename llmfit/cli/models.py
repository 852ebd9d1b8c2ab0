"""Commands that begin with a saved model: ``predict``, ``evaluate``, ``export``, ``show``.

Takes parsed arguments; writes files, or data to standard output. Everything heavy is imported where it is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmfit.cli.outputs import check_folder, check_report
from llmfit.cli.saying import put_measures, put_pairs, say
from llmfit.exceptions import ParameterError, check_int, suggest

__all__ = ["SETTINGS", "evaluate", "export", "load_model", "predict", "show"]

ROWS_FAILED = 3


def predict(given: Any) -> int:
    """Answer the rows of files."""
    from llmfit.estimators.filing import find_places
    from llmfit.files import find_inputs

    check_int("chunk_rows", "predict_files", given.chunk_rows, least=1)
    find_inputs(given.data, format=given.format)  # a name that is wrong is said before a model is loaded
    find_places(given.output, given.errors, resume=given.resume, overwrite=given.overwrite)
    scored = load_model(given, given.model, "predict").predict_files(
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

    suffix = check_report(given.output) if given.output else ""
    find_inputs(given.data, format=given.format)
    estimator = load_model(given, given.model, "evaluate")
    frame = read_as(estimator, given.data, format=given.format)
    if suffix == ".html":
        from llmfit.report import write_report

        write_report(estimator, frame, given.output)
    elif suffix == ".json":
        text = json.dumps(_plain(estimator.evaluate(frame)), indent=2, ensure_ascii=False, allow_nan=False)
        path = Path(given.output).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    else:
        put_measures({"rows": len(frame), **estimator.evaluate(frame)})
    if given.output:
        say(f"{len(frame)} row(s) measured; the report is in {given.output!r}.")


def export(given: Any) -> None:
    """Write a model for others to load."""
    from llmfit.estimators.exporting import EXPORT_MANIFEST

    check_folder(given.output, manifest=EXPORT_MANIFEST, what="exported model")
    estimator = load_model(given, given.model, "export" if given.merge else "export --no-merge")
    estimator.export(given.output, merge=given.merge, dtype=given.dtype)
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


def load_model(given: Any, path: str, command: str) -> Any:
    """Load a model, with those of its parameters set anew that have an effect on what the command does."""
    import llmfit

    usable = SETTINGS[command]
    for name, _ in given.settings:
        head = name.partition(".")[0]
        if head == "base_model":
            raise ParameterError("--set base_model has no place here. Pass --base-model.")
        if head not in usable:
            raise ParameterError(
                f"--set {name} has no effect on a model that is fitted. llmfit {command} has "
                f"{', '.join(usable)}.{suggest(head, usable)}"
            )
    settings = {name.replace(".", "__"): value for name, value in given.settings}
    generates = any(name.partition(".")[0] == "generation" for name, _ in given.settings)
    bare = {name: value for name, value in settings.items() if name.partition("__")[0] != "generation"}
    model = llmfit.load(
        path, base_model=getattr(given, "base_model", None), **{"verbose": int(not given.quiet), **bare}
    )
    if generates:
        if not _generates(model):
            raise ParameterError("--set generation has no effect on this model: it generates no text.")
        model.set_params(**settings)
    return model


def _generates(model: Any) -> bool:
    inner = vars(model).get("estimator_", model)
    parts = vars(inner).get("estimators_", {"": inner}).values()
    return inner._head is None and any("generation" in part._get_param_names() for part in parts)


def _plain(value: Any) -> Any:
    """Write measures as JSON can hold them; a frame as its rows by name."""
    from llmfit.files.writing import json_value

    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return {str(name): _plain(row) for name, row in value.to_dict("index").items()}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return json_value(value)


# Parameters of a fitted model that each command uses; the others have shaped the fit.
LOADED = ("device", "dtype", "quantization")
ANSWERING = ("batch_tokens", *LOADED, "generation", "random_state", "verbose")
SETTINGS: dict[str, tuple[str, ...]] = {
    "predict": ANSWERING,
    "evaluate": ANSWERING,
    "preview": LOADED,
    "export": ("generation",),
    "export --no-merge": LOADED,
}
