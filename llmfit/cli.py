"""The command line: ``llmfit demo``.

Takes arguments; prints to standard output. An error of llmfit is one sentence on standard error and exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llmfit import __version__
from llmfit.exceptions import LLMFitError

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmfit", description="Fine-tune language models on tables.")
    parser.add_argument("--version", action="version", version=f"llmfit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="the main job, on packaged book reviews: prompts, zero-shot, fine-tuning, grid search, save and load",
        description="Run the main job on packaged book reviews with a small model; takes a few minutes on a CPU.",
    )
    demo.add_argument("--base-model", default="smollm2", help="hub id, folder, .gguf file or alias (default: smollm2)")
    demo.add_argument("--rows", type=int, default=190, help="rows to train on, 20 to 190 (default: 190)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, default=None
        None takes those of the process.

    Returns
    -------
    int
        The exit code: 0, or 1 for an error of llmfit. Wrong usage exits with 2.

    Examples
    --------
    >>> from llmfit.cli import main
    >>> main(["demo", "--rows", "3"])
    1
    """
    given = _parser().parse_args(arguments)
    try:
        from llmfit.demo import run_demo

        run_demo(base_model=given.base_model, rows=given.rows)
    except LLMFitError as error:
        print(f"llmfit: {error}", file=sys.stderr)
        return 1
    return 0
