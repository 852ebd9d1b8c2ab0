"""Prefix tuning beside an encoder: under a head on BERT's kin, and before what a decoder says, against peft alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from head_side import byte_tokenizer, headed, make_encoder, make_encoder_decoder, write
from seq2seq_side import KINDS, assert_several_answered, make_pair, pair_losses, pair_rows, plain_pair
from torch_side import classifier, furthest, generator, plain_tokenizer, same, weights

import llmfit
from llmfit.base_model import load_base_model
from llmfit.exceptions import ModelLoadError, ParameterError
from llmfit.sources import quiet_loading

N = 5
PREFIX = {"type": "prefix_tuning", "num_virtual_tokens": N}
SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
# An even and an odd number of layers, another one in the encoder, keys that are together not as wide as the model.
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {}),
    "t5 of three layers": ("t5", {"num_layers": 3, "num_heads": 2, "d_kv": 12}),
    "bart": ("bart", {"decoder_attention_heads": 2, "encoder_layers": 3}),
}
ENDLESS = pytest.mark.filterwarnings("ignore:.*without an end:llmfit.exceptions.TruncationWarning")


def other_encoder(family: str, folder: Path, **changed: Any) -> str:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(family, **{**SMALL, **changed})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = AutoModel.from_config(config)
    return write(model, byte_tokenizer(True), folder)


def read_by_peft(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()


# Encoders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_peft_alone_pools_the_same_vectors(
    family: str, pooling: str, settings: Any, frame: Any, tmp_path: Path
) -> None:
    from transformers import AutoModel

    folder = make_encoder(tmp_path / "m") if family == "bert" else other_encoder(family, tmp_path / "m")
    given = settings | {"base_model": folder, "epochs": 30, "learning_rate": 0.1, "adapter": PREFIX}
    base = load_base_model(folder, device="cpu", dtype="float32")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    clf = headed(given, head={"type": "linear", "pooling": pooling}).fit(frame)
    losses, found = clf.history_["loss"], clf.predict_proba(frame)
    assert losses.iloc[-1] < 0.8 * losses.iloc[0]
    after = base.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    clf.save(tmp_path / "saved")
    assert np.array_equal(llmfit.load(tmp_path / "saved").predict_proba(frame), found)
    np.testing.assert_allclose(clf.set_params(batch_tokens=1).predict_proba(frame), found, atol=1e-5)
    with quiet_loading():
        plain = AutoModel.from_pretrained(folder, add_pooling_layer=False) if family != "electra" else None
        plain = plain or AutoModel.from_pretrained(folder)
    loaded, kept, tokenizer = read_by_peft(plain, tmp_path / "saved/adapter"), weights(clf), plain_tokenizer(folder)
    for i, text in enumerate(frame["text"]):
        ids = tokenizer(f"{text} is a", return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            hidden = loaded(**ids).last_hidden_state[0]
        pooled = hidden.mean(0) if pooling == "mean" else hidden[0]
        logits = kept["head/weight"] @ pooled + kept["head/bias"]
        np.testing.assert_allclose(found[i], logits.softmax(0).numpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["distilbert", "mpnet"])
def test_encoders_that_take_no_keys_say_so(family: str, settings: Any, frame: Any, tmp_path: Path) -> None:
    own = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4} if family == "distilbert" else {"pad_token_id": 1}
    folder = other_encoder(family, tmp_path / "m", **own)
    with pytest.raises(ParameterError) as error:
        headed(settings | {"base_model": folder}, adapter=PREFIX).fit(frame)
    assert str(error.value) == (
        "The adapter 'prefix_tuning' is for models whose layers take keys and values from before a row, which this "
        f"encoder of the family {family!r} does not. Choose another adapter, as 'p_tuning'."
    )


def test_no_head_on_an_encoder_decoder_reads_them(settings: Any, frame: Any, tmp_path: Path) -> None:
    for make in (make_encoder_decoder, lambda folder: make_pair(folder, settings["base_model"], "bart")):
        folder = make(tmp_path / f"m{len(list(tmp_path.iterdir()))}")
        with pytest.raises(ParameterError) as error:
            headed(settings | {"base_model": folder}, adapter=PREFIX).fit(frame)
        assert str(error.value) == (
            "The adapter 'prefix_tuning' stands before what the decoder beside an encoder says, and a linear head "
            "reads the encoder alone, whose layers take no keys and values from elsewhere. Choose another adapter, as "
            "'p_tuning', or set head='lm'."
        )


def test_a_prefix_on_an_encoder_begins_from_pefts_folder(settings: Any, frame: Any, tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = make_encoder(tmp_path / "m")
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=N)
        made = peft.get_peft_model(AutoModel.from_pretrained(folder), config)
        made.save_pretrained(tmp_path / "made")
    clf = headed(settings | {"base_model": folder}, adapter=str(tmp_path / "made"), learning_rate=1e-30).fit(frame)
    torch.testing.assert_close(weights(clf)["prompt_embeddings"], made.get_prompt_embedding_to_save("default"))


# Encoder-decoders -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pairs")
    return {name: make_pair(root / str(i), tiny, kind, **own) for i, (name, (kind, own)) in enumerate(PAIRS.items())}


@pytest.fixture(params=PAIRS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(settings: dict[str, Any], pairs: dict[str, str], kind: str) -> dict[str, Any]:
    return {**settings, "base_model": pairs[kind], "adapter": PREFIX, "learning_rate": 0.3, "epochs": 6}


def start_of(kind: str) -> tuple[int, ...]:
    return KINDS[PAIRS[kind][0]][3]


@pytest.fixture
def learned(pair: dict[str, Any], frame: Any) -> Any:
    return classifier(pair).fit(frame)


@pytest.fixture
def alone(learned: Any, pair: dict[str, Any], tmp_path: Path) -> Any:
    """The fitted adapter's folder, read by peft beside a model that transformers has loaded."""
    learned.save(tmp_path / "alone")
    return read_by_peft(plain_pair(pair["base_model"]), tmp_path / "alone/adapter")


@pytest.mark.parametrize("batch_tokens", [1, 60, 10**6])
def test_peft_alone_scores_labels_alike(
    batch_tokens: int, learned: Any, alone: Any, pair: Any, kind: str, frame: Any
) -> None:
    rows = frame.assign(text=[text * (1 + i % 3) for i, text in enumerate(frame["text"])])
    found = learned.set_params(batch_tokens=batch_tokens).predict_log_proba(rows)
    for i, text in enumerate(rows["text"]):
        both = pair_rows(pair["base_model"], [text] * 2, ["fruit", "vehicle"])
        scores = np.array([-pair_losses(alone, p, ids[:-1], start_of(kind)).sum() for p, ids in both])
        np.testing.assert_allclose(found[i], scores - np.logaddexp.reduce(scores), atol=1e-4)


def test_the_loss_is_that_of_peft_alone_and_falls(pair: Any, kind: str, frame: Any, tmp_path: Path) -> None:
    still = classifier(pair, learning_rate=1e-30, epochs=1).fit(frame)
    still.save(tmp_path / "m")
    alone = read_by_peft(plain_pair(pair["base_model"]), tmp_path / "m/adapter")
    rows = pair_rows(pair["base_model"], frame["text"], frame["label"])
    losses = np.concatenate([pair_losses(alone, *row, start_of(kind)) for row in rows])
    np.testing.assert_allclose(still.history_["loss"].iloc[0], losses.mean(), rtol=1e-5)
    base = load_base_model(pair["base_model"], device="cpu", dtype="float32").model.state_dict()
    more = classifier(pair, epochs=30).fit(frame).history_["loss"]
    assert more.iloc[-1] < 0.8 * more.iloc[0]
    plain = plain_pair(pair["base_model"]).state_dict()
    assert all(torch.equal(base[key], plain[key]) for key in plain)


def test_every_layer_of_the_decoder_learns_keys_of_its_own(learned: Any, pair: Any, frame: Any) -> None:
    began = weights(classifier(pair, learning_rate=1e-30, epochs=1).fit(frame))["prompt_embeddings"]
    moved = (weights(learned)["prompt_embeddings"] - began).abs().amax(dim=(0, 2, 3)) > 1e-6  # of each part
    layers = plain_pair(pair["base_model"]).get_decoder()
    number = len(layers.block if hasattr(layers, "block") else layers.layers)
    assert int(moved.sum()) == 2 * number
    assert len(moved) - int(moved.sum()) == 2 * (number % 2 == 0)


@ENDLESS
@pytest.mark.parametrize("given", [{}, {"num_beams": 3}], ids=str)
def test_peft_alone_generates_alike(given: Any, pair: Any, kind: str, frame: Any, tmp_path: Path) -> None:
    model = generator(pair, generation={"max_new_tokens": 6, **given}).fit(frame)
    model.save(tmp_path / "m")
    alone = read_by_peft(plain_pair(pair["base_model"]), tmp_path / "m/adapter")
    tokenizer, expected = plain_tokenizer(pair["base_model"]), []
    for text in frame["text"]:
        ids = tokenizer(f"{text} is a", return_tensors="pt", return_token_type_ids=False)
        begin = torch.tensor([start_of(kind)])
        out = alone.generate(
            **ids, decoder_input_ids=begin, do_sample=False, forced_eos_token_id=None, max_new_tokens=6, **given
        )
        expected.append(tokenizer.decode(out[0, begin.shape[1] :], skip_special_tokens=True))
    for batch_tokens in (1, 10**6):
        assert model.set_params(batch_tokens=batch_tokens).predict(frame).tolist() == expected


def test_a_fit_is_saved_goes_on_and_hangs_on_no_budget(learned: Any, pair: Any, frame: Any, tmp_path: Path) -> None:
    for name in ("once", "twice"):
        learned.save(tmp_path / name)
        again = llmfit.load(tmp_path / name)
        assert np.array_equal(again.predict_proba(frame), learned.predict_proba(frame))
        assert same(again, learned)
        learned = again
    fits = [classifier(pair, optimizer="sgd", epochs=2, batch_tokens=budget).fit(frame) for budget in (1, 10**6)]
    assert furthest(*fits) < 1e-5
    before = learned.history_["loss"].iloc[-1]
    assert learned.set_params(warm_start=True).fit(frame).history_["loss"].iloc[-1] < before
    learned.export(tmp_path / "folder", merge=False)
    config = json.loads((tmp_path / "folder/adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_2_SEQ_LM"


@ENDLESS
def test_several_targets_are_answered(pair: Any, frame: Any) -> None:
    assert_several_answered(pair, frame)


def test_a_folder_that_peft_made_by_itself_says_what_it_says_there(
    settings: Any, pairs: Any, frame: Any, tmp_path: Path
) -> None:
    """peft shares keys between layers then: they are read as they are, and trained on so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N)
        made = peft.get_peft_model(plain_pair(pairs["t5"]), config).eval()
        made.save_pretrained(tmp_path / "made")
    given = settings | {"base_model": pairs["t5"], "adapter": str(tmp_path / "made")}
    model = classifier(given, learning_rate=1e-30).fit(frame)
    losses = np.concatenate([pair_losses(made, *row, (0,)) for row in pair_rows(pairs["t5"], *rows_of(frame))])
    np.testing.assert_allclose(model.history_["loss"].iloc[0], losses.mean(), rtol=1e-5)
    with pytest.raises(ModelLoadError) as error:
        classifier(given | {"base_model": pairs["t5 of three layers"]}).fit(frame)
    assert str(error.value) == (
        "The saved weights do not belong to this base model: its decoder has keys of another size."
    )


def rows_of(frame: Any) -> tuple[Any, Any]:
    return frame["text"], frame["label"]
