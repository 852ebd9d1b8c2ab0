"""``python -m llmfit`` is the command ``llmfit``."""

import sys

from llmfit.cli import main

if __name__ == "__main__":
    sys.exit(main())
