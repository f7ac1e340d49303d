"""Configuration: frozen dataclasses, with YAML files and `key=value` arguments merged over their defaults.

Only commands use config objects; losses, models and stores take plain arguments. A setting is a field, explained by the
docstring under it, which `--help` and `--print-config` show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavamod_offline.lazy import lazy_exports

if TYPE_CHECKING:
    from llavamod_offline.config.load import load_config, split_arguments
    from llavamod_offline.config.problems import raise_problems
    from llavamod_offline.config.render import describe_config, dump_config, print_config
    from llavamod_offline.config.schema import InputPath

__all__ = [
    "InputPath",
    "describe_config",
    "dump_config",
    "load_config",
    "print_config",
    "raise_problems",
    "split_arguments",
]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "load": "load_config split_arguments",
        "problems": "raise_problems",
        "render": "describe_config dump_config print_config",
        "schema": "InputPath",
    },
)
