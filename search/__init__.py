"""Sieve around the trainer: study files, the search, the one loop, tracking and the command line."""

import sys

__version__ = "0.1.0"

COMMAND = (sys.executable, "-c", "from search.cli import app; app()")  # `sieve` as a process of its own
