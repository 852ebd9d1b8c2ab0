"""Ludwig's features: columns with their kinds, and what reads and answers them; as parameters of an estimator.

Takes input and output features with their encoders, decoders, losses and preprocessing; gives features, target, head,
base_model, adapter and what else they say. All columns are read by one model, so that encoders must agree.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from llmfit.config.ludwig.feature_rows import (
    CACHED,
    DECODER,
    DECODERS,
    ENCODER,
    ENCODERS,
    ESTIMATORS,
    INPUT,
    INPUT_KINDS,
    INPUT_PREPROCESSING,
    LOSS,
    LOSSES,
    OUTPUT,
    OUTPUT_KINDS,
    OUTPUT_PREPROCESSING,
    POOLINGS,
    PRESETS,
    SHORTHAND,
)
from llmfit.config.ludwig.models import read_adapter, read_prompt, read_quantization
from llmfit.config.ludwig.rows import Table, read_section
from llmfit.config.reading import merge
from llmfit.exceptions import ParameterError, quoted, suggest

__all__ = ["Inputs", "Outputs", "as_list", "read_inputs", "read_outputs"]


class Inputs(NamedTuple):
    """What the input features say: parameters, the kinds of their columns, and the encoder that all share."""

    params: dict[str, Any]
    features: dict[str, str | None]
    encoder: dict[str, Any] | None
    template: dict[str, Any]
    cached: bool


class Outputs(NamedTuple):
    """What the output features say: parameters, the kinds of the targets, and the shorthands regularize and dropout."""

    params: dict[str, Any]
    targets: dict[str, str | None]
    short: dict[str, Any]
    longest: int | None


def as_list(given: Any, place: str) -> list[tuple[str, Mapping[str, Any]]]:
    """List features, each with its place: one mapping stands for a list of one."""
    if given is None:
        return []
    items = [(place, given)] if isinstance(given, Mapping) else [(f"{place}[{i}]", one) for i, one in enumerate(given)]
    for where, one in items:
        if not isinstance(one, Mapping):
            raise ParameterError(f"The config's {where!r} must be a mapping. Got {one!r} instead.")
    return items


def read_inputs(given: Any, defaults: Mapping[str, Any]) -> Inputs:
    """Read the input features, Ludwig's defaults of their types below them."""
    params: dict[str, Any] = {}
    features: dict[str, str | None] = {}
    template: dict[str, Any] = {}
    encoders: dict[str, dict[str, Any]] = {}
    cached = False
    for place, one in as_list(given, "input_features"):
        said = read_section(INPUT, _with_defaults(one, defaults, ("preprocessing", "encoder")), place)
        features[_column(said, place, features)] = _kind(said, INPUT_KINDS, place)
        prepared = _preprocessing(INPUT_PREPROCESSING, said.get("preprocessing"), f"{place}.preprocessing")
        cached |= bool(prepared.pop("cache_encoder_embeddings", False))
        if "prompt" in prepared:
            _add(template, read_prompt(prepared.pop("prompt"), f"{place}.preprocessing.prompt"), place)
        _add(template, {"na_rep": prepared.pop("fill_value")} if "fill_value" in prepared else {}, place)
        _add(params, prepared, place)
        if said.get("encoder") is not None:
            encoder, own = _encoder(said["encoder"], f"{place}.encoder")
            cached |= own
            if encoder:
                encoders[f"{place}.encoder"] = encoder
    return Inputs(params, features, _shared(encoders), template, cached)


def _with_defaults(one: Mapping[str, Any], defaults: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    own = defaults.get(str(one.get("type")), {})
    return merge({key: own[key] for key in keys if key in own}, one)


def _column(said: dict[str, Any], place: str, before: Collection[str]) -> str:
    name = said.get("column") or said.get("name")
    if not isinstance(name, str):
        raise ParameterError(f"The config's {place!r} needs a 'name': the column that it stands for.")
    if name in before:
        raise ParameterError(f"The config's {place!r} names the column {name!r}, as another before it does. Drop one.")
    return name


def _kind(said: dict[str, Any], kinds: Mapping[str, str | None], place: str) -> str | None:
    kind = said.get("type")
    if kind is None or kinds.get(kind) is not None:
        return kinds[kind] if kind else None
    known = [name for name, there in kinds.items() if there]
    raise ParameterError(
        f"The config's '{place}.type' must be one of {quoted(known)}: llmfit reads and writes words, numbers and "
        f"classes. Got {kind!r} instead.{suggest(kind, known)}"
    )


def _add(found: dict[str, Any], more: Mapping[str, Any], place: str) -> None:
    """Add parameters; one that another feature has said otherwise is refused."""
    for key, value in more.items():
        if key in found and found[key] != value:
            raise ParameterError(
                f"The config's {place!r} says {key}={value!r}, but a feature before it says {found[key]!r}: all "
                "features are read and answered by one model."
            )
        found[key] = value


def _preprocessing(rows: Table, given: Any, place: str) -> dict[str, Any]:
    said = read_section(rows, given, place)
    if "max_sequence_length" in said:
        said["max_length"] = said.pop("max_sequence_length")
    return {key: value for key, value in said.items() if value is not None}


def _encoder(given: Any, place: str) -> tuple[dict[str, Any] | None, bool]:
    """Read an encoder: a name or a mapping. None is one that leaves reading to the base model."""
    spec = {"type": given} if isinstance(given, str) else given
    said = read_section(ENCODER, spec, place)
    cached = read_section(CACHED, said.pop("preprocessing", None), f"{place}.preprocessing")
    kind = said.pop("type", None)
    if kind == "passthrough":
        return None, bool(cached.get("cache_encoder_embeddings"))
    if kind not in ENCODERS:
        raise ParameterError(
            f"The config's '{place}.type' must be one of {quoted(ENCODERS, most=99)}: a pretrained language model. "
            f"Got {kind!r} instead.{suggest(kind, ENCODERS)}"
        )
    found = {"kind": kind, **said, "base_model": _named(said, kind, place)}
    if said.get("reduce_output") is not None:
        if said["reduce_output"] not in POOLINGS:
            raise ParameterError(
                f"The config's '{place}.reduce_output' must be one of {quoted(POOLINGS)}. "
                f"Got {said['reduce_output']!r} instead."
            )
        found["pooling"] = POOLINGS[said["reduce_output"]]
    for key, read in (("adapter", read_adapter), ("quantization", read_quantization)):
        if said.get(key) is not None:
            found[key] = read(said[key], f"{place}.{key}")
    return found, bool(cached.get("cache_encoder_embeddings"))


def _named(said: dict[str, Any], kind: str, place: str) -> Any:
    name = said.get("base_model") or said.get("pretrained_model_name_or_path") or ENCODERS[kind]
    if name is None:
        wanted = "base_model" if kind == "llm" else "pretrained_model_name_or_path"
        raise ParameterError(f"The config's {place!r} needs {wanted!r}: the pretrained model that {kind!r} stands for.")
    return PRESETS.get(name, name)


def _shared(encoders: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Take the encoder that all features with one agree on."""
    if not encoders:
        return None
    (first, chosen), *others = encoders.items()
    for place, other in others:
        if other != chosen:
            raise ParameterError(f"The config's {place!r} must be as {first!r}: one model reads all columns.")
    return chosen


def read_outputs(given: Any, defaults: Mapping[str, Any]) -> Outputs:
    """Read the output features, Ludwig's defaults of their types below them."""
    params: dict[str, Any] = {}
    targets: dict[str, str | None] = {}
    short: dict[str, Any] = {}
    weights: dict[str, float] = {}
    longest = None
    for place, one in as_list(given, "output_features"):
        said = read_section(OUTPUT, _with_defaults(one, defaults, ("decoder", "loss")), place)
        name, kind = _column(said, place, targets), _kind(said, OUTPUT_KINDS, place)
        targets[name] = kind
        prepared = _preprocessing(OUTPUT_PREPROCESSING, said.get("preprocessing"), f"{place}.preprocessing")
        decoder = _decoder(said.get("decoder"), f"{place}.decoder")
        limits = [prepared.pop("max_length", None), decoder.pop("max_new_tokens", None)]
        if kind == "text":
            longest = max((limit for limit in (longest, *limits) if limit), default=None)
        _add(params, {**prepared, **decoder}, place)
        weight, own = _loss(said.get("loss"), kind, f"{place}.loss")
        _add(params, own, place)
        if weight is not None:
            weights[name] = weight
        _add(short, read_section(SHORTHAND, said.get("trainer"), f"{place}.trainer"), place)
    if len(targets) > 1 and weights:
        params["loss_weights"] = weights
    elif any(weight != 1 for weight in weights.values()):
        raise ParameterError("The config's 'output_features.loss.weight' weighs several targets, but there is one.")
    return Outputs(params, targets, short, longest)


def _decoder(given: Any, place: str) -> dict[str, Any]:
    """Read a decoder: a name or a mapping; the head that it stands for."""
    said = read_section(DECODER, {"type": given} if isinstance(given, str) else given, place)
    kind = said.pop("type", None)
    if kind is None:
        return said
    if kind not in DECODERS:
        raise ParameterError(
            f"The config's '{place}.type' must be one of {quoted(DECODERS)}. Got {kind!r} instead."
            f"{suggest(kind, DECODERS)}"
        )
    return {**said, "head": DECODERS[kind]}


def _loss(given: Any, kind: str | None, place: str) -> tuple[float | None, dict[str, Any]]:
    """Read a loss: its weight among those of several targets, and weights of classes."""
    said = read_section(LOSS, {"type": given} if isinstance(given, str) else given, place)
    name = said.get("type")
    if name is not None and kind is not None and name not in LOSSES[kind]:
        raise ParameterError(
            f"The config's '{place}.type' must be {quoted(LOSSES[kind])} for a target of the type {kind!r}. "
            f"Got {name!r} instead."
        )
    weights = said.get("class_weights")
    if weights is not None and not isinstance(weights, Mapping):
        raise ParameterError(
            f"The config's '{place}.class_weights' must be a mapping of label to weight, as a list has no labels. "
            f"Got {weights!r} instead."
        )
    own = {"class_weight": dict(weights)} if weights else {}
    return said.get("weight"), own


def estimator_of(targets: Mapping[str, str | None]) -> str:
    """Name the estimator of the targets' kinds."""
    kinds = list(targets.values())
    return ESTIMATORS[kinds[0]] if len(kinds) == 1 else "LLMEstimator"
