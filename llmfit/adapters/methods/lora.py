"""Low-rank adaptation, in all of its variants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from llmfit.adapters import start_settings as starts
from llmfit.adapters.peft_spec import WRAPPED, LayerSpec
from llmfit.adapters.places import matching
from llmfit.adapters.rules import RULES
from llmfit.adapters.spec import Plan, Tensors
from llmfit.exceptions import check_choice, parameter_error
from llmfit.kinds import find_own

if TYPE_CHECKING:
    from llmfit.base_model import BaseModel
    from llmfit.selfcheck import Said

__all__ = ["METHODS", "DoRA", "LoRA"]


@dataclass(frozen=True, kw_only=True, repr=False)
class LoRA(LayerSpec):
    """Low-rank adaptation: a frozen weight W plus a trained product B A of rank r.

    Parameters
    ----------
    r : int, default=16
        Rank.
    alpha : float or None, default=None
        The update is scaled by ``alpha / r`` (``alpha / sqrt(r)`` with `use_rslora`). None is ``2 * r``, so that a
        search over r keeps the scale.
    dropout : float, default=0.0
        Share of the inputs of A set to zero in training.
    target_modules : str or list of str, default="all-linear"
        Names of the layers adapted, or the name of one; "all-linear" is every linear layer but the output head. [] is
        none beside `target_parameters`. A text with more in it than letters, digits, dots, dashes and underscores is a
        regular expression, which has to match the whole name of a layer: ``".*[.](q|v)_proj"``.
    target_parameters : list of str, default=None
        Names of weights adapted that are no layers of their own, as the experts of a mixture often are:
        ``["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]``. Every expert has an A and B of its own. The choice
        among layers (`exclude_modules`, `layers_to_transform`) is none among these. Needs a `dropout` of 0.
    exclude_modules : str or list of str, default=None
        Layers left out of those; a regular expression is one here, too.
    layers_to_transform : int or list of int, default=None
        Adapt the blocks of these numbers only; `layers_pattern` is the name of the list of blocks, where it is unusual.
    rank_pattern, alpha_pattern : dict of str to number, default=None
        Other ranks and alphas for the layers whose names match (regular expressions of the end of a name).
    modules_to_save : str or list of str, default=None
        Layers trained in full beside, on a private copy.
    ensure_weight_tying : bool, default=False
        Where `modules_to_save` names the embedding or the output head of a model in which they share their weights,
        let them share what is trained, too, instead of a copy for each.
    trainable_token_indices : list of int or dict of str to list of int, default=None
        Token ids whose embeddings are trained beside.
    bias : {"none", "all", "lora_only"}, default="none"
        Biases trained beside.
    lora_bias : bool, default=False
        Give every B a bias. Merged only into layers that have one.
    use_rslora, use_dora : bool, default=False
        Rank-stabilised scaling [2]_; weight decomposition [3]_.
    init_lora_weights : bool or str, default=True
        How A and B begin. True: A uniform, B zero; "gaussian": A normal, B zero; "orthogonal" (an even `r`); "mica":
        B the directions of the smallest singular values, A zero and alone trained. "pissa", "pissa_niter_[n]" [4]_ and
        "olora" [5]_ take the largest directions of W itself out of it, "loftq" [6]_ what W loses in few bits.
        "eva" [7]_, "corda" [8]_ and "lora_ga" [9]_ look at rows of the fit, 128 of them at most, drawn. What a start
        takes out of W is given back when the fit ends: the adapter is then kept as plain LoRA of rank ``2 r`` beside
        the W that it found.
    eva_config : dict, default=None
        For "eva": ``rho`` (2.0), the most that a layer's rank may grow by in the sharing out of ranks;
        ``use_label_mask`` (True), look at the positions that carry loss only; ``whiten`` (False);
        ``adjust_scaling_factors`` (True).
    corda_config : dict, default=None
        For "corda": ``corda_method`` ("ipm" or "kpm"); ``use_float16_for_covariance`` (False).
    loftq_config : dict, default=None
        For "loftq": ``loftq_bits`` (4 or 8), ``loftq_iter`` (1).
    lora_ga_config : dict, default=None
        For "lora_ga": ``direction``, ``scale``, ``stable_gamma``, as in peft.
    loraplus_lr_ratio : float or None, default=None
        LoRA+ [10]_: learning rate of B over that of A. Not with the start "mica".

    References
    ----------
    .. [1] Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models. arXiv:2106.09685.
    .. [2] Kalajdzievski 2023, rsLoRA. arXiv:2312.03732.
    .. [3] Liu et al. 2024, DoRA. arXiv:2402.09353.
    .. [4] Meng et al. 2024, PiSSA. arXiv:2404.02948.
    .. [5] Büyükakyüz 2024, OLoRA. arXiv:2406.01775.
    .. [6] Li et al. 2023, LoftQ. arXiv:2310.08659.
    .. [7] Paischer et al. 2024, EVA. arXiv:2410.07170.
    .. [8] Yang et al. 2024, CorDA. arXiv:2406.05223.
    .. [9] Wang et al. 2024, LoRA-GA. arXiv:2407.05000.
    .. [10] Hayou et al. 2024, LoRA+. arXiv:2402.12354.

    Examples
    --------
    >>> from llmfit import LLMClassifier, LoRA
    >>> LLMClassifier(adapter=LoRA(r=4)).get_params()["adapter__r"]
    4
    """

    type: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    learning_rate: ClassVar[float] = 2e-4  # Biderman et al. 2024, LoRA Learns Less and Forgets Less: 1e-4 to 5e-4
    names: ClassVar[dict[str, str]] = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    apart: ClassVar[tuple[str, ...]] = ("loraplus_lr_ratio", *starts.CONFIGS)
    idle: ClassVar[dict[str, tuple[str, Any]]] = {
        "layers_pattern": ("layers_to_transform", None),
        "layers_to_transform": ("target_modules", []),
        "exclude_modules": ("target_modules", []),
        "ensure_weight_tying": ("modules_to_save", None),
    }
    unruled: ClassVar[tuple[str, ...]] = ("target_modules",)

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_parameters: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    rank_pattern: Any = None
    alpha_pattern: Any = None
    ensure_weight_tying: bool = False
    trainable_token_indices: Any = None
    bias: str = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Any = True
    eva_config: Any = None
    corda_config: Any = None
    loftq_config: Any = None
    lora_ga_config: Any = None
    loraplus_lr_ratio: float | None = None

    # Settings -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise a ParameterError for the first setting that cannot be used."""
        super().check()
        owner = type(self).__name__
        start = self.init_lora_weights
        if not (isinstance(start, str) and starts.PISSA.fullmatch(start)):
            check_choice("init_lora_weights", owner, start, [True, *starts.STARTS])
        if start == "orthogonal" and self.r % 2:
            raise parameter_error("r", owner, "even where init_lora_weights is 'orthogonal'", self.r)
        if start == "mica" and self.loraplus_lr_ratio is not None:
            wanted = "None where init_lora_weights is 'mica', which does not train B"
            raise parameter_error("loraplus_lr_ratio", owner, wanted, self.loraplus_lr_ratio)
        if self.use_dora and starts.moves_base(start):
            raise parameter_error("use_dora", owner, f"False where init_lora_weights is {start!r}", self.use_dora)
        if self.target_modules != [] or not self.target_parameters:
            RULES["target_modules"]("target_modules", owner, self.target_modules)
        _check_needs(self, owner)
        starts.check_configs(self, owner)

    def settings(self) -> dict[str, Any]:
        """Spell out alpha, also for layers whose rank is another one."""
        given = super().settings()
        if self.alpha is None:
            given["lora_alpha"] = 2 * int(self.r)
            doubled = {name: 2 * rank for name, rank in given.get("rank_pattern", {}).items()}
            chosen = given.get("alpha_pattern", {})  # first, since the first pattern that fits is taken
            given["alpha_pattern"] = {
                **chosen,
                **{name: alpha for name, alpha in doubled.items() if name not in chosen},
            }
        return {**given, **starts.settings(self)}

    def learned(self, tensors: Tensors) -> dict[str, Any]:
        """Ranks as they are in the weights, each with the alpha that keeps its layer's scale; a plain start."""
        given = {
            **super().learned(tensors),
            "init_lora_weights": "mica" if self.init_lora_weights == "mica" else True,  # it says what is trained, too
            **dict.fromkeys(starts.CONFIGS),
            "loftq_config": {},
        }
        if self.init_lora_weights != "eva" and not starts.moves_base(self.init_lora_weights):
            return given  # ranks are as they were given, and an A may have rows for every expert
        found = {layer: len(tensors[name]) for name, layer in _layers_with_a(tensors)}
        if any(rank != self.rank_of(layer) for layer, rank in found.items()):
            root = math.sqrt if self.use_rslora else float
            exact = {layer: layer.replace(".", r"\.") for layer in found}
            given["rank_pattern"] = {exact[layer]: rank for layer, rank in found.items()}
            given["alpha_pattern"] = {exact[n]: self.scale_of(n) * root(rank) for n, rank in found.items()}
        if self.init_lora_weights == "eva":  # which may have left some out
            given["target_modules"] = self.layers_of(tensors)
        return given

    def rank_of(self, layer: str) -> int:
        """Rank that the settings give a layer."""
        return int(matching(self.rank_pattern, layer, self.r))

    def scale_of(self, layer: str) -> float:
        """Factor on B A that the settings give a layer."""
        settings, rank = self.settings(), self.rank_of(layer)
        alpha = matching(settings.get("alpha_pattern"), layer, settings["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if self.use_rslora else rank))

    # In and out ---------------------------------------------------------------------------------

    def install(self, base: BaseModel, tensors: Tensors | None, *, training: bool, plan: Plan | None = None) -> Any:
        """Wrap the model's layers, and fuse the products of those that are plain."""
        from llmfit.adapters.fused import fuse_lora

        model = super().install(base, tensors, training=training, plan=plan)
        fuse_lora(model)
        return model

    def put_in(self, base: BaseModel, config: Any, tensors: Tensors | None, plan: Plan | None) -> Any:
        """Let peft wrap the layers, from the start that the settings name."""
        from llmfit.adapters.lora_starts import go_on, put_in

        if self.init_lora_weights is True:
            return super().put_in(base, config, tensors, plan)
        if tensors is not None:
            return go_on(self, base, config, tensors, super().put_in)
        return put_in(self, base, config, plan, super().put_in)

    def load(self, model: Any, tensors: Tensors) -> None:
        """Write fitted weights into the adapter; A and B without peft, which takes longer, if they are all."""
        places = _places(model, tensors) if self.refillable else None
        if places and _writes_alike(model, places, tensors, super().load):
            _copy(places, tensors)
        else:
            super().load(model, tensors)

    def tensors(self, model: Any) -> Tensors:
        """Copy A and B of every adapted layer, relative to the base model's own weights."""
        from llmfit.adapters.lora_starts import kept

        return kept(self, model, super().tensors(model))

    @property
    def refillable(self) -> bool:
        """Where nothing but A, B and magnitudes is added, and nothing of the base model's is changed."""
        others = (self.modules_to_save, self.trainable_token_indices, self.target_parameters)
        return self.init_lora_weights is True and self.bias == "none" and not self.lora_bias and not any(others)

    def holds_lost(self, tensors: Tensors) -> bool:
        """With LoftQ, unless what was taken out of the weights has been given back, in twice the rank."""
        plain = (len(tensors[name]) == self.rank_of(layer) for name, layer in _layers_with_a(tensors))
        return self.init_lora_weights == "loftq" and any(plain)

    def rate(self, parameter: str) -> float:
        """With LoRA+, the ratio for every B."""
        is_b = ".lora_B." in parameter or ".lora_embedding_B" in parameter
        return float(self.loraplus_lr_ratio) if self.loraplus_lr_ratio and is_b else 1.0


@dataclass(frozen=True, kw_only=True, repr=False)
class DoRA(LoRA):
    """LoRA with its update's direction and magnitude apart: :class:`LoRA` with ``use_dora=True``."""

    type: ClassVar[str] = "dora"

    use_dora: bool = True


def _check_needs(spec: LoRA, owner: str) -> None:
    """Raise for a setting that another one leaves no choice."""
    for field, others in NEEDS.items():
        for name, choices in others.items() if getattr(spec, field) else ():
            value = getattr(spec, name)
            if value not in choices:
                wanted = " or ".join(map(repr, choices))
                raise parameter_error(name, owner, f"{wanted} where {field} is given", value)


def _writes_alike(model: Any, places: dict[str, Any], tensors: Tensors, load: Callable[[Any, Tensors], None]) -> bool:
    """See once for a base model and names of weights whether :func:`_copy` writes what `load` does, to the bit."""
    from llmfit.selfcheck import seen_alike

    return seen_alike(
        find_own(model) or model,
        ("written", frozenset(tensors)),
        model,
        partial(_write, model, places, tensors, load),
        what="have an adapter's weights written by their names",
        instead="peft writes them, which takes longer",
    )


def _write(model: Any, places: dict[str, Any], tensors: Tensors, load: Callable[[Any, Tensors], None]) -> Said:
    """Give A and B as peft writes them, and as they are copied, over what are no numbers."""
    _blank(places)
    _copy(places, tensors)
    copied = [parameter.detach().clone() for parameter in places.values()]
    _blank(places)
    load(model, tensors)
    return [(parameter.detach(), quick, 0.0) for parameter, quick in zip(places.values(), copied, strict=True)]


def _blank(places: dict[str, Any]) -> None:
    for parameter in places.values():
        parameter.data.fill_(math.nan)


def _places(model: Any, tensors: Tensors) -> dict[str, Any] | None:
    """Find A and B by their names, where there is nothing else to write, and each has one of its name and shape."""
    added = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    places = {name.replace(".default.", "."): p for name, p in added.items() if name.endswith(PLAIN)}
    if len(places) != len(added) or places.keys() != tensors.keys():
        return None
    return None if any(p.shape != tensors[name].shape for name, p in places.items()) else places


def _copy(places: dict[str, Any], tensors: Tensors) -> None:
    for name, parameter in places.items():
        parameter.data.copy_(tensors[name])


def _layers_with_a(tensors: Tensors) -> list[tuple[str, str]]:
    """Names of every A, and of the layer that it belongs to."""
    parts = [(name, *name.removeprefix(WRAPPED).partition(".lora_")) for name in tensors]
    return [(name, layer) for name, layer, _, rest in parts if rest.startswith(("A", "embedding_A"))]


PLAIN = (".lora_A.default.weight", ".lora_B.default.weight")
NEEDS: dict[str, dict[str, list[Any]]] = {
    "lora_bias": {"use_dora": [False], "init_lora_weights": [True]},
    "target_parameters": {
        "dropout": [0],
        "lora_bias": [False],
        "use_dora": [False],
        "init_lora_weights": [True, "gaussian"],
    },
}
METHODS = {"lora": LoRA, "dora": DoRA}
