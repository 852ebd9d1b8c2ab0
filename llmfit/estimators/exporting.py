"""Fitted estimators for others to load: a plain folder of transformers, a PEFT folder, a repository on the hub.

Takes a fitted estimator; writes a folder as a whole, or pushes one. Loads the base model anew where an adapter is
merged into it, in full precision, so that nothing shared is changed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from sklearn.utils.validation import check_is_fitted

from llmfit.estimators.classifying import LOADER, as_classifier, check_classifier, installed
from llmfit.estimators.heading import LOADERS, check_reads, write_head
from llmfit.exceptions import LLMFitError, ParameterError, check_choice, parameter_error, reason
from llmfit.heads import split_tensors
from llmfit.persistence import write_folder

__all__ = ["EXPORT_MANIFEST", "Exported"]

EXPORT_MANIFEST = "llmfit_export.json"


class Exported:
    """What all estimators offer to others: `export` and `push_to_hub`."""

    def export(self, path: Any, *, merge: bool = True, dtype: str = "auto") -> None:
        """Write the fitted model for transformers, or its adapter for PEFT; llmfit is not needed to load either.

        A classifier with a linear head is merged into a model for ``AutoModelForSequenceClassification``, where that
        answers alike: on a decoder, with the last token's vector and ``head={"type": "linear", "bias": False}``. With
        ``merge=False`` every linear head can be written but one on a model that was trained in full.

        Parameters
        ----------
        path : str or path
            A folder that does not exist yet, is empty, or holds an earlier export, which is replaced as a whole.
        merge : bool, default=True
            True writes a plain model: configuration, weights with the adapter merged into them, tokenizer, chat
            template and generation settings. The adapter is merged in float32 into the base model as its files have
            it, also where it was trained beside a quantized one; one that began there with LoftQ into what that one's
            layers in few bits stand for. False writes the adapter as a PEFT folder, with the
            tokenizer; a linear head beside it, or alone where nothing else was trained, as head.safetensors and
            head.json, which says what the head reads and what its outputs mean.
        dtype : {"auto", "float32", "bfloat16", "float16", "float64"}, default="auto"
            In which the merged weights are written. "auto" is the dtype of the base model's files; fewer bits than 32
            round the merged weights once. Without `merge` there are none, and only "auto" may stand.

        Raises
        ------
        ParameterError
            If the adapter cannot be merged, or there is none to write by itself, or transformers has no model that
            answers as a linear head does.
        DataError
            If the folder holds something else.
        ModelLoadError
            If the base model is missing or another one than that of the fit.
        NotFittedError
            If there is nothing to export yet.

        Examples
        --------
        >>> import tempfile
        >>> from llmfit import LLMClassifier
        >>> from llmfit.datasets import load_book_reviews
        >>> clf = LLMClassifier(target="score", adapter=None, verbose=0).fit(load_book_reviews())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     clf.export(folder)
        """
        from llmfit.adapters.merging import check_mergeable
        from llmfit.base_model import DTYPES

        check_is_fitted(self)
        inner = vars(self).get("estimator_", self)
        check_choice("merge", "export", merge, [True, False])
        check_choice("dtype", "export", dtype, ["auto", *DTYPES])
        if not merge and dtype != "auto":
            raise ParameterError("The 'dtype' parameter of export is of merged weights, and merge=False writes none.")
        if merge:
            check_mergeable(inner._adapter)
            if inner._head is not None:
                check_classifier(inner)
        elif (inner._adapter is None and inner._head is None) or getattr(inner._adapter, "type", None) == "full":
            given = inner._adapter and inner._adapter.type
            advice = "Use merge=True." if inner._head is None else "Use save()."
            raise ParameterError(f"merge=False writes an adapter by itself, and adapter={given!r} has none. {advice}")
        adapter = inner._adapter
        content = {
            "class": type(inner).__name__,
            "base_model": inner.base_model_,
            "adapter": adapter and adapter.type,
            "merged": merge,
        }

        def fill(folder: Path) -> None:
            base = _write_merged(inner, folder, dtype) if merge else _write_adapter(inner, folder)
            base.tokenizer.save_pretrained(folder)
            loader = LOADER if merge and inner._head is not None else LOADERS[base.kind]
            _write_card(inner, folder, _form(inner, merge), loader)

        write_folder(path, content, fill, manifest=EXPORT_MANIFEST, what="exported model")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        content: str = "saved",
        private: bool | None = None,
        token: Any = None,
        commit_message: str | None = None,
    ) -> str:
        """Push the fitted model to a repository on the Hugging Face hub, which is made where it does not exist.

        Parameters
        ----------
        repo_id : str
            As ``owner/name``; a name alone is one of whom the token belongs to.
        content : {"saved", "merged", "adapter"}, default="saved"
            What is pushed: the folder that `save` writes, or that of `export` with merge=True or merge=False.
        private : bool or None, default=None
            Whether a new repository is private; None leaves it to the owner's settings.
        token : str or None, default=None
            Access token; None takes the one of ``hf auth login``.
        commit_message : str or None, default=None

        Returns
        -------
        str
            Address of the repository.

        Raises
        ------
        LLMFitError
            If the hub cannot be reached, or refuses.
        NotFittedError
            If there is nothing to push yet.
        """
        check_is_fitted(self)
        check_choice("content", "push_to_hub", content, ["saved", "merged", "adapter"])
        if not isinstance(repo_id, str) or not repo_id:
            raise parameter_error("repo_id", "push_to_hub", "a name like 'owner/name'", repo_id)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            if content == "saved":
                self.save(folder)  # type: ignore[attr-defined]
            else:
                self.export(folder, merge=content == "merged")
            message = commit_message or f"Upload {type(self).__name__} with llmfit"
            return _upload(folder, repo_id, private, token, message)


def _write_merged(estimator: Any, folder: Path, dtype: str) -> Any:
    """Write a plain model; the base model it came from is loaded for this alone."""
    from llmfit.adapters.merging import merge, unpack_into
    from llmfit.base_model import DTYPES, load_copy
    from llmfit.sources import quiet_loading

    base, stored = load_copy(estimator.base_model)
    estimator._check_fingerprint(base)
    own = split_tensors(estimator._tensors)[1]
    if estimator.quantization is not None and estimator._adapter is not None and estimator._adapter.holds_lost(own):
        unpack_into(base, estimator._fitted_base())
    settings = estimator._generation_config(base) if estimator._head is None else None
    with base.attach(installed(estimator), estimator._tensors or None) as adapted, quiet_loading():
        model = merge(adapted) if estimator._head is None else as_classifier(estimator, base, adapted)
        if settings is not None:
            model.generation_config = settings
        model.to(stored if dtype == "auto" else DTYPES[dtype]).save_pretrained(folder)
    if estimator._head is not None and base.tokenizer.pad_token_id is None:  # such a model looks for what fills a row
        base.tokenizer.pad_token = base.tokenizer.convert_ids_to_tokens(base.pad_id)
    return base


def _write_adapter(estimator: Any, folder: Path) -> Any:
    base = estimator._fitted_base()
    if estimator._adapter is not None:
        own = split_tensors(estimator._tensors)[1]
        estimator._adapter.save(folder, own, estimator.base_model_["name"], base.kind)
    if estimator._head is not None:
        check_reads(base)
        write_head(estimator, folder)
    return base


def _form(estimator: Any, merge: bool) -> str:
    """Say what is written, in the words of the card."""
    if merge:
        return "merged"
    parts = {"adapter": estimator._adapter, "head": estimator._head}
    return " and ".join(name for name, part in parts.items() if part is not None)


def _write_card(estimator: Any, folder: Path, form: str, loader: str) -> None:
    from llmfit.estimators.card import model_card

    (folder / "README.md").write_text(model_card(estimator, form, loader), encoding="utf-8")


def _upload(folder: Path, repo_id: str, private: bool | None, token: Any, message: str) -> str:
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # the hub's client raises errors of many libraries
        status = getattr(getattr(error, "response", None), "status_code", None)
        unknown = isinstance(error, huggingface_hub.errors.LocalTokenNotFoundError) or status in (401, 403)
        advice = " Log in with `hf auth login`, or pass a token that may write there." if unknown else ""
        raise LLMFitError(f"The model cannot be pushed to {repo_id!r}: {reason(error)}.{advice}") from error
    return str(address)
