"""How each kind of model reads prompts and says what follows: the one file that tells the kinds apart.

Takes a lent module and token ids; gives logits. A decoder goes on behind its prompt, in one sequence. An
encoder-decoder reads the prompt with its encoder, and its decoder answers beside it, from `start_ids`; no `start_ids`
mean a decoder. Rows of a decoder that attends as usual are packed, what all begin with computed once
(:mod:`llmfit.packing`); of every other model they are padded. Knows no loss, no label and no estimator.
"""

from llmfit.forward.batches import Batch, ask, collate, completion_logits, look, side_by_side
from llmfit.forward.behind import go_behind, goes_behind, read_rows
from llmfit.forward.checking import number_bytes, packable, same_words
from llmfit.forward.generation import PaddedPrompts, begin, generation_inputs
from llmfit.forward.packed_prompts import PackedPrompts
from llmfit.forward.pieces import completion_states
from llmfit.forward.reading import Reading, go_on, keeps_all, read
from llmfit.forward.words import Words, choices, most_positions, token_losses

__all__ = [
    "Batch",
    "PackedPrompts",
    "PaddedPrompts",
    "Reading",
    "Words",
    "ask",
    "begin",
    "choices",
    "collate",
    "completion_logits",
    "completion_states",
    "generation_inputs",
    "go_behind",
    "go_on",
    "goes_behind",
    "keeps_all",
    "look",
    "most_positions",
    "number_bytes",
    "packable",
    "read",
    "read_rows",
    "same_words",
    "side_by_side",
    "token_losses",
]
