"""Ludwig's configurations, read as an estimator and its parameters.

Takes a config in Ludwig's words, parameters of llmfit's among them; gives the name of an estimator and its parameters.
Every key is mapped, refused with a sentence that names its place, or without effect for a reason: the tables of this
package say which, the checks, the JSON Schema and docs/from-ludwig.md are made of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from string import Formatter
from typing import Any

from llmfit.config.ludwig import feature_rows, models, search_rows, training
from llmfit.config.ludwig.feature_rows import PRESETS
from llmfit.config.ludwig.features import Inputs, Outputs, estimator_of, read_inputs, read_outputs
from llmfit.config.ludwig.models import read_adapter, read_generation, read_prompt, read_quantization
from llmfit.config.ludwig.rows import Table, idle, many, mapped, read_section, refused, table, unknown
from llmfit.config.ludwig.training import read_preprocessing, read_trainer
from llmfit.exceptions import ParameterError

__all__ = ["TABLES", "is_ludwig", "translate"]

SHARED = ("base_model", "adapter", "quantization", "generation", "hyperopt")  # words of both
TASKS = ("task", "__task__")


def is_ludwig(config: Mapping[str, Any]) -> bool:
    """Tell a config that has keys which only Ludwig has."""
    return any(key in TOP and key not in SHARED for key in config)


def translate(config: Mapping[str, Any], own: Collection[str]) -> tuple[str, dict[str, Any]]:
    """Read a config in Ludwig's words.

    Parameters
    ----------
    config : mapping
        Without its hyperopt.
    own : collection of str
        Names of llmfit's parameters, which may stand beside Ludwig's keys.

    Returns
    -------
    str
        Name of the estimator.
    dict of str to any
        Its parameters, as far as the config says them.

    Raises
    ------
    ParameterError
        For the first key that is unknown or refused, or two that say different things of one parameter.
    """
    said = read_section(TOP, config, "", more=[*own, "estimator"])
    _check_backend(said.pop("backend", None))
    _check_combiner(said.pop("combiner", None))
    if said.get("model_type") not in (None, "llm", "ecd"):
        raise ParameterError(f"The config's 'model_type' must be 'llm' or 'ecd'. Got {said['model_type']!r} instead.")
    read_section(models.MODEL_PARAMETERS, said.pop("model_parameters", None), "model_parameters")
    defaults = _defaults(said.pop("defaults", None))
    inputs = read_inputs(said.pop("input_features", None), defaults)
    outputs = read_outputs(said.pop("output_features", None), defaults)
    trainer = read_trainer(said.pop("trainer", None), llm=said.get("model_type") == "llm")
    kind = said.pop("estimator", None) or estimator_of(outputs.targets)
    model = _model(said, inputs, trainer)
    params = {**_columns(inputs, outputs, kind), **_template(said, inputs)}
    answered = _headed(outputs.params, model, params)
    for more in (
        read_preprocessing(said.pop("preprocessing", None), list(outputs.targets)),
        inputs.params,
        answered,
        model,
        {key: value for key, value in trainer.items() if key != "type"},
        _generation(said, outputs, kind, said.get("head", answered.get("head", params.get("head")))),
    ):
        params = _agreed(params, more)
    if "max_length" in params and "truncation" not in said:
        params["truncation"] = "prompt"
    if params.get("early_stopping") and "validation_fraction" not in {**params, **said}:
        params["validation_fraction"] = training.LUDWIGS_VALIDATION
    if outputs.short.get("regularize") is not None:
        params = _agreed(params, {"weight_decay": outputs.short["regularize"]})
    if outputs.short.get("dropout") is not None:
        params.update(_dropout(params, outputs.short["dropout"]))
    return kind, _agreed(params, {key: value for key, value in said.items() if key in own and key not in SHARED})


def _agreed(params: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Add parameters that may only say again what is known."""
    for key, value in more.items():
        if key in params and params[key] != value:
            raise ParameterError(
                f"The config says {key}={value!r}, but Ludwig's keys in it say {key}={params[key]!r}. Leave one out."
            )
    return {**params, **more}


def _headed(answered: Mapping[str, Any], model: Mapping[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
    """Let the encoder's head stand for the decoder's, unless one answers in words and the other does not."""
    if "head" in model and answered.get("head", "linear") == "linear":
        columns.pop("head", None)
        return {key: value for key, value in answered.items() if key != "head"}
    return dict(answered)


def _check_backend(given: Any) -> None:
    said = read_section(BACKEND, {"type": given} if isinstance(given, str) else given, "backend")
    if said.get("type") not in (None, "local"):
        raise ParameterError(
            f"The config's 'backend.type' must be 'local': llmfit runs in the process that calls it. "
            f"Got {said['type']!r} instead."
        )


def _check_combiner(given: Any) -> None:
    said = read_section(COMBINER, {"type": given} if isinstance(given, str) else given, "combiner")
    if said.get("type") not in (None, "concat"):
        raise ParameterError(
            "The config's 'combiner.type' must be 'concat': all columns stand in one prompt, so that nothing is left "
            f"to combine. Got {said['type']!r} instead."
        )


def _defaults(given: Any) -> dict[str, Any]:
    """Read Ludwig's defaults of types: sections whose values are read with the features of that type.

    A config that Ludwig has rendered holds those of every type; of one that no feature can have, nothing is read.
    """
    kinds = table(*(mapped(name, "", "mapping") for name in feature_rows.INPUT_KINDS))
    found = read_section(kinds, given, "defaults")
    for kind, sections in found.items():
        if feature_rows.INPUT_KINDS[kind]:
            for name, section in read_section(DEFAULTS, sections, f"defaults.{kind}").items():
                _check_names(name, section, f"defaults.{kind}.{name}")
    return {kind: sections or {} for kind, sections in found.items()}


def _check_names(name: str, section: Any, place: str) -> None:
    """Refuse a key that no feature would have there, also where no feature reads the section."""
    tables, types = feature_rows.DEFAULTS_OF[name]
    if isinstance(section, Mapping) and (not types or section.get("type") in (None, *types)):
        known = {key for rows in tables for key in rows}
        for key in section:
            if key not in known:
                raise unknown(f"{place}.{key}", place, known)


def _columns(inputs: Inputs, outputs: Outputs, kind: str) -> dict[str, Any]:
    """Name features and target, their kinds where they say more than the estimator does."""
    params: dict[str, Any] = {}
    if inputs.features:
        typed = all(inputs.features.values())
        params["features"] = dict(inputs.features) if typed else list(inputs.features)
    if len(outputs.targets) == 1 and kind != "LLMEstimator":
        ((name, its),) = outputs.targets.items()
        params["target"] = {name: its} if its in ("binary", "category", "set") else name
        if its == "set":
            params["head"] = "linear"
    elif outputs.targets:
        params["target"] = dict(outputs.targets) if all(outputs.targets.values()) else list(outputs.targets)
    return params


def _template(said: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """Read the prompt; a template names the columns that it reads, whatever the one input feature is called."""
    found = _one_prompt(inputs.template, read_prompt(said.pop("prompt", None), "prompt"))
    params: dict[str, Any] = {"template": found} if found else {}
    if "template" in found and "{__sample__}" not in found["template"]:
        names = _fields(found["template"])
        declared = {name: kind for name, kind in inputs.features.items() if name in names}
        whole = bool(declared) and names <= {*declared, *TASKS} and all(declared.values())
        params["features"] = declared if whole else None
    return params


def _one_prompt(of_features: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Put the prompt of the features and that of the config together; they may not say different things."""
    for key, value in whole.items():
        if key in of_features and of_features[key] != value:
            raise ParameterError(
                f"The config's 'prompt' says {key}={value!r}, but that of a feature says {of_features[key]!r}. Leave "
                "one out."
            )
    return {**of_features, **whole}


def _fields(template: str) -> set[str]:
    """Names of a template's fields; of one that cannot be read none, which `fit` says better."""
    try:
        return {name for _, name, _, _ in Formatter().parse(template) if name}
    except ValueError:
        return set()


def _model(said: dict[str, Any], inputs: Inputs, trainer: dict[str, Any]) -> dict[str, Any]:
    """Say which weights read the rows, in how many bits, and what of them is trained."""
    encoder = inputs.encoder or {}
    params: dict[str, Any] = {key: encoder[key] for key in ("base_model", "quantization") if key in encoder}
    if encoder.get("max_sequence_length") is not None:
        params["max_length"] = encoder["max_sequence_length"]
    named = said.pop("base_model", None)
    if named is not None:
        params = _agreed(params, {"base_model": PRESETS.get(named, named)})
    if "quantization" in said:
        params = _agreed(params, {"quantization": read_quantization(said.pop("quantization"), "quantization")})
    adapter: Any = read_adapter(said.pop("adapter"), "adapter") if "adapter" in said else ...
    if "adapter" in encoder:
        if adapter not in (..., None, encoder["adapter"]):
            raise ParameterError("The config has an 'adapter' and another one within its encoder. Leave one out.")
        adapter = encoder["adapter"]
    adapter = _trained(adapter, encoder, said, trainer)
    if encoder or inputs.cached:
        params["head"] = {"type": "linear", "pooling": encoder["pooling"]} if "pooling" in encoder else "linear"
        if inputs.cached:
            _check_cached(adapter)
            adapter = None
    return params if adapter is ... else {**params, "adapter": adapter}


def _trained(adapter: Any, encoder: dict[str, Any], said: dict[str, Any], trainer: dict[str, Any]) -> Any:
    """Say what is trained: an adapter that is given, what an encoder says, or what a model of the type "llm" does."""
    kind = trainer.get("type")
    if kind not in (None, "finetune", "none"):
        raise ParameterError(
            f"The config's 'trainer.type' must be 'finetune' or 'none': llmfit learns from answers. "
            f"Got {kind!r} instead."
        )
    given = adapter is not ... and adapter is not None
    if kind == "none":
        if given:
            raise ParameterError(
                "The config's 'trainer.type' is 'none', so that the adapter would never be trained. Leave one out."
            )
        return None
    if given:
        return adapter
    if encoder:
        return "full" if encoder.get("trainable") or encoder["kind"] == "llm" else None
    if kind == "finetune":
        return "full"
    if said.get("model_type") == "llm":
        if trainer:
            raise ParameterError(
                "The config's 'trainer' needs a 'type': with model_type 'llm' and no adapter, 'finetune' trains all "
                "weights, and 'none' trains nothing."
            )
        return None
    return adapter


def _check_cached(adapter: Any) -> None:
    """Raise where vectors would be kept that training changes."""
    if adapter is not None and adapter is not ...:
        raise ParameterError(
            "The config's 'cache_encoder_embeddings' needs an encoder that is not trained. "
            f"Got adapter={adapter!r} beside it: its training changes the vectors."
        )


def _generation(said: dict[str, Any], outputs: Outputs, kind: str, head: Any) -> dict[str, Any]:
    """Say how texts are generated, where the target is one, or a number in words: classes are scored."""
    found = read_generation(said.pop("generation", None), "generation")
    if outputs.longest is not None:
        found.setdefault("max_new_tokens", outputs.longest)
    kinds = list(outputs.targets.values())
    words = not kinds or None in kinds or "text" in kinds or ("number" in kinds and head == "lm")
    return {"generation": found} if found and words and kind != "LLMClassifier" else {}


def _dropout(params: dict[str, Any], dropout: float) -> dict[str, Any]:
    """Put the one dropout of a config where there is one: in the adapter, or else in the head."""
    from llmfit.adapters import adapter_defaults

    adapter, head = params.get("adapter", "lora"), params.get("head")
    spec = {"type": adapter} if isinstance(adapter, str) else adapter
    if spec is not None and "dropout" in adapter_defaults(spec):
        return {"adapter": {**spec, "dropout": dropout}}
    if head is not None and head != "lm":
        return {"head": {**({"type": head} if isinstance(head, str) else head), "dropout": dropout}}
    raise ParameterError(
        f"The config's dropout of {dropout!r} has no place: neither the adapter nor a linear head has one."
    )


TOP: Table = table(
    mapped("model_type", "'llm': nothing is trained without adapter or trainer; 'ecd': LoRA by default", "text", "ecd"),
    mapped("base_model", "base_model; the names of Ludwig's presets stand for their hub ids", "text"),
    mapped("input_features", "features; see input_features", "several"),
    mapped("output_features", "target, and the estimator; see output_features", "several"),
    mapped("prompt", "template; see prompt", "mapping"),
    mapped("adapter", "adapter; see adapter", "spec"),
    mapped("quantization", "quantization; see quantization", "any"),
    mapped(
        "generation",
        "generation, where an answer is generated: a text, or a number with head lm. Classes are scored and heads "
        "compute numbers, so that it can change nothing there; its keys are checked all the same. See generation",
        "mapping",
    ),
    mapped("trainer", "see trainer", "mapping"),
    mapped("preprocessing", "see preprocessing", "mapping"),
    mapped("defaults", "sections of all features of a type, below what they say themselves", "mapping"),
    mapped("hyperopt", "a search; see hyperopt", "mapping"),
    mapped("model_parameters", "see model_parameters", "mapping"),
    mapped("backend", "'local' alone; see backend", "spec", "local"),
    mapped("combiner", "'concat' alone; see combiner", "spec", "concat"),
    refused("adapters", "an estimator has one adapter. Fit one for each: they share the base model.", {}),
    refused("preset", "the defaults are llmfit's."),
    refused("trust_remote_code", "no code of a model's folder is executed.", False),
    refused("is_multimodal", "rows are read as text.", False),
    idle("ludwig_version", "a note of Ludwig's"),
)
_OF_RAY = "read by Ludwig's 'ray' alone, which is refused"
BACKEND: Table = table(
    mapped("type", "'local': fit and predict run in the process that calls them", "text", "local"),
    idle("cache_dir", "a folder for prepared data, which is not kept on disk here"),
    idle(
        "credentials",
        "keys of remote storage, for Ludwig's data and cache: llmfit is given rows, and stores nothing there",
    ),
    many("processor trainer loader preprocessor_kwargs", idle, _OF_RAY),
)
_NO_LAYERS = "read only by layers that are refused"
COMBINER: Table = table(
    mapped("type", "'concat': all columns stand in one prompt, so that nothing is left to combine", "text", "concat"),
    refused("num_fc_layers", "the head is one linear layer on the pooled hidden states.", 0),
    refused("fc_layers", "the head is one linear layer on the pooled hidden states."),
    many("dropout activation flatten_inputs residual use_bias bias_initializer", idle, _NO_LAYERS),
    many("weights_initializer output_size norm norm_params batch_ensemble num_ensemble_members", idle, _NO_LAYERS),
)
DEFAULTS: Table = table(
    mapped("preprocessing", "as in the features of the type", "mapping"),
    mapped("encoder", "as in the input features of the type", "spec"),
    mapped("decoder", "as in the output features of the type", "spec"),
    mapped("loss", "as in the output features of the type", "spec"),
)
TABLES: dict[str, Table] = {
    "": TOP,
    **feature_rows.SECTIONS,
    **models.SECTIONS,
    **training.SECTIONS,
    **search_rows.SECTIONS,
    "backend": BACKEND,
    "combiner": COMBINER,
    "defaults.<type>": DEFAULTS,
}
