"""Big files, answered a chunk of rows at a time, with output that outlives a kill.

Takes a table in files and a function that answers frames; writes a file in which every row stands once, in order. Knows
no estimator.
"""

from llmfit.bulk.journal import Journal
from llmfit.bulk.scoring import Answering, Scored, check_free, score_files

__all__ = ["Answering", "Journal", "Scored", "check_free", "score_files"]
