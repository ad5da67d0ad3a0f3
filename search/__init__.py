"""Sieve around the trainer: study files, the search, the one loop, tracking and the command line."""

__version__ = "0.1.0"
