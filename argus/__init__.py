"""ARGUS: a tiered key-value cache for language models."""

__version__ = "0.1.0"
