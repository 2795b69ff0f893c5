"""The version of this package, where every module can read it without the public API above it."""

__version__ = "0.1.0"
