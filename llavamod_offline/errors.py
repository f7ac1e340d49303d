"""Errors for users: one line that names the file, key or sample and what to do.

Every command prints such an error without a traceback and exits with status 2 (see `entrypoint.py`). Any other
exception is a bug of this project and keeps its traceback.
"""


class LlavaModError(Exception):
    """Base of all errors caused by input, configuration or files."""


class ConfigError(LlavaModError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(LlavaModError):
    """A sample, an image, a shard or an index cannot be used."""


class EmptySetError(DataError):
    """No row of a set's sources yields a sample."""


class ModelError(LlavaModError):
    """A checkpoint is missing, invalid, or unsuitable for its role."""


class TargetError(LlavaModError):
    """Cached targets do not match the loss or the student."""


class CacheError(LlavaModError):
    """A teacher cache is missing, damaged, or incompatible."""


class EvalError(LlavaModError):
    """Predictions or a benchmark's files cannot be scored."""


class StorageError(LlavaModError):
    """A remote folder, or the local cache of its files, cannot be read or written."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()
