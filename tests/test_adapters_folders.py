"""A fit begins from an adapter that peft alone has made: its settings, its weights, or one sentence."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from head_side import headed
from sklearn.base import clone
from torch_side import classifier, plain_model, same, token_losses, token_rows

import llmfit
from llmfit.adapters import METHODS, LoRA, resolve_adapter
from llmfit.exceptions import LLMFitError, ModelLoadError, ParameterError

OTHERS: dict[str, dict[str, Any]] = {"miss": {"r": 4}, "road": {"group_size": 16}}
NAMES = [name for name in METHODS if name != "full"]
CONFIGS: dict[str, Any] = {
    "regular expression": peft.LoraConfig(r=4, target_modules=r".*\.1\..*(q|down)_proj", exclude_modules=r".*down.*"),
    "patterns": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 9}
    ),
    "dora": peft.LoraConfig(r=4, use_dora=True, use_rslora=True, target_modules=["o_proj"]),
    "biases and more": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[70, 80]),
    "blocks": peft.LoraConfig(r=4, target_modules="all-linear", layers_to_transform=None),
    "oft by number": peft.OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]),
    "boft by number": peft.BOFTConfig(boft_block_num=8, boft_block_size=0, target_modules=["q_proj"]),
    "lstm": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
    ),
    "text": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init="RANDOM"),
    "projected": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True),
}


def config_of(name: str, folder: str) -> Any:
    """A configuration of peft's, its sizes fitted to the tiny model."""
    if name in CONFIGS:
        return CONFIGS[name]
    spec = resolve_adapter({"type": name, **OTHERS.get(name, {})})
    return spec.config("decoder", **spec.fitted(plain_model(folder)))


def make(name: str, tiny: str, folder: Path) -> tuple[Any, Path]:
    """Let peft alone make an adapter that has learned something, and write it; return its model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(plain_model(tiny), config_of(name, tiny)).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            for parameter_name, parameter in model.named_parameters():
                if parameter.requires_grad and "ranknum" not in parameter_name:
                    parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return model, folder


def loss_of(model: Any, tiny: str, frame: Any) -> float:
    """Mean loss of the answers' tokens, by peft's model alone."""
    losses = []
    with torch.no_grad():
        for prompt, answer in token_rows(tiny, frame["text"], frame["label"]):
            virtual = getattr(model.active_peft_config, "num_virtual_tokens", 0)
            if virtual:
                logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double()
                log_probs = logits[-len(prompt) - len(answer) :].log_softmax(-1)
                losses += [-float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
            else:
                losses += token_losses(model, prompt, answer).tolist()
    return float(np.mean(losses))


@pytest.mark.parametrize("name", [*NAMES, *OTHERS, *(name for name in CONFIGS if name not in METHODS)])
def test_the_first_step_is_that_of_pefts_model(name: str, settings: Any, frame: Any, tiny: str, tmp_path: Path) -> None:
    model, folder = make(name, tiny, tmp_path / "made")
    given = settings | {"adapter": str(folder), "learning_rate": 1e-30}
    clf = classifier(given).fit(frame)
    assert clf.history_["loss"].iloc[0] == pytest.approx(loss_of(model, tiny, frame), rel=1e-4)
    clf.save(tmp_path / "saved")
    again = llmfit.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict_proba(frame), clf.predict_proba(frame))


def test_a_fit_goes_on_from_a_folder(settings: Any, frame: Any, tiny: str, tmp_path: Path) -> None:
    """A fit cut in two by a folder of peft's is the same fit as warm_start makes of it."""
    first = classifier(settings, adapter={"r": 4}, schedule="constant", warmup=0)
    first.fit(frame).export(tmp_path / "adapter", merge=False)
    second = clone(first).set_params(adapter=tmp_path / "adapter").fit(frame)
    warm = first.set_params(warm_start=True).fit(frame)
    assert same(second, warm)
    assert len(second.history_) == 1
    assert second.trainable_parameters_ == warm.trainable_parameters_
    assert isinstance(second._adapter, LoRA)
    more = clone(second).set_params(adapter=str(tmp_path / "adapter"), warm_start=True).fit(frame).fit(frame)
    assert len(more.history_) == 2


def test_a_head_goes_onto_a_folder(settings: Any, frame: Any, tiny: str, tmp_path: Path) -> None:
    make("lora", tiny, tmp_path / "made")
    clf = headed(settings, adapter=str(tmp_path / "made"), epochs=3).fit(frame)
    assert clf.history_["loss"].iloc[0] == pytest.approx(np.log(2), rel=1e-6)
    clf.save(tmp_path / "saved")
    assert llmfit.load(tmp_path / "saved").predict(frame).equals(clf.predict(frame))


def test_a_checkpoint_belongs_to_the_weights_of_its_folder(
    settings: Any, frame: Any, tiny: str, tmp_path: Path
) -> None:
    class KilledError(Exception):
        pass

    def kill(state: Any) -> None:
        raise KilledError

    make("lora", tiny, tmp_path / "made")
    given = {"adapter": str(tmp_path / "made"), "epochs": 3, "checkpoint_dir": tmp_path / "states"}
    with pytest.raises(KilledError):
        classifier(settings, **given, callbacks=kill).fit(frame)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "made" / "adapter_model.safetensors")
    save_file({n: t + 0.01 for n, t in weights.items()}, tmp_path / "made" / "adapter_model.safetensors")
    other = classifier(settings, **given).fit(frame)
    assert same(other, classifier(settings, adapter=given["adapter"], epochs=3).fit(frame))


def test_a_folder_is_a_parameter_like_any_other(settings: Any, tiny: str, tmp_path: Path) -> None:
    make("lora", tiny, tmp_path / "made")
    clf = classifier(settings, adapter=str(tmp_path / "made"))
    assert clone(clf).get_params()["adapter"] == str(tmp_path / "made")
    assert clf.get_params()["adapter__type"] == str(tmp_path / "made")
    spec = resolve_adapter({"type": str(tmp_path / "made")})
    assert spec == resolve_adapter(tmp_path / "made")
    assert spec.r == 16
    assert spec.alpha == 32


# Sentences ------------------------------------------------------------------------------------------


def changed(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **settings}), encoding="utf-8")


CHANGES: dict[str, tuple[dict[str, Any], type[LLMFitError], str]] = {
    "unknown": (
        {"layer_replication": [[0, 2]]},
        ParameterError,
        "The adapter folder {!r} has the setting 'layer_replication', which LoRA has not.",
    ),
    "type": (
        {"peft_type": "NOVEL"},
        ParameterError,
        "The adapter folder {!r} is of the type 'NOVEL', which this version of peft does not have.",
    ),
    "start": (
        {"init_lora_weights": "pissa"},
        ParameterError,
        "The adapter folder {!r} began with init_lora_weights='pissa' and stands beside weights that this start has "
        "changed. Let peft convert it: save_pretrained(path_initial_model_for_weight_conversion=...).",
    ),
    "layers": (
        {"target_modules": ["q_proj", "query"]},
        ParameterError,
        "The 'target_modules' parameter of LoRA must name layers of this model that LoRA can adapt. "
        "Got ['q_proj', 'query'] instead.",
    ),
    "missing weights": (
        {"target_modules": ["q_proj", "k_proj"]},
        ModelLoadError,
        "The saved weights do not belong to this base model: "
        "'base_model.model.model.layers.0.self_attn.k_proj.lora_A.default.weight' is in one only.",
    ),
    "missing embeddings": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        ModelLoadError,
        "The saved weights do not belong to this base model: "
        "'base_model.model.model.embed_tokens.lora_embedding_A.default' is in one only.",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_no_spec_can_be_is_named(case: str, settings: Any, frame: Any, tiny: str, tmp_path: Path) -> None:
    changes, error, sentence = CHANGES[case]
    folder = tmp_path / "made"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(plain_model(tiny), peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
    changed(folder, **changes)
    with pytest.raises(error) as raised:
        classifier(settings, adapter=str(folder)).fit(frame)
    assert str(raised.value) == sentence.format(str(folder))


def test_folders_that_are_none_are_named(settings: Any, frame: Any, tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"^The adapter folder '.*nowhere' cannot be read: .*No such file"):
        classifier(settings, adapter=str(tmp_path / "nowhere")).fit(frame)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "adapter_config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ModelLoadError, match=r"^The adapter folder '.*odd' cannot be read: [^\n]+\.$"):
        classifier(settings, adapter=tmp_path / "odd").fit(frame)
    make("lora", tiny, tmp_path / "made")
    (tmp_path / "made" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"^The weights '.*adapter_model.safetensors' cannot be read"):
        classifier(settings, adapter=str(tmp_path / "made")).fit(frame)
    with pytest.raises(ParameterError) as error:
        classifier(settings, adapter={"type": str(tmp_path / "made"), "r": 4}).fit(frame)
    assert str(error.value) == (
        f"The adapter folder {str(tmp_path / 'made')!r} takes no settings beside its own. Got 'r' as well."
    )


def test_a_name_is_a_method_whatever_folder_is_there(
    settings: Any, frame: Any, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("ia3", tiny, tmp_path / "lora")
    make("ia3", tiny, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert resolve_adapter("lora") == LoRA()
    assert resolve_adapter("mine").type == "ia3"
