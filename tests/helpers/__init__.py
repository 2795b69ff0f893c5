"""Synthetic worker calls and stages; importable by the tests and, through PYTHONPATH, by worker children."""
