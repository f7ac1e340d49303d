"""The benchmark tasks by name. To add one, write a module that ends in a `Task` and list it in `TASKS`.

`pope.py` is a plain example; `gqa.py` has an upload, `object_halbench.py` a judge, `mmbench.py` two tasks.
"""

from __future__ import annotations

from eval.task import Task
from eval.tasks import gqa, mmbench, mme, mmhal, object_halbench, pope, scienceqa, textvqa, vizwiz
from llavamod_offline.errors import ConfigError

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(gqa.TASK, vizwiz.TASK, scienceqa.TASK, textvqa.TASK, mme.TASK, mmbench.ENGLISH, mmbench.CHINESE),
        *(pope.TASK, mmhal.TASK, object_halbench.TASK),
    )
}


def get_task(name: str) -> Task:
    """Look a benchmark up by name. Errors: `ConfigError` listing the known names."""
    if name not in TASKS:
        raise ConfigError(f"task '{name}' is unknown: choose one of {', '.join(TASKS)}")
    return TASKS[name]
