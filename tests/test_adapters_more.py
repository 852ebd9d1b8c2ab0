"""Methods that only peft has, families that an adapter names, few bits, heads, and what is exported beside adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.adapters import IDS, RATES
from conftest import make_model
from head_side import MODELS, headed
from sklearn.model_selection import GridSearchCV
from test_adapters_other import OTHERS, SETTINGS
from torch_side import classifier, make_other, plain_model, weights

import llmfit
from llmfit.adapters import METHODS
from llmfit.base_model import load_base_model
from llmfit.exceptions import ParameterError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")


def logits_of(clf: Any) -> torch.Tensor:
    base = load_base_model(clf.base_model, device="cpu", dtype="float32")
    with torch.no_grad(), base.attach(clf._adapter, weights(clf)) as model:
        return model(input_ids=IDS).logits


@torch.no_grad()
def exported(clf: Any, folder: Path) -> torch.Tensor:
    """What transformers alone says with the exported model."""
    clf.export(folder, dtype="float32")
    return plain_model(str(folder))(input_ids=IDS).logits


# Methods that only peft has -------------------------------------------------------------------------


UNMERGED = {"shadow"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_another_method_of_peft_is_merged_or_says_why_not(name: str, settings: Any, frame: Any, tmp_path: Path) -> None:
    adapter = {"type": name, **SETTINGS.get(name, {})}
    clf = classifier(settings, adapter=adapter, epochs=3, learning_rate=5e-3).fit(frame)
    if name in UNMERGED:
        advice = r"Use merge=False, which writes a PEFT folder\."
        with pytest.raises(ParameterError, match=rf"^The adapter cannot be merged: .+\. {advice}$"):
            clf.export(tmp_path / "merged")
    else:
        torch.testing.assert_close(exported(clf, tmp_path / "merged"), logits_of(clf), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["miss", "road", "delora", "shira", "psoft"])
def test_another_method_of_peft_is_searched(name: str, settings: Any, frame: Any) -> None:
    key, values = {"road": ("group_size", [8, 16])}.get(name, ("r", [2, 4]))
    clf = classifier(settings, adapter={"type": name})
    search = GridSearchCV(clf, {f"adapter__{key}": values}, cv=2, scoring="neg_log_loss", error_score="raise")
    scores = search.fit(frame[["text"]], frame["label"]).cv_results_["mean_test_score"]
    assert np.isfinite(scores).all()
    assert scores[0] != scores[1]


# Families -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_adaption_prompt_on_the_families_that_it_names(
    kind: str, settings: Any, frame: Any, tiny: str, tmp_path: Path
) -> None:
    folder = make_other(tmp_path / kind, tiny, kind)
    given = {**settings, "base_model": folder, "epochs": 8, "learning_rate": 0.1}
    clf = classifier(given, adapter={"type": "adaption_prompt", "adapter_len": 4}).fit(frame)
    assert clf.history_["loss"].iloc[-1] < clf.history_["loss"].iloc[0]
    clf.save(tmp_path / "saved")
    np.testing.assert_array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), clf.predict_proba(frame))
    one = np.concatenate([clf.predict_proba(frame.iloc[[i]]) for i in range(3)])
    np.testing.assert_allclose(one, clf.predict_proba(frame)[:3], atol=1e-5)


# Few bits -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("wide"), hidden=64)


BESIDE = [  # in the fewest that a method goes with, and in the others where there is more time
    pytest.param(name, bits, marks=[pytest.mark.slow] if bits > min(method.quantizable) else [], id=f"{name}-{bits}")
    for name, method in METHODS.items()
    if name != "full"
    for bits in method.quantizable
]


@pytest.mark.parametrize(("name", "bits"), BESIDE)
def test_every_method_that_may_learns_beside_few_bits(
    name: str, bits: int, wide: str, settings: Any, frame: Any, tmp_path: Path
) -> None:
    base = load_base_model(wide, device="cpu", dtype="float32", quantization=bits)
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    given = {**settings, "base_model": wide, "quantization": bits, "epochs": 6}
    clf = classifier(given, adapter=name, learning_rate=RATES.get(name, 1e-2)).fit(frame)
    assert clf.history_["loss"].iloc[-1] < 0.9 * clf.history_["loss"].iloc[0]
    clf.save(tmp_path / "m")
    np.testing.assert_allclose(llmfit.load(tmp_path / "m").predict_proba(frame), clf.predict_proba(frame), atol=1e-6)
    after = base.model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


# Exports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "extra",
    [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [70, 80]}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_trained_beside_lora_is_exported(
    extra: dict[str, Any], tied: bool, settings: Any, frame: Any, tiny: str, tmp_path: Path
) -> None:
    folder = make_other(tmp_path / "base", tiny, "llama", tie_word_embeddings=tied)
    adapter = {"r": 4, "target_modules": ["q_proj"], **extra}
    clf = classifier({**settings, "base_model": folder}, adapter=adapter, epochs=3).fit(frame)
    adapted = logits_of(clf)
    assert float((adapted - plain_model(folder)(input_ids=IDS).logits).abs().max()) > 1e-2
    torch.testing.assert_close(exported(clf, tmp_path / "merged"), adapted, rtol=0, atol=1e-4)
    clf.export(tmp_path / "adapter", merge=False)
    import peft

    again = peft.PeftModel.from_pretrained(plain_model(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, adapted, rtol=0, atol=1e-4)


# Heads ----------------------------------------------------------------------------------------------


REFUSED = {  # beside a head as without one; docs/contributing.md has the reasons
    ("encoder-decoder", "prefix_tuning"): "stands before what the decoder beside an encoder says, and a linear head "
    "reads the encoder alone, whose layers take no keys and values from elsewhere. Choose another adapter, as "
    "'p_tuning', or set head='lm'.",
    **{
        (kind, "adaption_prompt"): "is for models of the families 'gpt2', 'llama', 'mistral'. Got a model of the "
        f"family {family!r} instead."
        for kind, family in (("encoder", "bert"), ("encoder-decoder", "t5"))
    },
}


@pytest.fixture(scope="module")
def kinds(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("kinds")
    return {"decoder": tiny} | {kind: make(place / kind) for kind, make in MODELS.items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["decoder", *MODELS])
def test_a_head_and_any_adapter_are_kept(
    kind: str, name: str, kinds: Any, settings: Any, frame: Any, tmp_path: Path
) -> None:
    given = {"base_model": kinds[kind], "adapter": name, "learning_rate": 5e-3}
    clf = headed(settings, **given, epochs=3)
    if (kind, name) in REFUSED:
        with pytest.raises(ParameterError) as error:
            clf.fit(frame)
        assert str(error.value) == f"The adapter {name!r} {REFUSED[kind, name]}"
        return
    clf.fit(frame).save(tmp_path / "saved")
    again = llmfit.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict_proba(frame), clf.predict_proba(frame))
    assert clf.history_["loss"].iloc[-1] < clf.history_["loss"].iloc[0]
    begun = weights(headed(settings, **given, epochs=1).fit(frame))  # one step: a head of zeros sends no gradient back
    own = {key: tensor for key, tensor in weights(clf).items() if not key.startswith("head/")}
    assert any(key not in begun or not torch.equal(tensor, begun[key]) for key, tensor in own.items())


def test_lora_ga_has_no_gradient_through_a_head_of_zeros(settings: Any, frame: Any) -> None:
    adapter = {"type": "lora", "r": 4}
    one, none = (headed(settings, adapter=adapter, epochs=n, learning_rate=0.1).fit(frame) for n in (1, 2))
    assert all(not tensor.any() for key, tensor in weights(one).items() if ".lora_B." in key)
    assert any(tensor.any() for key, tensor in weights(none).items() if ".lora_B." in key)
    with pytest.raises(ParameterError) as error:
        headed(settings, adapter={**adapter, "init_lora_weights": "lora_ga"}).fit(frame)
    assert str(error.value) == (
        "init_lora_weights='lora_ga' begins along the gradient of the loss in the base model's weights, which is zero "
        "where a new linear head, whose weights are zeros, answers. Choose another start, or set head='lm'."
    )
