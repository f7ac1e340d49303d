"""The errors that reach a user: one line that names the file, key or sample and the way out.

Every command prints such an error without a traceback and exits with status 2 (see `command.py`). Anything else that
is raised is a defect of this project and keeps its traceback.
"""


class LlavaModError(Exception):
    """Base of all errors caused by input, configuration or files."""


class ConfigError(LlavaModError):
    """A setting is unknown, of the wrong type, or does not fit another one."""


class DataError(LlavaModError):
    """A sample, an image, a shard or an index cannot be used."""


class ModelError(LlavaModError):
    """A checkpoint is missing, is no checkpoint, or does not fit its role."""


class TargetError(LlavaModError):
    """Cached targets do not fit the loss or the student that wants them."""


class CacheError(LlavaModError):
    """A teacher cache is missing, damaged, or was made for something else."""


class EvalError(LlavaModError):
    """Predictions or a benchmark's files cannot be scored as they are."""


class StorageError(LlavaModError):
    """A bucket or another remote folder, or the local copies of its files, cannot be read or written."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, for a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()
