"""Claims of workers on shards: small files in the output, each created by exactly one worker.

    CACHE/.work/claims/SHARD~G          the G-th claim on a shard, G = 1, 2, …: {"worker": its name}
    CACHE/.work/claims/SHARD~G~ended    how the worker gave it up: {"worker", "host", "how", "reason"}

A claim is never changed. The latest one counts, and whoever creates the next takes the shard over: a worker that was
presumed dead finds a later claim than its own, and gives up. A shard's claims are removed once it is committed.
"""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Literal

from llavamod_offline.storage.folders import Folder
from teacher_cache.work.heartbeat import WORK_NAME, read_present

_CLAIMS = f"{WORK_NAME}/claims"
_ENDED = "ended"
_DEATHS_PER_FAILURE = 5  # a worker usually dies because of its machine, not of what it captures

How = Literal["released", "failed"]


@dataclass(frozen=True)
class Ending:
    """How a worker gave up a claim."""

    worker: str
    host: str
    how: How
    reason: str = ""


@dataclass
class ShardHistory:
    """The claims on an uncommitted shard: the number of the latest, and those that were given up."""

    latest: int = 0
    given_up: set[int] = field(default_factory=set)
    endings: list[Ending] = field(default_factory=list)

    @property
    def is_held(self) -> bool:
        """Whether the latest claim was not given up, though its worker may be dead."""
        return self.latest > 0 and self.latest not in self.given_up

    @property
    def failures(self) -> list[Ending]:
        """The claims that ended with an error."""
        return [ending for ending in self.endings if ending.how == "failed"]

    def attempts(self, *, dead: bool) -> int:
        """How often the shard has failed, several worker deaths counting as one; `dead`: the last worker died too."""
        deaths = self.latest - len(self.given_up) - (self.is_held and not dead)
        return len(self.failures) + deaths // _DEATHS_PER_FAILURE


class Claims:
    """The claims in an output, and those of one worker."""

    def __init__(self, folder: Folder, worker: str) -> None:
        self._folder = folder
        self._worker = worker
        self._mine: dict[str, int] = {}

    @property
    def held(self) -> list[str]:
        """The shards that this worker has claimed."""
        return list(self._mine)

    def look(self) -> dict[str, ShardHistory]:
        """All shards with claims; their endings are not read."""
        return histories(self._folder)

    def take(self, shard: str, after: int) -> bool:
        """Claim a shard whose latest claim is number `after` (0: none); False if another worker was faster."""
        name = f"{_CLAIMS}/{shard}~{after + 1}"
        if not self._folder.create(name, json.dumps({"worker": self._worker}).encode()):
            return False
        self._mine[shard] = after + 1
        return True

    def adopt(self, shard: str, number: int) -> None:
        """Hold a claim that this worker made without knowing it, because a reply was lost."""
        self._mine[shard] = number

    def is_mine(self, shard: str) -> bool:
        """Whether this worker's claim is still the latest."""
        history = self.look().get(shard)
        return history is not None and history.latest == self._mine.get(shard) and history.is_held

    def worker_of(self, shard: str, number: int) -> str | None:
        """The worker that made a claim; None if it is gone."""
        (content,) = read_present(self._folder, [f"{_CLAIMS}/{shard}~{number}"])
        try:
            return None if content is None else str(json.loads(content)["worker"])
        except (ValueError, KeyError, TypeError):
            return ""  # no worker's name: it can be taken over after a lease

    def end(self, shard: str, how: How, reason: str = "") -> None:
        """Give up a shard."""
        number = self._mine.pop(shard)
        ending = Ending(self._worker, platform.node(), how, reason)
        content = json.dumps(asdict(ending), ensure_ascii=False).encode()
        self._folder.create(f"{_CLAIMS}/{shard}~{number}~{_ENDED}", content)

    def drop(self, shard: str) -> None:
        """Forget a claim that another worker has taken over."""
        self._mine.pop(shard, None)

    def clear(self, shard: str) -> None:
        """Remove all claims on a shard that is committed."""
        clear_claims(self._folder, [shard], self.look())
        self._mine.pop(shard, None)


def histories(folder: Folder) -> dict[str, ShardHistory]:
    """All shards with claims; their endings are not read."""
    found: dict[str, ShardHistory] = defaultdict(ShardHistory)
    for name in folder.names(_CLAIMS):
        claim = name.removesuffix(f"~{_ENDED}")
        shard, _, number = claim.rpartition("~")
        if name.startswith(".") or not number.isdigit():
            continue
        history = found[shard]
        history.latest = max(history.latest, int(number))
        if claim != name:
            history.given_up.add(int(number))
    return dict(found)


def read_endings(folder: Folder, shards: dict[str, ShardHistory]) -> None:
    """Read how the claims on some shards were given up."""
    for shard, history in shards.items():
        names = [f"{_CLAIMS}/{shard}~{number}~{_ENDED}" for number in sorted(history.given_up)]
        history.endings = [_ending(content) for content in read_present(folder, names) if content]


def _ending(content: bytes) -> Ending:
    """How a claim was given up; as much as can be read of a damaged file, or another version's."""
    try:
        told = json.loads(content)
        return Ending(**{name: str(told[name]) for name in ("worker", "host", "how", "reason") if name in told})  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return Ending("", "", "failed", "its file in .work/claims cannot be read")


def clear_claims(folder: Folder, shards: Iterable[str], there: dict[str, ShardHistory]) -> None:
    """Remove all claims on some shards."""
    for shard in shards:
        history = there.get(shard, ShardHistory())
        numbers = range(1, history.latest + 1)
        folder.remove_files(f"{_CLAIMS}/{shard}~{number}~{_ENDED}" for number in history.given_up)
        folder.remove_files(f"{_CLAIMS}/{shard}~{number}" for number in numbers)
