"""From a name to a folder: what a model is known by, GGUF files converted once, aliases that import nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_side import classifier, plain_model, plain_tokenizer

from llmfit import sources
from llmfit.exceptions import ModelLoadError, ParameterError
from llmfit.sources import Alias, cache_folder, find_source

# Fingerprints ---------------------------------------------------------------------------------------


def flip_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def edit_json(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def size_of(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


CHANGES: dict[str, Any] = {
    "first weight": lambda f: flip_byte(f / "model.safetensors", 5000),
    "a weight in the middle": lambda f: flip_byte(f / "model.safetensors", size_of(f) // 2),
    "last weight": lambda f: flip_byte(f / "model.safetensors", size_of(f) - 2),
    "one file more": lambda f: shutil.copy(f / "model.safetensors", f / "more.safetensors"),
    "configuration": lambda f: edit_json(f / "config.json", rms_norm_eps=1e-3),
    "vocabulary": lambda f: flip_byte(f / "tokenizer.json", (f / "tokenizer.json").stat().st_size // 2),
    "end token": lambda f: edit_json(f / "tokenizer_config.json", eos_token="<pad>"),
    "chat template": lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_model_changes_the_fingerprint(change, tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    before = find_source(folder).fingerprint
    change(folder)
    assert find_source(folder).fingerprint != before


UNCHANGED: dict[str, Any] = {
    "copied": lambda _: None,
    "saved by another version": lambda f: edit_json(f / "config.json", transformers_version="9.9", dtype="bfloat16"),
    "keys in another order": lambda f: (f / "config.json").write_text(
        json.dumps(dict(reversed(json.loads((f / "config.json").read_text()).items())), indent=7)
    ),
    "a readme": lambda f: (f / "README.md").write_text("words"),
    "generation settings": lambda f: edit_json(f / "generation_config.json", temperature=0.5),
}


@pytest.mark.parametrize("change", UNCHANGED.values(), ids=UNCHANGED)
def test_the_same_model_has_the_same_fingerprint_wherever_it_lies(change, tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    change(folder)
    copy, original = find_source(folder), find_source(tiny)
    assert copy.fingerprint == original.fingerprint
    assert re.fullmatch("[0-9a-f]{32}", copy.fingerprint)
    assert copy.folder != original.folder


def test_one_byte_anywhere_is_another_file(tmp_path):
    path, size = tmp_path / "weights", 4 << 20
    path.write_bytes(bytes(size))
    before = sources._digest_file(path)
    for at in [*range(0, size, size // 37), size - 1]:
        flip_byte(path, at)
        assert sources._digest_file(path) != before
        flip_byte(path, at)
    assert sources._digest_file(path) == before


def test_a_norm_of_another_model_is_another_model(tiny, tmp_path):
    """What is shorter than the steps of a sample, in a folder whose vectors may have been kept."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert find_source(folder).fingerprint != find_source(tiny).fingerprint


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(bytes(1000))
    now = time.time_ns
    monkeypatch.setattr(sources.time, "time_ns", lambda: now() + int(1e10))  # ten seconds later, all is settled
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(sources.hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name))
    first = sources._digest_file(path)
    assert sources._digest_file(path) == first
    assert len(read) == 1
    flip_byte(path, 500)
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
    assert sources._digest_file(path) != first
    assert len(read) == 2


def test_what_changes_behind_an_old_date_is_seen(tmp_path, monkeypatch):
    """A copy that keeps the date of its original, over a file of the same length."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(1000))
    other.write_bytes(bytes(999) + b"1")
    then = one.stat().st_mtime_ns
    now = time.time_ns
    monkeypatch.setattr(sources.time, "time_ns", lambda: now() + int(1e10))
    first = sources._digest_file(one)
    one.write_bytes(other.read_bytes())
    os.utime(one, ns=(then, then))
    assert sources._digest_file(one) != first


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large, and as settled for long."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(1000))
    now = time.time_ns
    monkeypatch.setattr(sources.time, "time_ns", lambda: now() + int(1e10))
    monkeypatch.setattr(sources, "LARGE", 1000)
    return path


def test_a_large_file_is_read_once_for_all_processes(large, monkeypatch):
    first = sources._digest_file(large)
    sources.forget_sources()
    with monkeypatch.context() as patch:
        patch.setattr(sources.hashlib, "file_digest", None)
        assert sources._digest_file(large) == first
    (kept,) = (cache_folder() / "digests").iterdir()
    kept.write_text("damaged")
    sources.forget_sources()
    assert sources._digest_file(large) == first


def test_a_path_an_object_of_a_path_and_the_home_are_one_name(tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(tiny).parent))
    expected = str(Path(tiny).resolve())
    monkeypatch.chdir(tiny)
    for name in (tiny, Path(tiny), f"~/{Path(tiny).name}", "."):
        assert find_source(name).folder == expected
        assert find_source(name).name == str(name)


@pytest.mark.parametrize("value", [None, "", 3, ["smollm2"], b"smollm2"])
def test_what_is_no_name_is_refused(value):
    with pytest.raises(ParameterError) as error:
        find_source(value)
    assert str(error.value) == (
        f"The 'base_model' parameter of the estimator must be a hub id, a path or an alias. Got {value!r} instead."
    )


# GGUF -----------------------------------------------------------------------------------------------


def write_gguf(folder: str, path: Path) -> Path:
    """Write the tiny Llama as GGUF, the way llama.cpp does."""
    import gguf

    model, tokenizer = plain_model(folder), plain_tokenizer(folder)
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    tokens[260] = tokens[258] + tokens[259]  # a file has at least one merge; no text here needs this byte
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 5 else 1 for i in range(len(tokens))])
    writer.add_token_merges([f"{tokens[258]} {tokens[259]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        values = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp pairs the halves of a head's rotary dimensions
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    return write_gguf(tiny, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    done: list[Path] = []
    convert = sources._convert_gguf
    monkeypatch.setattr(sources, "_convert_gguf", lambda path, target: (done.append(path), convert(path, target)))
    return done


def test_a_gguf_file_is_converted_once_into_the_cache(gguf_file, cache, conversions, tiny, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    source = find_source(gguf_file)
    assert torch.equal(torch.get_rng_state(), before)
    assert find_source(str(gguf_file)).folder == source.folder
    assert [entry.name for entry in cache.iterdir()] == [Path(source.folder).name]
    copied = find_source(shutil.copy(gguf_file, tmp_path / "tiny.gguf"))
    assert (copied.folder, copied.fingerprint) == (source.folder, source.fingerprint)
    assert len(conversions) == 1
    expected, converted = plain_model(tiny).state_dict(), plain_model(source.folder).state_dict()
    assert expected.keys() == converted.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(converted[name], tensor, rtol=0, atol=0)


def test_an_estimator_takes_a_gguf_file(gguf_file, settings, frame, tiny):
    fitted = classifier(settings, base_model=gguf_file).fit(frame)
    other = classifier(settings).fit(frame)
    np.testing.assert_allclose(fitted.predict_proba(frame), other.predict_proba(frame), atol=1e-5)


def test_another_version_of_a_gguf_file_is_converted_anew(gguf_file, cache, conversions, tmp_path):
    path = Path(shutil.copy(gguf_file, tmp_path / "tiny.gguf"))
    first = find_source(path)
    flip_byte(path, path.stat().st_size - 2)
    second = find_source(path)
    assert second.fingerprint != first.fingerprint
    assert second.folder != first.folder
    assert len(conversions) == 2


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 50, b"no model at all" * 9])
def test_a_damaged_gguf_file_is_one_sentence_and_leaves_nothing(content, cache, tmp_path):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError) as error:
        find_source(path)
    assert re.fullmatch(f"The GGUF file {re.escape(repr(str(path)))} cannot be read: [^\n]*\\.", str(error.value))
    assert list(cache.iterdir()) == []


def test_a_gguf_file_cut_short_leaves_nothing(gguf_file, cache, tmp_path):
    path = tmp_path / "short.gguf"
    path.write_bytes(gguf_file.read_bytes()[:-3000])
    with pytest.raises(ModelLoadError, match="cannot be read"):
        find_source(path)
    assert list(cache.iterdir()) == []


def test_without_gguf_the_package_is_named(gguf_file, cache, monkeypatch):
    find = sources.importlib.util.find_spec
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ParameterError) as error:
        find_source(gguf_file)
    assert str(error.value) == "A .gguf base model needs gguf. Install it with: pip install 'llmfit[gguf]'."


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LLMFIT_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"LLMFIT_CACHE": "", "XDG_CACHE_HOME": "/c"}, "/c/llmfit"),
        ({"LLMFIT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/llmfit"),
    ],
)
def test_where_converted_models_lie(variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


# Aliases and the hub --------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that cannot be imported, behind the alias "alias"."""
    folder = tmp_path / "site" / "llm_untouchable"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setitem(sources.ALIASES, "alias", Alias("llm_untouchable", "org/hub-model"))
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tiny: str) -> Iterator[list[dict[str, Any]]]:
    """What the hub was asked for; it has every model."""
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        return tiny

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    sources.forget_sources()
    yield calls
    sources.forget_sources()


def test_an_alias_is_found_in_its_package_without_importing_it(package, gguf_file, asked, cache):
    shutil.copy(gguf_file, package / "data" / "weights.gguf")
    source = find_source("alias")
    assert source.name == "alias"
    assert Path(source.folder).name.startswith("weights-")
    assert "llm_untouchable" not in sys.modules
    assert asked == []


def test_an_alias_whose_package_is_missing_or_empty_is_a_hub_model(package, asked, monkeypatch):
    find_source("alias")
    monkeypatch.setitem(sources.ALIASES, "alias", Alias("llm_not_installed", "org/hub-model"))
    find_source("alias")
    assert [call["repo"] for call in asked] == ["org/hub-model"]  # found once in a process
    sources.forget_sources()
    find_source("alias")
    assert [call["repo"] for call in asked] == ["org/hub-model"] * 2


@pytest.mark.parametrize(
    ("name", "repo", "revision"), [("org/model", "org/model", None), ("org/model@v1.0", "org/model", "v1.0")]
)
def test_a_hub_id_may_name_a_revision(name, repo, revision, asked, tiny):
    source = find_source(name)
    assert (asked[0]["repo"], asked[0]["revision"]) == (repo, revision)
    assert "*.py" in asked[0]["ignore_patterns"]
    assert (source.name, source.fingerprint) == (name, find_source(tiny).fingerprint)


def test_a_folder_goes_before_an_alias(package, asked, tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "here" / "alias")
    monkeypatch.chdir(tmp_path / "here")
    assert find_source("alias").folder == str((tmp_path / "here" / "alias").resolve())
    assert asked == []


def test_a_date_to_come_does_not_make_a_file_read_each_time(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(bytes(1000))
    ahead = time.time_ns() + 10**15
    os.utime(path, ns=(ahead, ahead))
    now = time.time_ns
    monkeypatch.setattr(sources.time, "time_ns", lambda: now() + int(1e10))
    first = sources._digest_file(path)
    monkeypatch.setattr(sources.hashlib, "file_digest", None)
    assert sources._digest_file(path) == first


def test_without_a_home_a_large_file_is_read(large, monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(sources, "cache_folder", homeless)
    assert sources._digest_file(large) == hashlib.sha256(bytes(1000)).hexdigest()[:32]


def test_the_words_of_sentencepiece_belong_to_a_model(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "one")
    (tmp_path / "one" / "spiece.model").write_bytes(b"some words")
    before = sources._fingerprint(tmp_path / "one")
    (tmp_path / "one" / "spiece.model").write_bytes(b"other words")
    assert sources._fingerprint(tmp_path / "one") != before
