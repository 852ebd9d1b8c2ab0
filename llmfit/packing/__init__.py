"""Rows packed behind one another in a single sequence, what they all begin with in it once, and the attention for that.

Takes rows and trees of answers behind them; gives parts of rows that begin alike and a :class:`Layout`, and teaches a
decoder of transformers to attend by one: each token sees the shared beginning, and of its own row what stands before
it. Nothing is padded but inside the attention, and the shared keys and values are not copied for each row, long rows
aside. Where something drops out in training, all rows of a pass see one draw of the beginning: a row's expected
gradient is the same. Knows no loss, no label and no estimator.
"""

from llmfit.packing.attention import PackingError, packed
from llmfit.packing.beginnings import by_beginning, cut_step, extent, parted
from llmfit.packing.behind import Behind, Branch, DecodeStep, lay_behind
from llmfit.packing.layouts import KeptBeginning, Layout, Layouts, Tree, common_prefix, lay_out
from llmfit.packing.within import both_ways

__all__ = [
    "Behind",
    "Branch",
    "DecodeStep",
    "KeptBeginning",
    "Layout",
    "Layouts",
    "PackingError",
    "Tree",
    "both_ways",
    "by_beginning",
    "common_prefix",
    "cut_step",
    "extent",
    "lay_behind",
    "lay_out",
    "packed",
    "parted",
]
