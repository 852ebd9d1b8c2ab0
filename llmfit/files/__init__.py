"""Tables in files: read whole or a chunk at a time, and written a chunk at a time.

Takes paths, globs and ``-``; gives frames, and the rows that cannot be read with the reason. Types are those of the
whole file, so that no chunk reads a cell otherwise than another. Knows no estimator.
"""

from llmfit.files.paths import FORMATS, Place, check_writable, find_inputs, find_output
from llmfit.files.tables import Bad, Chunk, Source, open_source, read_table
from llmfit.files.types import KINDS, kinds_of
from llmfit.files.writing import Writer, cell_text, is_binary, is_infinite, make_writer, plain_values

__all__ = [
    "FORMATS",
    "KINDS",
    "Bad",
    "Chunk",
    "Place",
    "Source",
    "Writer",
    "cell_text",
    "check_writable",
    "find_inputs",
    "find_output",
    "is_binary",
    "is_infinite",
    "kinds_of",
    "make_writer",
    "open_source",
    "plain_values",
    "read_table",
]
