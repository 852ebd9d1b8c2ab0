"""Starts of LoRA: what they look at under a head, how they go on, and beside which base models they stand."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from head_side import headed, make_encoder
from sklearn.base import clone
from torch_side import classifier, furthest, plain_model, same, weights

import llmfit
from llmfit.adapters.lora_starts import _Covariance
from llmfit.base_model import load_base_model
from llmfit.exceptions import ParameterError
from llmfit.sources import quiet_loading

# MiCA -----------------------------------------------------------------------------------------------

MICA = {"type": "lora", "r": 4, "init_lora_weights": "mica"}


def sides(clf: Any, part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(clf).items() if f".lora_{part}." in name}


@pytest.mark.parametrize("way", ["warm_start", "folder", "loaded"])
def test_mica_trains_a_alone_however_it_goes_on(way: str, settings: Any, frame: Any, tmp_path: Path) -> None:
    first = classifier(settings, adapter=MICA).fit(frame)
    before, trained = {part: sides(first, part) for part in "AB"}, first.trainable_parameters_
    first.save(tmp_path / "saved")
    if way == "folder":
        again = clone(first).set_params(adapter=str(tmp_path / "saved" / "adapter")).fit(frame)
    else:
        again = (first if way == "warm_start" else llmfit.load(tmp_path / "saved")).set_params(warm_start=True)
        again.fit(frame)
    assert same(sides(again, "B"), before["B"])
    assert not any(torch.equal(a, before["A"][name]) for name, a in sides(again, "A").items())
    assert again.trainable_parameters_ == trained
    assert again._adapter.init_lora_weights == "mica"


def test_mica_has_no_rate_of_its_own_for_what_it_does_not_train(settings: Any, frame: Any) -> None:
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter={**MICA, "loraplus_lr_ratio": 16}).fit(frame)
    assert str(error.value) == (
        "The 'loraplus_lr_ratio' parameter of LoRA must be None where init_lora_weights is 'mica', which does not "
        "train B. Got 16 instead."
    )


# LoftQ ----------------------------------------------------------------------------------------------

LOFTQ = {"type": "lora", "r": 4, "init_lora_weights": "loftq"}
BESIDE = (
    "The adapter began, by init_lora_weights='loftq', as what a quantized base model has lost, and goes with such a "
    "one only; 'model.layers.0.self_attn.q_proj' is in full precision here. Set quantization as in the fit, or fit "
    "without: what is then taken out of the weights is given back when the fit ends."
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("wide"), hidden=64)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_few_bits_have_lost_is_not_added_to_a_whole_base(
    bits: int, wide: str, settings: Any, frame: Any, tmp_path: Path
) -> None:
    clf = classifier(settings | {"base_model": wide, "quantization": bits}, adapter=LOFTQ).fit(frame)
    clf.save(tmp_path / "saved")
    again = llmfit.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict_proba(frame), clf.predict_proba(frame))
    clf.export(tmp_path / "adapter", merge=False)
    with pytest.raises(ParameterError) as error:
        llmfit.load(tmp_path / "saved", quantization=None).predict(frame)
    assert str(error.value) == BESIDE


def test_loftq_on_a_whole_base_is_merged(wide: str, settings: Any, frame: Any, tmp_path: Path) -> None:
    clf = classifier(settings | {"base_model": wide}, adapter=LOFTQ).fit(frame)
    clf.export(tmp_path / "merged")
    again = classifier(settings, base_model=str(tmp_path / "merged"), adapter=None).fit(frame)
    np.testing.assert_allclose(again.predict_proba(frame), clf.predict_proba(frame), atol=1e-4)


def test_loftq_leaves_layers_alone_that_are_not_in_few_bits(settings: Any, frame: Any, tmp_path: Path) -> None:
    """The CPU's kernel of 4 bits reads inputs by 64: here the second half of each MLP stays whole."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = make_model(tmp_path / "odd", hidden=64)
    config = AutoConfig.from_pretrained(folder, intermediate_size=96)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    base = load_base_model(folder, device="cpu", dtype="float32", quantization=4)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    clf = classifier(settings | {"base_model": folder, "quantization": 4}, adapter=LOFTQ).fit(frame)
    after = base.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    ranks = {name.split(".")[-3]: len(a) for name, a in sides(clf, "A").items()}
    assert (ranks.pop("down_proj"), {*ranks.values()}) == (8, {4})
    clf.save(tmp_path / "saved")
    np.testing.assert_array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), clf.predict_proba(frame))


def test_loftq_says_which_files_it_reads(wide: str, settings: Any, frame: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(wide, tmp_path / "bin"))
    (folder / "model.safetensors").unlink()
    torch.save(plain_model(wide).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ParameterError) as error:
        classifier(settings | {"base_model": str(folder), "quantization": 4}, adapter=LOFTQ).fit(frame)
    assert str(error.value) == (
        "The 'init_lora_weights' parameter of LoRA cannot be 'loftq' here: it reads what the weights were in "
        f"safetensors files, and {str(folder.resolve())!r} has none."
    )


# EVA under a head -----------------------------------------------------------------------------------


def eva(**config: Any) -> dict[str, Any]:
    own = {"rho": 1, **config}
    return {"r": 4, "init_lora_weights": "eva", "eva_config": own, "target_modules": ["query"]}


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_eva_looks_at_all_that_a_head_reads(pooling: str, settings: Any, frame: Any, tmp_path: Path) -> None:
    """The directions of the first layer's inputs, by transformers alone, over whole prompts and nothing behind them."""
    from transformers import AutoModel, AutoTokenizer

    folder = make_encoder(tmp_path / "bert")
    given = {**settings, "base_model": folder, "head": {"pooling": pooling}, "learning_rate": 1e-30}
    masked, whole = (headed(given, adapter=eva(use_label_mask=on)).fit(frame) for on in (True, False))
    assert (furthest(masked, whole) < 1e-5) == (pooling != "last")
    with quiet_loading():
        model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(f"{text} is a", return_tensors="pt")["input_ids"] for text in frame["text"]]
    with torch.no_grad():
        seen = torch.cat([model.embeddings(ids)[0] for ids in rows]).double()
    _, vectors = torch.linalg.eigh(torch.cov(seen.T))
    first = next(a for name, a in sides(whole, "A").items() if ".layer.0." in name).double()
    assert float(torch.linalg.svdvals(first @ vectors[:, -4:]).min()) > 0.999


def test_eva_chooses_tokens_where_their_inputs_lie() -> None:
    """Inputs on MPS, which has no float64, are summed up on the CPU; what says which of them count comes after them."""
    values, chosen = torch.randn(2, 3, 4), torch.tensor([[True, False, True], [False, True, True]])

    class Elsewhere:
        shape = chosen.shape

        def to(self, device: torch.device) -> torch.Tensor:
            return chosen.to(device)

    seen = _Covariance(SimpleNamespace(r=2, in_features=4))
    seen.chosen = Elsewhere()  # type: ignore[assignment]
    seen(torch.nn.Identity(), (values,))
    torch.testing.assert_close(seen.covariance / 3, torch.cov(values[chosen].double().T))


def test_eva_looks_where_the_last_token_of_a_decoder_is(settings: Any, frame: Any, tiny: str) -> None:
    given = {**settings, "learning_rate": 1e-30}
    own = {**eva(), "target_modules": ["q_proj"]}
    last = headed({**given, "head": {"pooling": "last"}}, adapter=own).fit(frame)
    mean = headed({**given, "head": {"pooling": "mean"}}, adapter=own).fit(frame)
    assert furthest(last, mean) > 1e-3


# In bfloat16 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "lora_ga"])
def test_a_start_that_moves_w_stands_beside_bfloat16(
    start: str, tiny: str, settings: Any, frame: Any, tmp_path: Path
) -> None:
    """What is kept stands beside the W that was there: nothing learned, the base's own answers but for one rounding."""
    given = {**settings, "dtype": "bfloat16"}
    adapter = {"r": 4, "init_lora_weights": start}
    base = load_base_model(tiny, device="cpu", dtype="bfloat16")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    idle = classifier(given, adapter=adapter, learning_rate=1e-30).fit(frame)
    plain = classifier(given, adapter=None).fit(frame)
    np.testing.assert_allclose(idle.predict_proba(frame), plain.predict_proba(frame), atol=0.03)
    assert {tensor.dtype for tensor in weights(idle).values()} == {torch.float32}
    learned = classifier(given, adapter=adapter, epochs=12).fit(frame)
    assert learned.history_["loss"].iloc[-1] < 0.8 * learned.history_["loss"].iloc[0]
    exact = classifier(settings, adapter=adapter, epochs=12).fit(frame)
    np.testing.assert_allclose(learned.history_["loss"], exact.history_["loss"], rtol=0.15)
    learned.save(tmp_path / "saved")
    again = llmfit.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict_proba(frame), learned.predict_proba(frame))
    after = base.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
