"""Sieve around the trainer: study files, the search, the one loop, tracking and the command line."""

import sys
from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parent.parent  # where this package lies

# `sieve` as a process of its own. -P: no module of the current folder is imported, whatever it is called. The package
# itself is found where this process found it, if need be.
COMMAND = (sys.executable, "-P", "-c", f"import sys; sys.path.append({str(ROOT)!r}); from search.cli import app; app()")
