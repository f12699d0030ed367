"""The errors that ARGUS raises, each one clear line."""

ERROR_LOG = "error.log"
"""What the folder of a run of a sweep that failed holds: its line, or the traceback of what ARGUS does not raise on purpose."""


class ArgusError(Exception):
    """Base of every error that ARGUS raises on purpose."""


class ConfigError(ArgusError):
    """A configuration names something that does not exist or does not fit."""


class PluginError(ArgusError):
    """A plugin is broken, or two plugins claim one name."""


class ModelError(ArgusError):
    """A model is missing, or cannot work with handles to its cache."""


class RangeError(ArgusError):
    """Keys or values hold NaN, infinity, or numbers beyond FP16's range."""


class NotCompiledError(ArgusError):
    """A kernel has to be compiled first, while a CUDA graph is recorded."""
