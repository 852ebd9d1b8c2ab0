"""Every weight that is trained below a head has a gradient: what no vector comes through is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from head_side import MODELS, headed
from seq2seq_side import make_pair
from torch_side import CPU

import llmfit
from llmfit.adapters import METHODS, resolve_adapter
from llmfit.answers import classes, collate_answers
from llmfit.base_model import load_base_model
from llmfit.encoding import Encoded
from llmfit.exceptions import ParameterError
from llmfit.heads import LinearHead, WithHead

REFUSED = {("encoder-decoder", "prefix_tuning"), ("bart", "prefix_tuning")}
REFUSED |= {(kind, "adaption_prompt") for kind in ("encoder", "encoder-decoder", "bart")}
ROWS = [Encoded((1, 70, 80, 90), target=(0.0,)), Encoded((1, 70, 9), target=(1.0,))]


@pytest.fixture(scope="module")
def folders(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MODELS.items()}
    return {"decoder": tiny, **made, "bart": make_pair(tmp_path_factory.mktemp("bart") / "m", tiny, "bart")}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["decoder", *MODELS, "bart"])
def test_every_weight_that_is_trained_has_a_gradient(kind: str, name: str, folders: dict[str, str]) -> None:
    if (kind, name) in REFUSED:
        pytest.skip("refused there")
    base = load_base_model(folders[kind], device="cpu", dtype="float32")
    before = dict(base.model.named_parameters())
    forward = base.model.forward
    with base.attach(WithHead(resolve_adapter(name), LinearHead(), 2), training=True) as model:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for parameter in trained.values():  # where an adapter begins as nothing, half of its gradients are zero
            torch.nn.init.normal_(parameter, std=0.1)
        classes(model, collate_answers(ROWS, base.pad_id, CPU)).backward()
        assert [n for n, p in trained.items() if p.grad is None or not p.grad.any()] == []
        assert len(trained) > 2
    assert dict(base.model.named_parameters()).keys() == before.keys()
    assert base.model.forward == forward


@pytest.mark.parametrize("kind", ["encoder-decoder", "bart"])
def test_a_head_on_an_encoder_decoder_counts_its_encoder(
    kind: str, folders: dict[str, str], settings: Any, frame: Any, tmp_path: Path
) -> None:
    given = settings | {"base_model": folders[kind]}
    plain = load_base_model(folders[kind], device="cpu", dtype="float32").model
    encoder = sum(parameter.numel() for parameter in plain.get_encoder().parameters())
    whole = headed(given, adapter="full").fit(frame)
    assert whole.trainable_parameters_ == encoder + 2 * 33
    layers = [m for m in plain.get_encoder().modules() if isinstance(m, torch.nn.Linear)]
    clf = headed(given, adapter={"r": 2}).fit(frame)
    assert clf.trainable_parameters_ == sum(2 * (m.in_features + m.out_features) for m in layers) + 2 * 33
    for fitted in (whole, clf):
        fitted.save(tmp_path / fitted._adapter.type)
        loaded = llmfit.load(tmp_path / fitted._adapter.type)
        assert loaded.predict_proba(frame).tolist() == fitted.predict_proba(frame).tolist()


def test_a_layer_of_the_decoder_is_no_layer_below_a_head(folders: dict[str, str], settings: Any, frame: Any) -> None:
    given = settings | {"base_model": folders["encoder-decoder"]}
    with pytest.raises(ParameterError) as error:
        headed(given, adapter={"target_modules": ["EncDecAttention.q"]}).fit(frame)
    assert str(error.value) == (
        "The 'target_modules' parameter of LoRA must name layers of this model that LoRA can adapt. "
        "Got ['EncDecAttention.q'] instead. Did you mean 'SelfAttention'?"
    )
