"""Ludwig's sections on training and the rows it sees: trainer, its parts, preprocessing of the whole; as parameters.

Takes what a config says there; gives values of an estimator's parameters. Knows neither features nor adapters.
"""

from __future__ import annotations

import inspect
from typing import Any

from llmfit.config.ludwig.rows import MAPPED, Table, idle, many, mapped, read_section, refused, table, unknown
from llmfit.exceptions import ParameterError, quoted

__all__ = ["SECTIONS", "read_preprocessing", "read_trainer"]


def read_trainer(given: Any, *, llm: bool) -> dict[str, Any]:
    """Read the trainer: parameters of an estimator, and "type" where it says one.

    Parameters
    ----------
    given : any
        The section.
    llm : bool
        The model type is "llm", whose batch size is 1 where none is given.

    Raises
    ------
    ParameterError
    """
    said = read_section(TRAINER, given, "trainer")
    params: dict[str, Any] = {
        key: said[key] for key in ("type", "learning_rate", "epochs") if said.get(key) is not None
    }
    if said.get("enable_gradient_checkpointing") is not None:
        params["gradient_checkpointing"] = said["enable_gradient_checkpointing"]
    if said.get("early_stop") is not None:
        params["early_stopping"] = said["early_stop"] if said["early_stop"] > 0 else None
    if said.get("skip_all_evaluation"):
        params["early_stopping"] = None
    return {
        **params,
        **_rows_of_a_step(said, llm=llm),
        **_schedule(said.get("learning_rate_scheduler")),
        **_optimizer(said.get("optimizer"), said),
        **_clipping(said.get("gradient_clipping"), "gradient_clipping" in said),
    }


def _rows_of_a_step(said: dict[str, Any], *, llm: bool) -> dict[str, Any]:
    """Rows of an optimiser step: the batch times the batches that are gathered, or the effective size alone."""
    whole, batch, steps = (
        said.get(key) for key in ("effective_batch_size", "batch_size", "gradient_accumulation_steps")
    )
    if batch is None and llm and steps not in (None, "auto"):
        batch = 1
    parts = [part for part in (batch, steps) if part not in (None, "auto")]
    if whole not in (None, "auto"):
        if len(parts) == 2 and parts[0] * parts[1] != whole:
            raise ParameterError(
                f"The config's 'trainer.effective_batch_size' is {whole}, but batch_size * gradient_accumulation_steps "
                f"is {parts[0]} * {parts[1]}. Leave one of them out."
            )
        return {"batch_size": whole}
    if batch in (None, "auto"):
        if parts and parts[0] != 1:
            raise ParameterError(
                f"The config's 'trainer.gradient_accumulation_steps' is {steps}, which needs a number as "
                "'trainer.batch_size': a step has as many rows as both multiplied."
            )
        return {} if batch is None and whole is None else {"batch_size": "auto"}
    return {"batch_size": batch * (steps if steps not in (None, "auto") else 1)}


def _schedule(given: Any) -> dict[str, Any]:
    from llmfit.optim import SCHEDULES

    said = read_section(SCHEDULER, given, "trainer.learning_rate_scheduler")
    params: dict[str, Any] = {}
    if "decay" in said:
        params["schedule"] = said["decay"] or "constant"
        if params["schedule"] not in SCHEDULES:
            raise ParameterError(
                "The config's 'trainer.learning_rate_scheduler.decay' must be null or one of "
                f"{quoted(name for name in SCHEDULES if name != 'constant')}. Got {said['decay']!r} instead."
            )
    warmup = said.get("warmup_fraction")
    if warmup is not None:
        if not 0 <= warmup < 1:
            raise ParameterError(
                "The config's 'trainer.learning_rate_scheduler.warmup_fraction' must be a share of all steps, from 0 "
                f"to below 1. Got {warmup!r} instead."
            )
        params["warmup"] = warmup
    return params


def _optimizer(given: Any, said: dict[str, Any]) -> dict[str, Any]:
    """Read the optimiser, and both of Ludwig's ways to pull weights towards zero."""
    from llmfit.optim import OPTIMIZERS

    spec = {"type": given} if isinstance(given, str) else dict(given or {})
    name, params = spec.pop("type", "adam" if spec else None), {}
    if name is not None and not (isinstance(name, str) and name in OPTIMIZERS):
        raise ParameterError(
            f"The config's 'trainer.optimizer.type' must be one of {quoted(OPTIMIZERS, most=99)}. Got {name!r} instead."
        )
    settings = _optimizer_settings(name, spec)
    decay, pull = settings.pop("weight_decay", None), said.get("regularization_lambda")
    if said.get("regularization_type", "l2") is None:
        pull = None
    if pull is not None:
        name = name or "adam"  # as in Ludwig; llmfit's own would not take the term into its moments
    if pull:
        _check_pull(str(name), said.get("regularization_type"), decay)
    if name in COUPLED_ON_REQUEST and (pull or decay):
        settings["decoupled_weight_decay"] = False
    if name is not None:
        params["optimizer"] = {"type": name, **settings} if settings else name
    found = 2 * pull if pull else decay if pull is None or decay else pull
    return {**params, **({} if found is None else {"weight_decay": found})}


def _check_pull(name: str, kind: Any, decay: Any) -> None:
    """Raise where a term of the loss, lambda times the squares of the weights, has no equal among the parameters."""
    if kind not in (None, "l2"):
        raise ParameterError(f"The config's 'trainer.regularization_type' must be 'l2'. Got {kind!r} instead.")
    if decay:
        raise ParameterError(
            "The config's 'trainer.regularization_lambda' and 'trainer.optimizer.weight_decay' are one parameter here, "
            "weight_decay. Leave one of them out."
        )
    if name not in COUPLED:
        raise ParameterError(
            f"The config's 'trainer.regularization_lambda' cannot be used with the optimizer {name!r}, which pulls "
            f"weights past its moments: its 'weight_decay' does. Optimizers with such a term: {quoted(COUPLED)}."
        )


def _optimizer_settings(name: str | None, spec: dict[str, Any]) -> dict[str, Any]:
    """Check settings by what the optimiser takes."""
    given = {key: value for key, value in spec.items() if value is not None}
    settings = read_section(OPTIMIZER, given, "trainer.optimizer")
    known = _known_settings(str(name))
    for key in settings:
        if key not in known:
            raise unknown(f"trainer.optimizer.{key}", "trainer.optimizer", known)
    return settings


def _known_settings(name: str) -> list[str]:
    """List what an optimiser of torch or bitsandbytes takes, as far as Ludwig has it."""
    import torch

    from llmfit.optim import OPTIMIZERS

    if name not in OPTIMIZERS:
        return []
    mine = [row.key for row in OPTIMIZER.values() if row.verdict == MAPPED]
    probe = OPTIMIZERS[name]([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    return [key for key in inspect.signature(type(probe).__init__).parameters if key in mine]


def _clipping(given: Any, there: bool) -> dict[str, Any]:
    said = read_section(CLIPPING, given, "trainer.gradient_clipping")
    return {"max_grad_norm": said["clipglobalnorm"] or None} if there and "clipglobalnorm" in said else {}


def read_preprocessing(given: Any, targets: list[str]) -> dict[str, Any]:
    """Read the preprocessing of the whole: what is held out, and how long a row may be.

    Parameters
    ----------
    given : any
        The section.
    targets : list of str
        Columns that a split may be stratified by.
    """
    said = read_section(PREPROCESSING, given, "preprocessing")
    params: dict[str, Any] = {}
    if said.get("global_max_sequence_length") is not None:
        params["max_length"] = said["global_max_sequence_length"]
    split = said.get("split")
    if split is None:
        return params
    known = read_section(SPLIT, split, "preprocessing.split")
    kind = known.get("type") or "random"
    if kind not in ("random", "stratify"):
        raise ParameterError(
            f"The config's 'preprocessing.split.type' cannot be {kind!r} here: pass the rows of the validation to "
            "fit(..., eval_set=...), and keep those of the test to yourself."
        )
    if known.get("column") is not None and known["column"] not in targets:
        raise ParameterError(
            f"The config's 'preprocessing.split.column' must be the target, whose classes a split keeps in proportion. "
            f"Got {known['column']!r} instead."
        )
    return {**params, **_validation_share(known.get("probabilities"))}


def _validation_share(shares: Any) -> dict[str, Any]:
    """Turn shares of training, validation and test into what of a fit's rows is held out; the test is elsewhere."""
    if shares is None:
        return {"validation_fraction": LUDWIGS_VALIDATION}
    ok = len(shares) == 3 and all(isinstance(share, int | float) and share >= 0 for share in shares) and shares[0] > 0
    if not ok:
        raise ParameterError(
            "The config's 'preprocessing.split.probabilities' must be three numbers: the shares of training, "
            f"validation and test. Got {shares!r} instead."
        )
    return {"validation_fraction": round(shares[1] / (shares[0] + shares[1]), 6)}


LUDWIGS_VALIDATION = 0.125  # of 0.7 + 0.1
COUPLED_ON_REQUEST = ("nadam", "radam")
# Optimisers whose weight_decay is the gradient of a term of the loss, as Ludwig's regularisation is.
COUPLED = ("adam", "sgd", "adagrad", "rmsprop", *COUPLED_ON_REQUEST)

_NO_STEPS = "training is counted in epochs. Set trainer.epochs."
_PER_EPOCH = "validation comes once an epoch, and checkpoint_dir keeps what a killed fit goes on from."
_SUPERVISED = "llmfit minimises one loss, that of the answers."
_ALONE = "read only where the setting beside it is on, which is refused"
TRAINER: Table = table(
    mapped("type", "'finetune' trains, 'none' does not (adapter=None); other types are refused", "text"),
    mapped("epochs", "epochs", "int", 100),
    mapped("learning_rate", "learning_rate", "number or auto", 0.001),
    mapped("learning_rate_scheduler", "schedule and warmup; see trainer.learning_rate_scheduler", "mapping"),
    mapped(
        "batch_size", "batch_size, times gradient_accumulation_steps: rows of an optimiser step", "int or auto", "auto"
    ),
    mapped(
        "gradient_accumulation_steps", "a factor of batch_size; memory is batch_tokens' matter", "int or auto", "auto"
    ),
    mapped("effective_batch_size", "batch_size", "int or auto", "auto"),
    mapped("optimizer", "optimizer; see trainer.optimizer", "spec", "adam"),
    mapped(
        "regularization_lambda",
        "weight_decay, twice as much: the gradient of lambda times the squares is twice the weights. With optimisers "
        "that take it into their moments, as a term of the loss is (where none is said: adam); refused with others. It "
        "is added behind the clipping of gradients, where Ludwig clips both. Give a range of it as weight_decay",
        "number",
        0.0,
    ),
    mapped("regularization_type", "'l2' alone; null takes the lambda as 0", "text", "l2"),
    mapped("gradient_clipping", "max_grad_norm; see trainer.gradient_clipping", "mapping"),
    mapped(
        "early_stop",
        "early_stopping, in epochs; 0 or less is None. Where nothing else holds rows out, validation_fraction is 0.125",
        "int",
        5,
    ),
    mapped(
        "skip_all_evaluation",
        "true is early_stopping None, whatever early_stop says: what is not validated stops nothing. Rows are held out "
        "only where preprocessing.split is given; else evaluate(rows) is a step of its own",
        "bool",
        False,
    ),
    mapped("enable_gradient_checkpointing", "gradient_checkpointing", "bool", False),
    refused("train_steps", _NO_STEPS),
    refused("eval_steps", _PER_EPOCH),
    many("steps_per_checkpoint checkpoints_per_epoch", refused, _PER_EPOCH, 0),
    refused("base_learning_rate", "rates are not scaled by the number of workers. Set trainer.learning_rate.", 0.0),
    refused("validation_field", "the loss of all targets is what is validated.", "combined"),
    refused("validation_metric", "the loss is what is validated.", "loss"),
    refused("should_shuffle", "rows are shuffled anew every epoch.", True),
    refused("increase_batch_size_on_plateau", "a step keeps its number of rows.", 0),
    idle("increase_batch_size_on_plateau_patience", _ALONE, 5),
    idle("increase_batch_size_on_plateau_rate", _ALONE, 2.0),
    idle("increase_batch_size_eval_metric", _ALONE, "loss"),
    idle("increase_batch_size_eval_split", _ALONE, "training"),
    idle("max_batch_size", "a limit of memory, which batch_tokens keeps", 2**40),
    idle("eval_batch_size", "a matter of memory and speed alone; see batch_tokens", 2),
    idle("evaluate_training_set", "evaluate(rows) measures whatever rows it is given", False),
    idle("learning_rate_scaling", "there is one worker, by whose number rates would be scaled", "linear"),
    idle("bucketing_field", "rows of like length go through the model together anyway"),
    idle(
        "use_mixed_precision",
        "dtype says how numbers are kept; the weights that are trained are kept in float32",
        False,
    ),
    idle("compile", "a matter of speed alone", False),
    many("packing", idle, "rows are packed wherever they can be; Ludwig 0.17 does not read it either", False),
    idle("packing_max_sequences_per_pack", "batch_tokens says how much goes through the model at once", 8),
    many("enable_profiling profiler", idle, "profiling changes no result; use torch.profiler around fit"),
    refused("layers_to_freeze_regex", "adapter.target_modules and layers_to_transform say what is trained."),
    refused("loss_balancing", "the targets' losses are summed by loss_weights.", "none"),
    many("loss_balancing_alpha loss_balancing_lr loss_balancing_preference_vector", idle, _ALONE),
    idle("loss_balancing_tchebycheff_weight", _ALONE, 0.5),
    refused("contrastive_pretrain_epochs", _SUPERVISED, 0),
    many("contrastive_pretrain_temperature contrastive_pretrain_projection_dim", idle, _ALONE),
    idle("contrastive_pretrain_learnable_temperature", _ALONE, True),
    refused("modality_dropout", "all columns stand in one prompt.", 0.0),
    refused("model_soup", "one state of the weights is kept: the last, or the best with early_stopping."),
    idle("model_soup_top_k", _ALONE, 5),
    many("dpo_beta dpo_loss_type dpo_label_smoothing rejected_column kto_beta orpo_beta", refused, _SUPERVISED),
    many("grpo_beta grpo_epsilon grpo_num_generations", refused, _SUPERVISED),
)
_OTHER_DECAY = "read only by schedules that are refused"
SCHEDULER: Table = table(
    mapped(
        "decay",
        "schedule: null is 'constant', 'linear' the same; 'cosine' falls once, over all steps, where Ludwig begins it "
        "anew at every evaluation, which is once an epoch. Others are refused",
        "text",
    ),
    mapped("warmup_fraction", "warmup, which must be below 1: a share of all steps", "number", 0.0),
    refused("warmup_evaluations", "say warmup_fraction.", 0),
    refused("reduce_on_plateau", "the rate falls by its schedule.", 0),
    idle("reduce_on_plateau_patience", _ALONE, 10),
    idle("reduce_on_plateau_rate", _ALONE, 0.1),
    idle("reduce_eval_metric", _ALONE, "loss"),
    idle("reduce_eval_split", _ALONE, "training"),
    refused("t_0", "cosine falls once, over all steps."),
    refused("t_mult", "cosine falls once, over all steps.", 1),
    refused("eta_min", "cosine falls to zero.", 0),
    many("decay_rate decay_steps staircase max_lr pct_start div_factor final_div_factor", idle, _OTHER_DECAY),
    many("inverse_sqrt_warmup_steps polynomial_power polynomial_end_lr", idle, _OTHER_DECAY),
    many("wsd_warmup_fraction wsd_stable_fraction wsd_decay_fraction", idle, _OTHER_DECAY),
)
_SETTING = "a setting of optimizer, where that optimiser has it"
_OTHER_OPTIMIZER = "a setting of an optimiser that llmfit does not have."
OPTIMIZER: Table = table(
    mapped("type", "optimizer; 'adam' where only settings are given, as in Ludwig. Those not here are refused", "text"),
    mapped("weight_decay", "weight_decay; with nadam and radam in the gradient, as in Ludwig", "number", 0.0),
    mapped("betas", _SETTING, "list", [0.9, 0.999]),
    mapped("eps", _SETTING, "number"),
    many("momentum dampening lr_decay initial_accumulator_value", mapped, _SETTING, "number", 0.0),
    mapped("momentum_decay", _SETTING, "number", 0.004),
    mapped("alpha", _SETTING, "number", 0.99),
    many("nesterov centered amsgrad", mapped, _SETTING, "bool", False),
    refused("block_wise", "bitsandbytes keeps states by blocks.", True),
    refused("percentile_clipping", "gradients are scaled by their norm. Say trainer.gradient_clipping.", 100, 0),
    refused("lr", "say trainer.learning_rate."),
    many(
        "scale_parameter relative_step",
        idle,
        "torch's Adafactor goes by the learning rate alone, so that Ludwig's rates, scaled to the weights and falling "
        "with the steps, cannot be had: say trainer.learning_rate",
        True,
    ),
    refused("warmup_init", "say trainer.learning_rate_scheduler.warmup_fraction.", False),
    many("rho max_iter max_eval tolerance_grad tolerance_change history_size", refused, _OTHER_OPTIMIZER),
    many("line_search_fn warmup_steps bias_correction adam_w_mode max_unorm", refused, _OTHER_OPTIMIZER),
)
CLIPPING: Table = table(
    mapped("clipglobalnorm", "max_grad_norm", "number", 0.5),
    refused("clipnorm", "Ludwig would scale by the global norm a second time. Say clipglobalnorm."),
    refused("clipvalue", "gradients are scaled by their norm. Say clipglobalnorm."),
)
_LONGEST = "max_length, of a prompt with its answer; truncation is 'prompt' beside it, as Ludwig cuts too"
_SAMPLE = "take a sample before fit: frame.sample(frac=0.1, random_state=0)."
_BALANCE = "say class_weight: balanced, or draw the rows before fit."
PREPROCESSING: Table = table(
    refused("sample_ratio", _SAMPLE, 1.0),
    refused("sample_size", _SAMPLE),
    many("oversample_minority undersample_majority", refused, _BALANCE),
    mapped("split", "validation_fraction; see preprocessing.split", "mapping", "random"),
    mapped("global_max_sequence_length", _LONGEST, "int"),
)
SPLIT: Table = table(
    mapped(
        "type", "'random' and 'stratify': rows are drawn, those of classes in proportion; others are refused", "text"
    ),
    mapped(
        "probabilities",
        "validation_fraction, which is validation / (training + validation): the rows of a test are never given to fit",
        "list",
        [0.7, 0.1, 0.2],
    ),
    mapped("column", "the target, with 'stratify'", "text"),
)
SECTIONS: dict[str, Table] = {
    "trainer": TRAINER,
    "trainer.learning_rate_scheduler": SCHEDULER,
    "trainer.optimizer": OPTIMIZER,
    "trainer.gradient_clipping": CLIPPING,
    "preprocessing": PREPROCESSING,
    "preprocessing.split": SPLIT,
}
