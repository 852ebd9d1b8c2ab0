"""Exports: transformers and peft alone load them and say the same; a hub gets the folder that was written."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from sklearn.exceptions import NotFittedError
from torch_side import classifier, generator, make_other, plain_model, plain_tokenizer, weights, with_tokenizer

import llmfit
from llmfit import LLMEstimator, LoRA
from llmfit.adapters import METHODS
from llmfit.base_model import load_base_model
from llmfit.estimators.exporting import EXPORT_MANIFEST
from llmfit.exceptions import DataError, LLMFitError, ModelLoadError, ParameterError

IDS = torch.tensor([[1, 70, 80, 90, 100, 41, 42, 43]])
ADAPTERS: dict[str, Any] = {
    "lora": {"r": 4},
    "rslora": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"r": 4, "use_dora": True},
    "bias": {"r": 2, "bias": "all"},
    "head": {"r": 2, "target_modules": ["lm_head"]},
    "embedding": {"r": 2, "target_modules": ["embed_tokens"]},
    "full": "full",
    "none": None,
}


@pytest.fixture(scope="module")
def bases(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {name: make_other(tmp_path_factory.mktemp(name) / name, tiny, name) for name in ("qwen2", "gpt2")}
    tied = make_other(tmp_path_factory.mktemp("tied") / "tied", tiny, "llama", tie_word_embeddings=True)
    return {"llama": tiny, "tied": tied, **made}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose layers are whole blocks of 4-bit weights."""
    return make_model(tmp_path_factory.mktemp("wide"), hidden=64)


@torch.no_grad()
def adapted_logits(clf: Any) -> torch.Tensor:
    """Logits of the fitted model, as it predicts."""
    base = load_base_model(clf.base_model, device="cpu", dtype="float32")
    with base.attach(clf._adapter, weights(clf) or None) as model:
        return model(input_ids=IDS).logits


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) < 1e-4


@pytest.fixture
def fitted(settings: dict[str, Any], frame: Any) -> Any:
    return classifier(settings, adapter={"r": 2}).fit(frame)


# Merged ---------------------------------------------------------------------------------------------

CASES = [
    *(("llama", name) for name in ADAPTERS),
    *(("tied", name) for name in ("lora", "head", "embedding", "full")),
    *((base, name) for base in ("qwen2", "gpt2") for name in ("lora", "dora", "bias", "full")),
]


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_transformers_alone_loads_a_model_that_says_the_same(name, adapter, bases, settings, frame, tmp_path):
    base = load_base_model(bases[name], device="cpu", dtype="float32")
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    own = {**settings, "base_model": bases[name], "learning_rate": 3e-2, "epochs": 3}
    clf = classifier(own, adapter=ADAPTERS[adapter]).fit(frame)
    clf.export(tmp_path / "out")
    plain = plain_model(str(tmp_path / "out"))
    assert close(logits_of(plain), adapted_logits(clf))
    moved = float((logits_of(plain) - logits_of(plain_model(bases[name]))).abs().max())
    assert moved == 0 if adapter == "none" else moved > 0.05
    assert type(plain) is type(base.model)
    assert not [n for n in plain.state_dict() if "lora" in n]
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    source, changes_one = base.model.config, adapter in ("head", "embedding")
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert tied == plain.config.tie_word_embeddings == (source.tie_word_embeddings and not changes_one)
    assert all(torch.equal(p, before[n]) for n, p in base.model.named_parameters())
    assert load_base_model(bases[name], device="cpu", dtype="float32") is base


def test_low_rank_weights_are_merged_as_the_paper_says(settings, frame, tmp_path, tiny):
    clf = classifier(settings, adapter={"r": 3, "alpha": 5, "target_modules": ["q_proj"]}, epochs=3).fit(frame)
    clf.export(tmp_path / "out")
    merged, source = load_file(tmp_path / "out" / "model.safetensors"), plain_model(tiny).state_dict()
    assert merged.keys() == source.keys()
    for name, weight in source.items():
        own = weights(clf)
        a, b = (own.get(f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight") for x in "AB")
        update = 0 if a is None else 5 / 3 * b.double() @ a.double()
        np.testing.assert_allclose(merged[name].double(), weight.double() + update, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_trained_beside_few_bits_is_merged_into_the_whole_model(bits, wide, settings, frame, tmp_path):
    own = {**settings, "base_model": wide, "quantization": bits, "learning_rate": 3e-2}
    clf = classifier(own, adapter={"r": 4}).fit(frame)
    clf.export(tmp_path / "merged")
    clf.export(tmp_path / "adapter", merge=False)
    with_adapter = peft.PeftModel.from_pretrained(plain_model(wide), str(tmp_path / "adapter"))
    merged = plain_model(str(tmp_path / "merged"))
    assert close(logits_of(merged), logits_of(with_adapter))
    assert not hasattr(merged.config, "quantization_config")
    whole = clf.set_params(quantization=None)
    assert close(logits_of(merged), adapted_logits(whole))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float64"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_weights_are_rounded_once_to_the_dtype_asked_for(dtype, stored, settings, frame, tmp_path, tiny):
    folder = with_tokenizer(tiny, tmp_path / "base")
    plain_model(tiny).to(getattr(torch, stored)).save_pretrained(folder)
    clf = classifier({**settings, "base_model": folder}, adapter={"r": 4, "target_modules": ["q_proj"]}).fit(frame)
    clf.export(tmp_path / "out", dtype=dtype)
    merged, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(Path(folder) / "model.safetensors")
    expected = getattr(torch, stored if dtype == "auto" else dtype)
    assert {t.dtype for t in merged.values()} == {expected}
    name, own = "model.layers.0.self_attn.q_proj", weights(clf)
    a, b = (own[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    exact = source[f"{name}.weight"].float() + 2 * b @ a
    assert float((merged[f"{name}.weight"].float() - exact.to(expected).float()).abs().max()) < (
        1e-6 if expected != torch.bfloat16 else 4e-3
    )


def test_an_estimator_that_was_loaded_is_exported_alike(fitted, tmp_path):
    fitted.save(tmp_path / "saved")
    fitted.export(tmp_path / "one")
    llmfit.load(tmp_path / "saved").export(tmp_path / "other")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_chooser_exports_what_it_chose(settings, frame, tmp_path):
    model = LLMEstimator(target="label", features="text", adapter={"r": 2}, **settings).fit(frame)
    model.export(tmp_path / "out")
    assert close(logits_of(plain_model(str(tmp_path / "out"))), adapted_logits(model.estimator_))


def test_the_folder_holds_what_others_expect(settings, frame, tmp_path, tiny_chat):
    clf = classifier({**settings, "base_model": tiny_chat}, adapter={"r": 2}).fit(frame)
    clf.export(tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md", EXPORT_MANIFEST),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    exported, source = plain_tokenizer(str(tmp_path / "out")), plain_tokenizer(tiny_chat)
    messages = [{"role": "user", "content": "a <s> b"}]
    assert exported.apply_chat_template(messages) == source.apply_chat_template(messages)
    written = json.loads((tmp_path / "out" / EXPORT_MANIFEST).read_text())
    assert (written["class"], written["adapter"], written["merged"]) == ("LLMClassifier", "lora", True)
    assert written["base_model"]["fingerprint"] == clf.base_model_["fingerprint"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "{text} is a" in card
    assert tiny_chat not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("chat", [False, True])
def test_generate_of_transformers_answers_as_predict_does(chat, settings, frame, tmp_path, tiny, tiny_chat):
    own = {**settings, "base_model": tiny_chat if chat else tiny, "epochs": 60}
    gen = generator(own, generation={"max_new_tokens": 9, "repetition_penalty": 1.01}).fit(frame)
    gen.export(tmp_path / "out")
    model, tokenizer = plain_model(str(tmp_path / "out")), plain_tokenizer(str(tmp_path / "out"))
    assert model.generation_config.max_new_tokens == 9
    answers = []
    for prompt in gen.preview(frame, len(frame))["prompt"]:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids))
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert answers == [text.strip() for text in gen.predict(frame)]
    assert len(set(answers)) > 1
    assert gen.score(frame) >= 0.75


# Not merged -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # of peft, which sets it right
@pytest.mark.parametrize(
    ("name", "adapter"), [("llama", "lora"), ("llama", "dora"), ("llama", "bias"), ("qwen2", "lora"), ("gpt2", "lora")]
)
def test_peft_alone_loads_an_adapter_that_says_the_same(name, adapter, bases, settings, frame, tmp_path):
    own = {**settings, "base_model": bases[name], "learning_rate": 3e-2}
    clf = classifier(own, adapter=ADAPTERS[adapter]).fit(frame)
    clf.export(tmp_path / "out", merge=False)
    model = peft.PeftModel.from_pretrained(plain_model(bases[name]), str(tmp_path / "out"))
    assert close(logits_of(model), adapted_logits(clf))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert (
        plain_tokenizer(str(tmp_path / "out"))("red")["input_ids"] == plain_tokenizer(bases[name])("red")["input_ids"]
    )
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("adapter", ["full", None])
def test_there_is_not_always_an_adapter(adapter, settings, frame, tmp_path):
    clf = classifier(settings, adapter=adapter).fit(frame)
    with pytest.raises(ParameterError) as error:
        clf.export(tmp_path / "out", merge=False)
    assert str(error.value) == (
        f"merge=False writes an adapter by itself, and adapter={adapter!r} has none. Use merge=True."
    )
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_changes_no_weight_is_not_merged(settings, frame, tmp_path, monkeypatch):
    class Odd(LoRA):
        type = "odd"
        mergeable = False

    monkeypatch.setitem(METHODS, "odd", Odd)
    clf = classifier(settings, adapter={"type": "odd", "r": 2}).fit(frame)
    with pytest.raises(ParameterError) as error:
        clf.export(tmp_path / "out")
    assert str(error.value) == (
        "The adapter 'odd' cannot be merged: what it has learned is no change of the base model's weights. "
        "Use merge=False, which writes a PEFT folder."
    )
    clf.export(tmp_path / "out", merge=False)


# Folders and misuse ---------------------------------------------------------------------------------


def test_an_earlier_export_is_replaced_as_a_whole(fitted, tmp_path):
    fitted.export(tmp_path / "out", merge=False)
    (tmp_path / "out" / "more.txt").write_text("more")
    fitted.export(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in names
    assert not names & {"adapter_config.json", "more.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_leaves_the_earlier_one(fitted, tmp_path, monkeypatch):
    fitted.export(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("llmfit.estimators.exporting._write_card", fail)
    with pytest.raises(ZeroDivisionError):
        fitted.export(tmp_path / "out", merge=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_export_is_not_replaced(fitted, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    fitted.save(tmp_path / "saved")
    for folder in ("full", "saved"):
        with pytest.raises(DataError) as error:
            fitted.export(tmp_path / folder)
        assert str(error.value) == (
            f"{str(tmp_path / folder)!r} exists and is no exported model: nothing was written. Choose another."
        )
    fitted.export(tmp_path / "out")
    with pytest.raises(DataError, match="exists and is no saved llmfit model"):
        fitted.save(tmp_path / "out")
    with pytest.raises(ModelLoadError, match=r"is no saved llmfit model: it has no llmfit\.json\."):
        llmfit.load(tmp_path / "out")


def test_misuse_is_one_sentence(fitted, settings, tmp_path, frame, tiny_chat):
    with pytest.raises(NotFittedError):
        classifier(settings).export(tmp_path / "out")
    with pytest.raises(ParameterError) as error:
        fitted.export(tmp_path / "out", merge="yes")
    assert str(error.value) == "The 'merge' parameter of export must be one of True, False. Got 'yes' instead."
    with pytest.raises(ParameterError) as error:
        fitted.export(tmp_path / "out", dtype="int8")
    assert str(error.value) == (
        "The 'dtype' parameter of export must be one of 'auto', 'float32', 'bfloat16', 'float16', 'float64'. "
        "Got 'int8' instead."
    )
    with pytest.raises(ModelLoadError, match="is not the one that was fitted"):
        fitted.set_params(base_model=tiny_chat).export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_generators_of_the_process_are_not_touched(fitted, tmp_path):
    before = torch.get_rng_state()
    fitted.export(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)


# The hub --------------------------------------------------------------------------------------------


class Hub(HTTPServer):
    """Enough of the hub's interface to make a repository and take a commit of it; files travel in the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, Any]] = []
        self.refusal: int | None = None


class HubRequest(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.server.refusal is not None:
            self.answer(self.server.refusal, {"error": "no"})
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'whoever'}/{wanted['name']}"
            self.server.repos[name] = {".private": str(wanted.get("visibility")).encode()}
            self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            named = re.search(r"^base_model: (.*)$", json.loads(body)["content"], re.MULTILINE)
            wrong = named is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", named[1])
            errors = [{"message": f"base_model {named[1]!r} is not valid"}] if wrong else []
            self.answer(400 if wrong else 200, {"errors": errors, "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer(200, {"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        else:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            if name not in self.server.repos:  # as the hub knows no repository without an owner
                self.answer(404, {"error": "Repository not found"})
                return
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                else:
                    self.server.repos[name][".message"] = line["value"]["summary"].encode()
            where = f"http://{self.headers['Host']}/{name}/commit/{'0' * 40}"
            self.answer(200, {"commitUrl": where, "commitOid": "0" * 40, "pullRequestUrl": None})

    def answer(self, status: int, content: Any) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        """Keep silent."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, in place of the real one."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_name_alone_is_ones_own(fitted, hub):
    address = fitted.push_to_hub("model", content="adapter", token="hf_secret")
    assert address.endswith("/whoever/model")
    assert "adapter_config.json" in hub.repos["whoever/model"]


@pytest.mark.parametrize("content", ["saved", "merged", "adapter"])
def test_a_hub_gets_the_folder(content, fitted, frame, hub, tmp_path, tiny):
    address = fitted.push_to_hub("me/model", content=content, token="hf_secret", private=True)
    assert address.endswith("/me/model")
    assert {authorization for _, authorization in hub.asked} == {"Bearer hf_secret"}
    files = hub.repos["me/model"]
    assert files.pop(".private") == b"private"
    assert files.pop(".message") == b"Upload LLMClassifier with llmfit"
    for name, data in files.items():
        path = tmp_path / "got" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    got = str(tmp_path / "got")
    if content == "saved":
        np.testing.assert_array_equal(llmfit.load(got).predict_proba(frame), fitted.predict_proba(frame))
        return
    model = plain_model(got) if content == "merged" else peft.PeftModel.from_pretrained(plain_model(tiny), got)
    assert close(logits_of(model), adapted_logits(fitted))


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_does_not_know_the_token_is_named(status, fitted, hub):
    hub.refusal = status
    with pytest.raises(LLMFitError) as error:
        fitted.push_to_hub("me/model", token="hf_wrong")
    assert re.fullmatch(
        rf"The model cannot be pushed to 'me/model': .*{status}.*\. Log in with `hf auth login`, or pass a token that "
        r"may write there\.",
        str(error.value),
    )
    assert "hf_wrong" not in str(error.value)


def test_without_a_token_a_hub_is_not_asked(fitted, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    hub.refusal = 401
    with pytest.raises(LLMFitError, match=r"^The model cannot be pushed to 'me/model': .* Log in with"):
        fitted.push_to_hub("me/model")
    assert not hub.repos


def test_without_a_network_it_is_one_sentence(fitted, tmp_path, monkeypatch):
    with pytest.raises(LLMFitError) as error:
        fitted.push_to_hub("me/model", token="hf_secret")
    assert str(error.value).startswith("The model cannot be pushed to 'me/model': Cannot reach https://huggingface.co/")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LLMFitError, match=r"^The model cannot be pushed to 'me/model': .*refused.*\.$"):
        fitted.push_to_hub("me/model", token="hf_secret")


def test_what_cannot_be_pushed_is_refused(fitted, settings):
    with pytest.raises(NotFittedError):
        classifier(settings).push_to_hub("me/model")
    with pytest.raises(ParameterError) as error:
        fitted.push_to_hub("me/model", content="merge")
    assert str(error.value) == (
        "The 'content' parameter of push_to_hub must be one of 'saved', 'merged', 'adapter'. Got 'merge' instead. "
        "Did you mean 'merged'?"
    )
    with pytest.raises(ParameterError) as error:
        fitted.push_to_hub(None)
    assert str(error.value) == (
        "The 'repo_id' parameter of push_to_hub must be a name like 'owner/name'. Got None instead."
    )
