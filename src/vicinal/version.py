"""The version, a literal in a file of its own: packaging reads it without importing torch."""

__version__ = "0.1.0"
