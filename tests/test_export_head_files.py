"""A head beside its adapter: peft and torch alone, from the files that are written, give the estimator's answers."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from head_side import SETS, headed, make_encoder, make_encoder_decoder
from safetensors.torch import load_file
from seq2seq_side import make_pair
from torch_side import make_other, plain_tokenizer

from llmfit import LLMEstimator, LLMRegressor
from llmfit.exceptions import ParameterError
from llmfit.sources import quiet_loading

POOLED: dict[str, Any] = {"last": lambda h: h[-1], "first": lambda h: h[0], "mean": lambda h: h.mean(0)}
ADAPTERS: dict[str, Any] = {
    "frozen": None,
    "lora": {"r": 4},
    "pissa": {"r": 4, "init_lora_weights": "pissa"},
    "vera": {"type": "vera", "r": 8},
    "prompt_tuning": {"type": "prompt_tuning", "num_virtual_tokens": 3},
    "prefix_tuning": {"type": "prefix_tuning", "num_virtual_tokens": 3},
}
OTHERS = ("prompt_tuning", "prefix_tuning")  # of which an encoder-decoder has one only under a head


@pytest.fixture(scope="module")
def folders(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    return {
        "llama": tiny,
        "gpt2": make_other(root / "gpt2", tiny, "gpt2"),
        "bert": make_encoder(root / "bert"),
        "t5": make_encoder_decoder(root / "t5"),
        "bart": make_pair(root / "bart", tiny, "bart"),
    }


@torch.no_grad()
def outputs_of(folder: Path, base: str, texts: Any) -> np.ndarray:
    """What the files say: peft, transformers and torch alone, one row after the other."""
    import peft
    import transformers

    told = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    head, tokenizer = load_file(folder / "head.safetensors"), plain_tokenizer(str(folder))
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, told["loader"]).from_pretrained(base, dtype=torch.float32)
        if (folder / "adapter_config.json").exists():
            model = peft.PeftModel.from_pretrained(model, folder)
    model.eval()
    name, _, last = told["reads"].partition("[")
    found = []
    for text in texts:
        row = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        more = {"decoder_input_ids": row["input_ids"][:, :1]} if name.startswith("encoder") else {}
        said = model(**row, **more, output_hidden_states=True)
        hidden = (said[name][-1] if last else said[name])[0, told["skip"] :]
        assert hidden.shape[0] == row["input_ids"].shape[1]
        found.append(torch.nn.functional.linear(POOLED[told["pooling"]](hidden), **head))
    return torch.stack(found).double().numpy()


def softmax(outputs: np.ndarray) -> np.ndarray:
    return np.exp(outputs - np.logaddexp.reduce(outputs, axis=1, keepdims=True))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "bart"])
def test_peft_and_torch_alone_give_the_classes(
    kind: str, adapter: str, folders: dict[str, str], settings: Any, frame: Any, tmp_path: Path
) -> None:
    if adapter == "prefix_tuning" and kind in ("t5", "bart"):
        pytest.skip("refused there")
    rows = frame.assign(label=["fruit", "fruit", "car", "train"] * 2)
    given = settings | {"base_model": folders[kind], "adapter": ADAPTERS[adapter], "epochs": 8, "learning_rate": 5e-2}
    clf = headed(given).fit(rows)
    clf.export(tmp_path / "out", merge=False)
    found = softmax(outputs_of(tmp_path / "out", folders[kind], rows["text"] + " is a"))
    np.testing.assert_allclose(found, clf.predict_proba(rows), atol=1e-4)
    assert np.ptp(found[:, 0]) > 1e-3
    told = json.loads((tmp_path / "out/head.json").read_text(encoding="utf-8"))
    assert told["targets"] == [{"target": "label", "first": 0, "number": 3, "classes": ["car", "fruit", "train"]}]
    assert (tmp_path / "out/adapter_config.json").exists() == (adapter != "frozen")


@pytest.mark.parametrize(("kind", "pooling"), [("llama", "mean"), ("bert", "first"), ("bert", "last"), ("t5", "last")])
def test_every_pooling(
    kind: str, pooling: str, folders: dict[str, str], settings: Any, frame: Any, tmp_path: Path
) -> None:
    given = settings | {"base_model": folders[kind], "epochs": 5, "head": {"pooling": pooling, "bias": False}}
    clf = headed(given).fit(frame)
    clf.export(tmp_path / "out", merge=False)
    found = softmax(outputs_of(tmp_path / "out", folders[kind], frame["text"] + " is a"))
    np.testing.assert_allclose(found, clf.predict_proba(frame), atol=1e-4)
    assert list(load_file(tmp_path / "out/head.safetensors")) == ["weight"]


def test_numbers_sets_and_several_targets(folders: dict[str, str], settings: Any, frame: Any, tmp_path: Path) -> None:
    rows = frame.assign(tags=SETS, price=np.arange(8.0) + 3)
    given = settings | {"base_model": folders["bert"], "epochs": 5, "features": "text"}
    model = headed(given | {"target": "price"}, LLMRegressor).fit(rows)
    model.export(tmp_path / "number", merge=False)
    told = json.loads((tmp_path / "number/head.json").read_text(encoding="utf-8"))["targets"][0]
    outputs = outputs_of(tmp_path / "number", folders["bert"], rows["text"] + " is a")
    np.testing.assert_allclose(told["mean"] + told["scale"] * outputs[:, 0], model.predict(rows), rtol=1e-4)
    sets = headed(given | {"target": "tags"}).fit(rows)
    sets.export(tmp_path / "sets", merge=False)
    outputs = outputs_of(tmp_path / "sets", folders["bert"], rows["text"] + " is a")
    np.testing.assert_allclose(1 / (1 + np.exp(-outputs)), sets.predict_proba(rows), atol=1e-4)
    told = json.loads((tmp_path / "sets/head.json").read_text(encoding="utf-8"))["targets"][0]
    assert told["labels"] == ["fruit", "sweet"]
    both = headed(given | {"target": ["label", "price"]}, LLMEstimator).fit(rows)
    both.export(tmp_path / "both", merge=False)
    outputs = outputs_of(tmp_path / "both", folders["bert"], rows["text"] + " is a")
    label, price = json.loads((tmp_path / "both/head.json").read_text(encoding="utf-8"))["targets"]
    own = outputs[:, label["first"] : label["first"] + label["number"]]
    np.testing.assert_allclose(softmax(own), both.predict_proba(rows)["label"], atol=1e-4)
    np.testing.assert_allclose(
        price["mean"] + price["scale"] * outputs[:, price["first"]], both.predict(rows)["price"], rtol=1e-4
    )


@pytest.mark.parametrize("adapter", ["frozen", "lora", "prompt_tuning"])
@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_the_code_in_the_card_runs(
    kind: str, adapter: str, folders: dict[str, str], settings: Any, frame: Any, tmp_path: Path
) -> None:
    given = settings | {"base_model": folders[kind], "adapter": ADAPTERS[adapter], "epochs": 5}
    clf = headed(given).fit(frame)
    clf.export(tmp_path / "out", merge=False)
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]  # type: ignore[index]
    code = code.replace("path/to/this/folder", str(tmp_path / "out")).replace("a prompt, as below", "red apple is a")
    names: dict[str, Any] = {}
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)
    found = names["outputs"].softmax(0).numpy()
    np.testing.assert_allclose(found, clf.predict_proba(frame)[0], atol=1e-4)


def test_what_has_no_adapter_and_no_head_of_its_own_is_refused(settings: Any, frame: Any, tmp_path: Path) -> None:
    clf = headed(settings | {"adapter": "full"}).fit(frame)
    with pytest.raises(ParameterError) as error:
        clf.export(tmp_path / "out", merge=False)
    assert str(error.value) == ("merge=False writes an adapter by itself, and adapter='full' has none. Use save().")


def test_an_adapter_beside_few_bits_is_written_with_its_head(settings: Any, frame: Any, tmp_path: Path) -> None:
    from conftest import make_model

    folder = make_model(tmp_path / "wide", hidden=64)
    clf = headed(settings | {"base_model": folder, "quantization": 8, "epochs": 4}).fit(frame)
    clf.export(tmp_path / "out", merge=False)
    outputs = outputs_of(tmp_path / "out", folder, frame["text"] + " is a")  # beside the whole base
    np.testing.assert_allclose(softmax(outputs), clf.predict_proba(frame), atol=0.05)


@pytest.mark.filterwarnings("ignore:This model cannot read packed rows")
def test_a_head_on_what_the_layers_before_the_words_make_is_not_written(
    tiny: str, tmp_path: Path, settings: Any, frame: Any
) -> None:
    """A RoBERTa that was saved as a decoder transforms its hidden states before they become words."""
    base = make_other(tmp_path / "roberta", tiny, "roberta", is_decoder=True)
    model = headed({**settings, "base_model": base}, adapter=None).fit(frame)
    with pytest.raises(ParameterError, match="has layers of its own between its hidden states and its words"):
        model.export(tmp_path / "out", merge=False)
    assert not (tmp_path / "out").exists()
