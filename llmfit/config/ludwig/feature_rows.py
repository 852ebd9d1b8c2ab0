"""The tables of Ludwig's features: input, output, encoder, decoder, loss, preprocessing.

Literal tables; what is done with them stands in ``features.py``.
"""

from __future__ import annotations

from llmfit.config.ludwig.rows import Table, idle, many, mapped, refused, table

__all__ = ["SECTIONS"]

_NOT_READ = ("audio", "bag", "h3", "image", "timeseries", "vector", "anomaly", "category_distribution")
INPUT_KINDS: dict[str, str | None] = {
    "text": "text",
    "category": "category",
    "number": "number",
    "binary": "binary",
    "set": "set",
    "sequence": "text",
    "date": "text",
    **dict.fromkeys(_NOT_READ),
}
OUTPUT_KINDS: dict[str, str | None] = {
    "text": "text",
    "category": "category",
    "number": "number",
    "binary": "binary",
    "set": "set",
    "sequence": "text",
    "date": None,
    **dict.fromkeys(_NOT_READ),
}
ESTIMATORS: dict[str | None, str] = {
    None: "LLMEstimator",
    "category": "LLMClassifier",
    "binary": "LLMClassifier",
    "set": "LLMClassifier",
    "number": "LLMRegressor",
    "text": "LLMGenerator",
}
# What an encoder's name stands for; None needs pretrained_model_name_or_path or base_model. "llama" is no name of
# Ludwig 0.17's.
ENCODERS: dict[str, str | None] = {
    "auto_transformer": None,
    "llm": None,
    "albert": "albert-base-v2",
    "bert": "bert-base-uncased",
    "camembert": "camembert-base",
    "deberta": "tasksource/deberta-base-long-nli",
    "distilbert": "distilbert-base-uncased",
    "electra": "google/electra-small-discriminator",
    "gpt": "openai-gpt",
    "gpt2": "gpt2",
    "llama": "meta-llama/Llama-2-7b-hf",
    "longformer": "allenai/longformer-base-4096",
    "modernbert": "answerdotai/ModernBERT-base",
    "roberta": "roberta-base",
    "t5": "t5-small",
    "xlmroberta": "xlm-roberta-base",
    "xlnet": "xlnet-base-cased",
}
# Ludwig's own names of base models.
PRESETS = {
    "bloomz-3b": "bigscience/bloomz-3b",
    "bloomz-7b1": "bigscience/bloomz-7b1",
    "codellama-7b": "codellama/CodeLlama-7b-hf",
    "codellama-13b": "codellama/CodeLlama-13b-hf",
    "codellama-34b": "codellama/CodeLlama-34b-hf",
    "codellama-7b-instruct": "codellama/CodeLlama-7b-instruct-hf",
    "codellama-13b-instruct": "codellama/CodeLlama-13b-instruct-hf",
    "codellama-34b-instruct": "codellama/CodeLlama-34b-instruct-hf",
    "gpt-neo-2.7B": "EleutherAI/gpt-neo-2.7B",
    "gpt-j-6b": "EleutherAI/gpt-j-6b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "llama-2-70b-chat": "meta-llama/Llama-2-70b-chat-hf",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.1",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "mixtral-8x7b-instruct": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "opt-350m": "facebook/opt-350m",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-6.7b": "facebook/opt-6.7b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "pythia-12b": "EleutherAI/pythia-12b",
    "vicuna-7b": "lmsys/vicuna-7b-v1.3",
    "vicuna-13b": "lmsys/vicuna-13b-v1.3",
    "zephyr-7b-alpha": "HuggingFaceH4/zephyr-7b-alpha",
    "zephyr-7b-beta": "HuggingFaceH4/zephyr-7b-beta",
    "phi-1": "microsoft/phi-1",
    "phi-1_5": "microsoft/phi-1_5",
    "phi-2": "microsoft/phi-2",
}
POOLINGS = {"last": "last", "mean": "mean", "sum": "mean", "cls_pooled": "first"}
DECODERS = {
    "classifier": "linear",
    "regressor": "linear",
    "text_extractor": "lm",
    "category_extractor": "lm",
    "generator": "lm",
}
_IN_WORDS = ("next_token_softmax_cross_entropy", "sequence_softmax_cross_entropy")
LOSSES: dict[str, tuple[str, ...]] = {
    "category": ("softmax_cross_entropy", *_IN_WORDS),
    "binary": ("binary_weighted_cross_entropy",),
    "set": ("sigmoid_cross_entropy",),
    "number": ("mean_squared_error",),
    "text": _IN_WORDS,
}

_PANDAS = "change the column with pandas before fit."
_ITSELF = "all columns are read by one model; see docs/from-ludwig.md"
INPUT: Table = table(
    mapped("name", "features: the column", "text"),
    mapped("column", "features: the column, where it has another name", "text"),
    mapped("type", "features: text, category, number, binary, set; sequence and date are read as text", "text"),
    mapped("preprocessing", "see input_features.preprocessing", "mapping"),
    mapped("encoder", "base_model, adapter and head='linear'; see input_features.encoder", "spec"),
    refused("active", "leave the feature out.", True),
    idle("proc_column", "a name of Ludwig's own for the prepared column"),
    idle("tied", "one model reads all columns, so that all are tied"),
)
_OWN_TOKENS = "the base model's tokenizer says how text becomes tokens"
_OF_WORDS = "a setting of Ludwig's own tokenizers; the base model has its own"
INPUT_PREPROCESSING: Table = table(
    mapped(
        "max_sequence_length",
        "max_length, of the whole prompt with its answer, where Ludwig means this column; truncation is 'prompt' "
        "beside it, as Ludwig cuts too",
        "int",
        256,
    ),
    mapped(
        "cache_encoder_embeddings",
        "adapter=None, head='linear', which compute each prompt's vector once",
        "bool",
        False,
    ),
    mapped("prompt", "template; see prompt", "mapping"),
    mapped("fill_value", "template.na_rep: what stands for a missing value", "any", "<UNK>"),
    refused(
        "missing_value_strategy",
        f"a missing value reads as fill_value; or {_PANDAS}",
        "fill_with_const",
        "fill_with_false",
    ),
    refused("lowercase", _PANDAS, False),
    many("sequence_length", refused, "every row has its own length. Say max_sequence_length."),
    many("tokenizer pretrained_model_name_or_path vocab_file", idle, _OWN_TOKENS),
    many("most_common padding_symbol unknown_symbol padding ngram_size compute_idf", idle, _OF_WORDS),
    many("computed_fill_value computed_outlier_fill_value", idle, "Ludwig's own note of what it found"),
    many("normalization", idle, "numbers are read as text, as they are"),
    refused("outlier_strategy", _PANDAS),
    idle("outlier_threshold", "read only with outlier_strategy, which is refused", 3.0),
    refused("fallback_true_label", _PANDAS),
)
CACHED: Table = table(
    mapped("cache_encoder_embeddings", "as in input_features.preprocessing", "bool", False),
)
_SHAPE = "the shape of a pretrained model is read from its files"
ENCODER: Table = table(
    mapped("type", "base_model, by the list of encoders; 'passthrough' leaves it as it is, others are refused", "text"),
    mapped("pretrained_model_name_or_path", "base_model", "text"),
    mapped("base_model", "base_model, of the type 'llm'", "text"),
    mapped("trainable", "adapter: 'full' where true, None where false, unless an adapter is given", "bool", False),
    mapped("adapter", "adapter; see adapter. It is trained, whatever trainable says", "spec"),
    mapped("quantization", "quantization; see quantization", "mapping"),
    mapped("max_sequence_length", "max_length, and truncation, as in input_features.preprocessing", "int"),
    mapped("reduce_output", "head.pooling: last; mean and sum are 'mean', cls_pooled is 'first'", "text", "sum"),
    mapped("preprocessing", "cache_encoder_embeddings may stand here as well", "mapping"),
    refused("use_pretrained", "llmfit starts from pretrained weights.", True),
    refused("pretrained_kwargs", "the base model is read as its files say.", {}),
    refused("skip", "leave the encoder out.", False),
    refused("model_parameters", "the base model is read as its files say.", {}),
    many("saved_weights_in_checkpoint", idle, "the base model is never saved with what is learned", False),
    many("vocab vocab_size", idle, _OWN_TOKENS),
    many(
        "activation activation_function add_pooling_layer afn attention_dropout attention_probs_dropout_prob "
        "attention_window attn_pdrop attn_type bi_data bos_token_id clamp_len classifier_dropout "
        "classifier_dropout_prob d_ff d_inner d_kv d_model dim dropout dropout_rate embd_pdrop embedding_size "
        "end_n_top eos_token_id feed_forward_proj ff_activation gradient_checkpointing hidden_act hidden_dim "
        "hidden_dropout_prob hidden_size initializer_factor initializer_range inner_group_num "
        "intermediate_size layer_norm_eps layer_norm_epsilon max_position_embeddings max_relative_positions "
        "mem_len n_ctx n_embd n_head n_heads n_inner n_layer n_layers n_positions norm_rel_ebd "
        "num_attention_heads num_decoder_layers num_heads num_hidden_groups num_hidden_layers num_layers "
        "pad_token_id pooler_dropout pooler_hidden_act pooler_hidden_size pos_att_type position_biased_input "
        "position_buckets position_embedding_type qa_dropout relative_attention "
        "relative_attention_num_buckets resid_pdrop reuse_len same_length scale_attn_weights sep_token_id "
        "seq_classif_dropout share_att_key sinusoidal_pos_embds start_n_top summary_activation "
        "summary_last_dropout summary_type summary_use_proj type_vocab_size untie_r use_mems_eval "
        "use_mems_train",
        idle,
        _SHAPE,
    ),
)
_ONE_LAYER = "the head is one linear layer on the pooled hidden states."
_NO_LAYERS = "read only where there are more layers, which are refused"
OUTPUT: Table = table(
    mapped("name", "target: the column", "text"),
    mapped("column", "target: the column, where it has another name", "text"),
    mapped(
        "type", "the estimator: category, binary and set LLMClassifier, number LLMRegressor, text LLMGenerator", "text"
    ),
    mapped("preprocessing", "see output_features.preprocessing", "mapping"),
    mapped("decoder", "head; see output_features.decoder", "spec"),
    mapped("loss", "loss_weights and class_weight; see output_features.loss", "spec"),
    mapped("trainer", "a shorthand; see output_features.trainer", "mapping"),
    refused("active", "leave the feature out.", True),
    refused("calibration", "wrap the fitted estimator: CalibratedClassifierCV(FrozenEstimator(model)).", False),
    refused("threshold", "the likelier class is predicted. Cut predict_proba elsewhere.", 0.5),
    refused("clip", "clip the predictions: predict(rows).clip(low, high)."),
    refused("class_similarities", "the losses know no likeness of classes."),
    refused("dependencies", "several targets in words are answered left to right, in the order of the list.", []),
    many("reduce_input reduce_dependencies", idle, "there is no combiner whose outputs could be reduced", "sum"),
    idle("top_k", "a setting of a measure; predict_proba gives every class", 3),
    idle("default_validation_metric", "a note of Ludwig's on the type"),
    many("proc_column input_size num_classes", idle, "Ludwig's own note of what it found"),
)
SHORTHAND: Table = table(
    mapped("regularize", "weight_decay", "number"),
    mapped("dropout", "adapter.dropout, or head.dropout where no adapter has one", "number"),
)
OUTPUT_PREPROCESSING: Table = table(
    mapped("max_sequence_length", "generation.max_new_tokens, where the target is text", "int", 256),
    refused("missing_value_strategy", f"a row to learn from needs its target. {_PANDAS.capitalize()}", "drop_row"),
    refused("lowercase", _PANDAS, False),
    refused("outlier_strategy", _PANDAS),
    refused("fallback_true_label", _PANDAS),
    refused("sequence_length", "every answer has its own length."),
    many("tokenizer pretrained_model_name_or_path vocab_file", idle, _OWN_TOKENS),
    many("most_common padding_symbol unknown_symbol padding ngram_size compute_idf", idle, _OF_WORDS),
    many("fill_value computed_fill_value computed_outlier_fill_value", idle, "no target is filled in"),
    idle("outlier_threshold", "read only with outlier_strategy, which is refused", 3.0),
    idle("normalization", "a head learns numbers in units of their spread, and answers in their own"),
    idle("cache_encoder_embeddings", "an answer has no vector", False),
    many("vocab fallback_label", idle, "the classes are those of the fitted rows, and every row is given one of them"),
)
_SCORED = "classes are scored as answers, so that every row has one of them and no text is searched"
_GENERATOR = "a setting of Ludwig's own generator, which reads no pretrained model"
_FC = (
    "fc_output_size fc_use_bias fc_weights_initializer fc_bias_initializer fc_norm fc_norm_params fc_activation "
    "fc_dropout"
)
DECODER: Table = table(
    mapped(
        "type", "head: classifier and regressor 'linear'; text_extractor, category_extractor, generator 'lm'", "text"
    ),
    mapped("max_new_tokens", "generation.max_new_tokens, where the target is text", "int"),
    many("match match_strategy str2idx fallback_label constrain_to_vocabulary", idle, _SCORED),
    many("tokenizer pretrained_model_name_or_path vocab_file", idle, _OWN_TOKENS),
    many("input_size num_classes output_size", idle, "Ludwig's own note of what it found"),
    refused("fc_layers", _ONE_LAYER, []),
    refused("num_fc_layers", _ONE_LAYER, 0),
    many(_FC, idle, _NO_LAYERS),
    refused("use_bias", _ONE_LAYER, True),
    many("weights_initializer bias_initializer", idle, "the head begins as zeros: every class equally likely"),
    refused("calibration", "wrap the fitted estimator: CalibratedClassifierCV(FrozenEstimator(model))."),
    refused("mc_dropout_samples", "predictions are made without dropout.", 0),
    many("activation dropout", idle, "read only by decoders that are refused"),
    many("cell_type num_layers reduce_input max_sequence_length vocab_size teacher_forcing_decay", idle, _GENERATOR),
    idle("teacher_forcing_decay_rate", _GENERATOR, 0.0),
    refused("beam_width", "say generation.num_beams.", 1),
    refused("beam_length_penalty", "say generation.length_penalty.", 0.0),
)
LOSS: Table = table(
    mapped("type", "the loss that the kind of the target has here; others are refused", "text"),
    mapped("weight", "loss_weights, of several targets", "number", 1.0),
    mapped("class_weights", "class_weight: a mapping of label to weight", "any"),
    refused("positive_class_weight", "say class_weights: a mapping of label to weight."),
    many("robust_lambda confidence_penalty", refused, "the losses have no such term.", 0),
    refused("class_similarities", "the losses know no likeness of classes."),
    idle("class_similarities_temperature", "read only with class_similarities, which are refused", 0),
    refused("unique", "every token of an answer counts.", False),
    many(
        "delta nu eta perturbation_strength num_perturbation_steps background_class xi zeta alpha gamma smooth "
        "temperature epsilon",
        idle,
        "read only by losses that are refused",
    ),
)
# The tables of a section of defaults, and the types of what it names that are read at all; () where it names none.
DEFAULTS_OF: dict[str, tuple[tuple[Table, ...], tuple[str, ...]]] = {
    "preprocessing": ((INPUT_PREPROCESSING, OUTPUT_PREPROCESSING), ()),
    "encoder": ((ENCODER,), tuple(ENCODERS)),
    "decoder": ((DECODER,), tuple(DECODERS)),
    "loss": ((LOSS,), ()),
}
SECTIONS: dict[str, Table] = {
    "input_features": INPUT,
    "input_features.preprocessing": INPUT_PREPROCESSING,
    "input_features.encoder": ENCODER,
    "input_features.encoder.preprocessing": CACHED,
    "output_features": OUTPUT,
    "output_features.preprocessing": OUTPUT_PREPROCESSING,
    "output_features.decoder": DECODER,
    "output_features.loss": LOSS,
    "output_features.trainer": SHORTHAND,
}
