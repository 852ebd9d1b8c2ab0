"""Nested parameters: read and set on None, names, dicts and specs, in any order; what the user gave is not changed."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from llmfit import Full, LLMClassifier, LLMEstimator, LLMGenerator, LoRA
from llmfit.callbacks import EarlyStopping
from llmfit.exceptions import ParameterError
from llmfit.templates import TemplateConfig

ESTIMATORS = [LLMClassifier, LLMGenerator, LLMEstimator]
LORA = {
    "type": "lora",
    "r": 16,
    "alpha": None,
    "dropout": 0.0,
    "target_modules": "all-linear",
    "bias": "none",
    "lora_bias": False,
    "ensure_weight_tying": False,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    **dict.fromkeys(
        (
            "alpha_pattern",
            "corda_config",
            "eva_config",
            "exclude_modules",
            "layers_pattern",
            "layers_to_transform",
            "loftq_config",
            "lora_ga_config",
            "loraplus_lr_ratio",
            "modules_to_save",
            "rank_pattern",
            "target_parameters",
            "trainable_token_indices",
        )
    ),
}
KEYS = ", ".join(repr(key) for key in sorted(LORA))
TEMPLATE = {"task": None, "template": None, "system": None, "chat": "auto", "few_shot": None, "na_rep": ""}


def nested(estimator: Any, name: str) -> dict[str, Any]:
    """The keys of a nested parameter, as get_params names them."""
    found = estimator.get_params()
    return {key.removeprefix(f"{name}__"): value for key, value in found.items() if key.startswith(f"{name}__")}


# What can be read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ESTIMATORS)
@pytest.mark.parametrize(
    ("name", "value", "keys"),
    [
        ("adapter", None, {}),
        ("adapter", "lora", LORA),
        ("adapter", "full", {"type": "full"}),
        ("adapter", {"r": 4}, LORA | {"r": 4}),
        ("adapter", {"type": "lora", "dropout": 0.5}, LORA | {"dropout": 0.5}),
        ("adapter", LoRA(r=4, alpha=1.5), LORA | {"r": 4, "alpha": 1.5}),
        ("adapter", Full(), {"type": "full"}),
        ("template", None, {}),
        ("template", "{text}", TEMPLATE | {"template": "{text}"}),
        ("template", {"task": "Sort."}, TEMPLATE | {"task": "Sort."}),
        ("template", TemplateConfig(task="Sort."), TEMPLATE | {"task": "Sort."}),
        ("early_stopping", None, {}),
        ("early_stopping", False, {}),
        ("early_stopping", True, {}),
        ("early_stopping", 3, {"patience": 3, "min_delta": 0.0}),
        ("early_stopping", {"min_delta": 0.5}, {"patience": 1, "min_delta": 0.5}),
    ],
)
def test_get_params_shows_every_key_with_its_default(cls: Any, name: str, value: Any, keys: dict[str, Any]) -> None:
    estimator = cls(**{name: value})
    assert nested(estimator, name) == keys
    assert estimator.get_params()[name] is value
    assert not any("__" in key for key in estimator.get_params(deep=False))


@pytest.mark.parametrize("cls", [LLMGenerator, LLMEstimator])
def test_generation_is_nested_too(cls: Any) -> None:
    estimator = cls().set_params(generation__max_new_tokens=9)
    assert estimator.generation == {"max_new_tokens": 9}
    assert nested(estimator, "generation")["num_beams"] == 1


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_get_params_without_depth_is_the_signature(cls: Any) -> None:
    names = set(cls().get_params(deep=False))
    own = {
        LLMClassifier: {"class_weight"},
        LLMGenerator: {"generation"},
        LLMEstimator: {"class_weight", "generation", "loss_weights"},
    }
    shared = set(LLMClassifier().get_params(deep=False)) - {"class_weight"}
    assert names == shared | own[cls]


# What can be set ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "params", "result"),
    [
        ("lora", {"adapter__r": 4}, {"type": "lora", "r": 4}),
        ("full", {"adapter__type": "lora", "adapter__r": 4}, {"type": "lora", "r": 4}),
        ({"r": 8, "alpha": 2}, {"adapter__r": 4}, {"r": 4, "alpha": 2}),
        (LoRA(r=8, dropout=0.5), {"adapter__r": 4}, {"type": "lora", "r": 4, "dropout": 0.5}),
        ({"r": 8}, {"adapter": None}, None),
        ({"r": 8, "bias": "all"}, {"adapter": {"r": 2}, "adapter__alpha": 1.0}, {"r": 2, "alpha": 1.0}),
        ("full", {"adapter": "lora", "adapter__r": 4, "adapter__bias": "all"}, {"type": "lora", "r": 4, "bias": "all"}),
    ],
)
def test_set_params_takes_whole_values_first_in_any_order(start: Any, params: dict[str, Any], result: Any) -> None:
    for order in (params, dict(reversed(params.items()))):
        estimator = LLMClassifier(adapter=start, epochs=7)
        assert estimator.set_params(**order, batch_size=2) is estimator
        assert estimator.adapter == result
        assert (estimator.epochs, estimator.batch_size) == (7, 2)


@pytest.mark.parametrize(
    ("start", "params", "sentence"),
    [
        (None, {"adapter__r": 4}, "'adapter' is None, so adapter__r cannot be set."),
        ("lora", {"adapter": None, "adapter__r": 4}, "'adapter' is None, so adapter__r cannot be set."),
        ("lora", {"early_stopping": False, "early_stopping__patience": 2}, "'early_stopping' is False, so "),
    ],
)
def test_no_key_is_set_on_what_is_switched_off(start: Any, params: dict[str, Any], sentence: str) -> None:
    """A search over adapter=[None] and adapter__r would train what its table calls zero-shot."""
    estimator = LLMClassifier(adapter=start)
    with pytest.raises(ParameterError, match=f"^{re.escape(sentence)}"):
        estimator.set_params(**params)
    assert estimator.adapter == start


@pytest.mark.parametrize(
    ("name", "start", "params", "result"),
    [
        ("template", "{a}", {"template__na_rep": "?"}, {"template": "{a}", "na_rep": "?"}),
        ("template", None, {"template__task": "T"}, {"task": "T"}),
        ("early_stopping", True, {"early_stopping__patience": 2}, {"patience": 2}),
        ("early_stopping", 3, {"early_stopping__min_delta": 0.1}, {"patience": 3, "min_delta": 0.1}),
        ("early_stopping", EarlyStopping(3, 0.2), {"early_stopping__patience": 2}, {"patience": 2, "min_delta": 0.2}),
    ],
)
def test_shorthand_becomes_a_dict_when_a_key_of_it_is_set(
    name: str, start: Any, params: dict[str, Any], result: dict[str, Any]
) -> None:
    assert getattr(LLMClassifier(**{name: start}).set_params(**params), name) == result


def test_the_users_dict_is_copied_and_never_written_to() -> None:
    mine = {"type": "lora", "r": 8, "target_modules": ["q_proj"]}
    kept = copy.deepcopy(mine)
    estimator = LLMClassifier(adapter=mine)
    assert estimator.adapter is mine
    other = LLMClassifier(adapter=mine)
    estimator.set_params(adapter__r=2)
    estimator.get_params()["adapter__target_modules"] = None
    assert mine == kept
    assert other.adapter is mine
    assert estimator.adapter == {**kept, "r": 2}
    spec = LoRA(r=8)
    assert LLMClassifier(adapter=spec).set_params(adapter__r=2).adapter["r"] == 2
    assert spec == LoRA(r=8)


@pytest.mark.parametrize("cls", ESTIMATORS)
@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"adaptor": "lora"}, "Invalid parameter 'adaptor' for estimator {cls}. Valid parameters are: {names!r}. {}"),
        ({"foo__r": 4}, "Invalid parameter 'foo__r' for estimator {cls}. Valid parameters are: {names!r}."),
        (
            {"adapter__rank": 4},
            "The 'adapter' parameter of {cls} has no parameter 'rank'. It has " + KEYS + ".",
        ),
        (
            {"adapter__droput": 0.1},
            "The 'adapter' parameter of {cls} has no parameter 'droput'. It has " + KEYS + ". Did you mean 'dropout'?",
        ),
        ({"adapter": "full", "adapter__r": 4}, "The 'adapter' parameter of {cls} has no parameter 'r'. It has 'type'."),
        (
            {"template__tasks": "T"},
            "The 'template' parameter of {cls} has no parameter 'tasks'. It has 'chat', 'few_shot', 'na_rep', "
            "'system', 'task', 'template'. Did you mean 'task'?",
        ),
        (
            {"early_stopping__patiance": 2},
            "The 'early_stopping' parameter of {cls} has no parameter 'patiance'. It has 'min_delta', 'patience'. "
            "Did you mean 'patience'?",
        ),
        ({"adapter": 1.5, "adapter__r": 4}, "'adapter' is 1.5, so adapter__r cannot be set."),
    ],
)
def test_unknown_names_are_refused_whole_with_a_suggestion(cls: Any, params: dict[str, Any], sentence: str) -> None:
    estimator = cls()
    before = estimator.get_params()
    names = estimator._get_param_names()
    wanted = sentence.format("Did you mean 'adapter'?", cls=cls.__name__, names=names)
    with pytest.raises(ParameterError) as caught:
        estimator.set_params(epochs=99, batch_size=99, **params)
    assert str(caught.value) == wanted
    assert estimator.get_params() == before


def test_unknown_keyword_of_the_constructor_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=re.escape("unexpected keyword argument 'epoch'")):
        LLMClassifier(epoch=3)


def test_keys_of_a_method_that_is_unknown_wait_for_fit() -> None:
    assert LLMClassifier(adapter="lorra").set_params(adapter__r=4).adapter == {"type": "lorra", "r": 4}


# Garbage -----------------------------------------------------------------------------------------------------------


class Refuser:
    """Refuses to be compared, tested or measured."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise RuntimeError

    def __len__(self) -> int:
        raise RuntimeError


GARBAGE = [
    -1,
    3.5,
    float("nan"),
    "helloworld",
    "",
    b"bytes",
    True,
    [],
    [[]],
    (),
    {},
    {1: 2},
    {"type": []},
    {"type": None},
    {"type": "lorra", "x": 1},
    {None: None},
    {"a__b": 1},
    np.arange(3),
    np.array(["a", "b"]),
    np.int64(3),
    object(),
    int,
    LoRA,
    Refuser(),
    len,
]


@pytest.mark.parametrize("cls", ESTIMATORS)
@pytest.mark.parametrize("value", GARBAGE, ids=lambda value: repr(value)[:30].partition(" at 0x")[0])
def test_garbage_is_stored_as_it_is_and_read_back(cls: Any, value: Any) -> None:
    for name in cls._get_param_names():
        for estimator in (cls(**{name: value}), cls().set_params(**{name: value})):
            assert estimator.get_params()[name] is value
            assert getattr(estimator, name) is value
            assert estimator.__sklearn_tags__().input_tags.string


# Properties ----------------------------------------------------------------------------------------------------------

leaves = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
adapters = (
    st.none()
    | st.sampled_from(["lora", "full", "other"])
    | st.dictionaries(st.sampled_from(sorted(set(LORA) - {"type"})), values, max_size=4)
    | st.builds(LoRA, r=st.integers(-1, 4), dropout=st.floats(0, 1))
)
templates = st.none() | st.text(max_size=5) | st.dictionaries(st.sampled_from(sorted(TEMPLATE)), values, max_size=4)


@settings(max_examples=100, deadline=None)
@given(adapters, templates, values)
def test_clone_and_set_params_of_get_params_give_the_same_parameters(adapter: Any, template: Any, other: Any) -> None:
    kept = copy.deepcopy((adapter, template, other))
    estimator = LLMClassifier(adapter=adapter, template=template, class_weight=other)
    params = estimator.get_params()
    twin = clone(estimator)
    assert twin.get_params() == params
    assert LLMClassifier().set_params(**estimator.get_params(deep=False)).get_params() == params
    again = clone(estimator).set_params(**params)  # every key at once: the whole value, then each of its keys
    for name in ("adapter", "template", "early_stopping"):
        assert nested(again, name) == nested(estimator, name)
    assert again.class_weight == estimator.class_weight
    assert clone(again).get_params() == again.get_params()
    assert (adapter, template, other) == kept


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["lora", {"r": 1}, LoRA(r=3)]), st.data())
def test_set_params_depends_on_no_order(start: Any, data: Any) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(LORA)), unique=True, max_size=4))
    params = {f"adapter__{key}": LORA[key] for key in keys}
    if data.draw(st.booleans()):
        params["adapter"] = data.draw(st.sampled_from(["lora", {"alpha": 3.0}]))
    shuffled = dict(data.draw(st.permutations(sorted(params.items(), key=str))))
    one, two = (LLMClassifier(adapter=start).set_params(**order) for order in (params, shuffled))
    assert one.get_params() == two.get_params()
    stepwise = LLMClassifier(adapter=start)
    for name in sorted(shuffled, key=lambda name: "__" in name):
        stepwise.set_params(**{name: shuffled[name]})
    assert stepwise.get_params() == one.get_params()
