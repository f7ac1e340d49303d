"""One file a benchmark; `TASKS` names them all."""

from __future__ import annotations

from typing import cast

from eval.example import Task
from eval.tasks import (
    gqa,
    mmbench,
    mmbench_cn,
    mme,
    mmhal,
    object_halbench,
    pope,
    scienceqa,
    textvqa,
    vizwiz,
)
from llavamod_offline.errors import ConfigError

TASKS = {
    module.NAME: cast("Task", module)
    for module in (textvqa, gqa, scienceqa, vizwiz, mme, mmbench, mmbench_cn, pope, mmhal, object_halbench)
}


def get_task(name: str) -> Task:
    """Look a benchmark up by name. Errors: `ConfigError` listing the known names."""
    if name not in TASKS:
        raise ConfigError(f"task '{name}' is unknown: choose one of {', '.join(TASKS)}")
    return TASKS[name]
