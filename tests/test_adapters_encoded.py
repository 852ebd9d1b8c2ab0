"""Virtual tokens before what an encoder reads, against transformers on the same embeddings, and peft on the folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from benchmarks.adapters import RATES
from head_side import headed, make_encoder
from seq2seq_side import KINDS, assert_several_answered, make_pair, pair_losses, pair_rows, plain_pair
from torch_side import classifier, furthest, generator, plain_tokenizer, same, weights

import llmfit
from llmfit.adapters import METHODS
from llmfit.base_model import load_base_model
from llmfit.exceptions import ParameterError, TruncationWarning

PROMPTS = ["prompt_tuning", "p_tuning"]
N = 5
IDS = {
    "input_ids": torch.tensor([[70, 80, 90, 2], [71, 2, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    "decoder_input_ids": torch.tensor([[0, 90, 91], [0, 41, 42]]),
}
ENDLESS = pytest.mark.filterwarnings("ignore:.*without an end:llmfit.exceptions.TruncationWarning")


def adapter(name: str, **settings: Any) -> dict[str, Any]:
    return {"type": name, "num_virtual_tokens": N, **settings}


@pytest.fixture(scope="module")
def folders(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    pairs = {kind: make_pair(root / kind.replace(" ", "-"), tiny, kind) for kind in KINDS}
    return {**pairs, "bert": make_encoder(root / "bert")}


@pytest.fixture(params=PROMPTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(settings: dict[str, Any], folders: dict[str, str], kind: str, name: str) -> dict[str, Any]:
    own = {"base_model": folders[kind], "adapter": adapter(name), "learning_rate": 0.1, "epochs": 6}
    return {**settings, **own}


class Behind:
    """A plain model whose encoder reads embeddings that were put together by hand."""

    def __init__(self, folder: str, virtual: torch.Tensor) -> None:
        self.model, self.virtual = plain_pair(folder), virtual

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor) -> Any:
        return self.model(inputs_embeds=self.embedded(input_ids), decoder_input_ids=decoder_input_ids)

    def embedded(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.virtual[None], self.model.get_encoder().embed_tokens(input_ids)], dim=1)


@pytest.fixture
def frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows whose labels are equally long, so that a random model finds neither unlikely."""
    return frame.assign(label=frame["label"].replace({"vehicle": "wheel"}))


@pytest.fixture
def learned(pair: dict[str, Any], frame: pd.DataFrame) -> Any:
    return classifier(pair).fit(frame)


@pytest.mark.parametrize("batch_tokens", [1, 60, 10**6])
def test_labels_are_scored_as_by_transformers_alone(batch_tokens, learned, pair, kind, frame):
    rows = frame.assign(text=[text * (1 + i % 3) for i, text in enumerate(frame["text"])])  # of several lengths
    plain = Behind(pair["base_model"], weights(learned)["prompt_embeddings"])
    found = learned.set_params(batch_tokens=batch_tokens).predict_log_proba(rows)
    for i, text in enumerate(rows["text"]):
        pairs = pair_rows(pair["base_model"], [text] * 2, ["fruit", "wheel"])
        scores = np.array([-pair_losses(plain, p, ids[:-1], KINDS[kind][3]).sum() for p, ids in pairs])
        np.testing.assert_allclose(found[i], scores - np.logaddexp.reduce(scores), atol=1e-4)
    assert np.ptp(found[:, 0]) > 1e-3


def test_the_loss_of_the_first_step_is_that_of_transformers_alone(pair, kind, frame):
    model = classifier(pair, learning_rate=1e-30, epochs=1).fit(frame)
    plain = Behind(pair["base_model"], weights(model)["prompt_embeddings"])
    rows = pair_rows(pair["base_model"], frame["text"], frame["label"])
    losses = np.concatenate([pair_losses(plain, *row, KINDS[kind][3]) for row in rows])
    np.testing.assert_allclose(model.history_["loss"].iloc[0], losses.mean(), rtol=1e-5)


@ENDLESS
@pytest.mark.parametrize("given", [{}, {"num_beams": 3}], ids=str)
def test_answers_are_those_of_transformers_alone(given, pair, kind, frame):
    model = generator(pair, generation={"max_new_tokens": 6, **given}).fit(frame)
    plain = Behind(pair["base_model"], weights(model)["prompt_embeddings"])
    tokenizer, expected = plain_tokenizer(pair["base_model"]), []
    for text in frame["text"]:
        ids = tokenizer(f"{text} is a", return_tensors="pt")["input_ids"]
        out = plain.model.generate(
            inputs_embeds=plain.embedded(ids),
            attention_mask=torch.ones(1, N + ids.shape[1], dtype=torch.long),
            decoder_input_ids=torch.tensor([KINDS[kind][3]]),
            do_sample=False,
            forced_eos_token_id=None,
            max_new_tokens=6,
            **given,
        )
        expected.append(tokenizer.decode(out[0, len(KINDS[kind][3]) :], skip_special_tokens=True))
    for batch_tokens in (1, 10**6):
        assert model.set_params(batch_tokens=batch_tokens).predict(frame).tolist() == expected


def test_they_learn_and_nothing_else_does(pair, frame):
    learned = classifier(pair, epochs=30).fit(frame)
    losses = learned.history_["loss"]
    assert losses.iloc[-1] < 0.95 * losses.iloc[0]
    assert {name: tuple(tensor.shape) for name, tensor in weights(learned).items()} == {"prompt_embeddings": (N, 32)}
    base = load_base_model(pair["base_model"], device="cpu", dtype="float32").model.state_dict()
    plain = plain_pair(pair["base_model"]).state_dict()
    assert all(torch.equal(base[key], plain[key]) for key in plain)


def test_a_step_is_the_same_at_every_token_budget(pair, frame):
    fits = [classifier(pair, optimizer="sgd", epochs=2, batch_tokens=budget).fit(frame) for budget in (1, 10**6)]
    assert furthest(*fits) < 1e-6


def test_a_saved_fit_is_the_same_and_peft_reads_it(learned, pair, frame, tmp_path):
    learned.save(tmp_path / "saved")
    again = llmfit.load(tmp_path / "saved")
    assert np.array_equal(again.predict_proba(frame), learned.predict_proba(frame))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(plain_pair(pair["base_model"]), tmp_path / "saved/adapter").eval()
    base = load_base_model(pair["base_model"], device="cpu", dtype="float32")
    with torch.no_grad(), base.attach(learned._adapter, learned._tensors) as ours:
        torch.testing.assert_close(ours(**IDS).logits, loaded(**IDS).logits, rtol=0, atol=1e-5)


def test_a_fit_begins_from_a_folder_of_pefts(pair, kind, name, frame, tmp_path):
    """peft makes virtual tokens for the decoder as well, and puts none of them before it."""
    kinds = {"prompt_tuning": peft.PromptTuningConfig, "p_tuning": peft.PromptEncoderConfig}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = kinds[name](task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N)
        made = peft.get_peft_model(plain_pair(pair["base_model"]), config).eval()
        made.save_pretrained(tmp_path / "made")
    model = classifier(pair, adapter=str(tmp_path / "made"), learning_rate=1e-30, epochs=1).fit(frame)
    virtual = made.get_prompt_embedding_to_save("default")
    assert len(virtual) == 2 * N
    torch.testing.assert_close(weights(model)["prompt_embeddings"], virtual[:N])
    plain = Behind(pair["base_model"], virtual[:N])
    rows = pair_rows(pair["base_model"], frame["text"], frame["label"])
    losses = np.concatenate([pair_losses(plain, *row, KINDS[kind][3]) for row in rows])
    np.testing.assert_allclose(model.history_["loss"].iloc[0], losses.mean(), rtol=1e-5)


@ENDLESS
def test_several_targets_are_answered(pair, frame):
    assert_several_answered(pair, frame)


# Heads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["bert", "t5", "bart"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_head_pools_the_rows_own_vectors(base, pooling, name, settings, folders, frame, tmp_path):
    from transformers import AutoModel

    given = {**settings, "base_model": folders[base], "epochs": 30, "learning_rate": 0.1}
    clf = headed(given, adapter=adapter(name), head={"type": "linear", "pooling": pooling}).fit(frame)
    assert clf.history_["loss"].iloc[-1] < 0.7 * clf.history_["loss"].iloc[0]
    clf.save(tmp_path / "saved")
    assert np.array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), clf.predict_proba(frame))
    kept = weights(clf)
    plain, tokenizer = AutoModel.from_pretrained(folders[base]).eval(), plain_tokenizer(folders[base])
    encoder = plain if base == "bert" else plain.get_encoder()
    words = plain.get_input_embeddings() if base == "bert" else encoder.embed_tokens
    with torch.no_grad():
        for i, text in enumerate(frame["text"]):
            ids = tokenizer(f"{text} is a", return_tensors="pt")["input_ids"]
            hidden = encoder(inputs_embeds=torch.cat([kept["prompt_embeddings"][None], words(ids)], dim=1))
            own = hidden.last_hidden_state[0, N:]
            pooled = own.mean(0) if pooling == "mean" else own[0]
            logits = kept["head/weight"] @ pooled + kept["head/bias"]
            np.testing.assert_allclose(clf.predict_proba(frame)[i], logits.softmax(0).numpy(), atol=1e-4)


def test_a_fit_goes_on(pair, frame):
    model = classifier(pair, epochs=2, warm_start=True).fit(frame)
    first = model.history_["loss"].iloc[-1]
    assert model.fit(frame).history_["loss"].iloc[-1] < first
    assert same(*(classifier(pair, epochs=2).fit(frame) for _ in range(2)))


def test_their_room_is_taken_from_the_prompt(settings, tiny: str, tmp_path: Path, frame):
    folder = make_pair(tmp_path / "short", tiny, "bart", max_position_embeddings=48)
    clf = classifier(settings, base_model=folder, adapter=adapter("prompt_tuning"), truncation="prompt")
    long = frame.assign(text=frame["text"] + " and more" * 9)
    with pytest.warns(TruncationWarning):
        clf.fit(long)
    assert clf.max_length_ == 32  # rows are padded in steps of 16
    with pytest.warns(TruncationWarning):
        assert np.isfinite(clf.predict_proba(long)).all()


# Every method -----------------------------------------------------------------------------------------

REFUSED = {
    "adaption_prompt": "is for models of the families 'gpt2', 'llama', 'mistral'. Got a model of the family 't5' "
    "instead.",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_adapts_an_encoder_decoder_or_says_why_not(method, settings, folders, frame, tmp_path):
    clf = classifier(
        settings, base_model=folders["t5"], adapter=method, epochs=3, learning_rate=RATES.get(method, 1e-2)
    )
    if method in REFUSED:
        with pytest.raises(ParameterError) as raised:
            clf.fit(frame)
        assert str(raised.value) == f"The adapter {method!r} {REFUSED[method]}"
        return
    losses = clf.fit(frame).history_["loss"]
    assert losses.iloc[-1] < losses.iloc[0]
    clf.save(tmp_path / "saved")
    assert np.array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), clf.predict_proba(frame))
    try:
        clf.export(tmp_path / "merged")
    except ParameterError:
        assert not METHODS[method].mergeable or method == "bitfit"  # T5 has no biases
        return
    base = load_base_model(folders["t5"], device="cpu", dtype="float32")
    with torch.no_grad(), base.attach(clf._adapter, clf._tensors) as ours:
        expected = ours(**IDS).logits
    torch.testing.assert_close(plain_pair(str(tmp_path / "merged"))(**IDS).logits, expected, rtol=0, atol=1e-4)
