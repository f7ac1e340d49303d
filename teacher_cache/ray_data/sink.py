"""Captured sequences of a Ray Data pipeline as a cache: each shard is committed as soon as its rows are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ray.data.block import BlockAccessor
from ray.data.datasource import Datasink

from llavamod_offline.data.sample import ROLES_OF_KIND
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import DataError, LlavaModError, first_line
from llavamod_offline.signals import keeping
from llavamod_offline.storage.folders import absolute
from llavamod_offline.storage.lock import locked
from teacher_cache.capture.rejection_limit import Rejected
from teacher_cache.capture.shard import located
from teacher_cache.capture.summary import Summary, Tally
from teacher_cache.capture_setup import prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.fingerprint import check_allowed
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.schema import Codec
from teacher_cache.ray_data.rows import Row, by_shard, outcome_of
from teacher_cache.ray_data.source import source_of
from teacher_cache.ray_data.teacher import placed_values
from teacher_cache.work.heartbeat import check_no_workers
from teacher_cache.write.store import CacheStore

LEFT_OUT = "left out: a filter before the teacher removed its sample"


class Committed(NamedTuple):
    """What a shard holds, without what a filter removed."""

    sequences: int
    positions: int
    rejected: list[Rejection]


class CacheSink(Datasink[list[Committed]]):
    """Commits shards of a set to a cache, from whatever machine their rows are on."""

    def __init__(
        self, samples: SampleSet, output: str, fingerprint: Mapping[str, Any], codec: Codec, allow: Sequence[str]
    ) -> None:
        self.samples, self.output = samples, output
        self._fingerprint, self._codec, self._allow = fingerprint, codec, tuple(allow)
        self.written: list[Committed] = []

    def get_name(self) -> str:
        """The name that Ray shows."""
        return "Cache"

    def store(self) -> CacheStore:
        """The cache."""
        return CacheStore.open(self.output, self._fingerprint, self.samples.shard_names, allow=self._allow)

    def write(self, blocks: Iterable[Any], ctx: Any) -> list[Committed]:
        """Commit the shards of some blocks. Errors: `DataError` if the rows of one are not all there."""
        rows: list[Row] = []
        for block in blocks:
            rows += BlockAccessor.for_block(block).iter_rows(public_row_format=True)
        shards = by_shard(rows)
        for shard, own in shards.items():
            expected = int(own[0].get("shard_rows", 0))
            if len({(str(row["key"]), str(row["role"])) for row in own}) != expected or len(own) != expected:
                raise DataError(
                    f"ray_data: shard '{shard}': {len(own)} rows arrived together of the {expected} that left the "
                    "teacher: filter before it, and keep every row once after it"
                )
        return [self.commit(shard, own) for shard, own in shards.items()]

    def commit(self, shard: str, rows: Sequence[Row]) -> Committed:
        """Commit one shard: its sequences, and as rejected those that the teacher or a filter left out."""
        found = {(str(row["key"]), str(row["role"])): outcome_of(row) for row in rows}
        captured, rejected, refused = [], [], []
        for number in self.samples.rows_of(shard):
            key = self.samples.key_of(number)
            for role in self._roles(number):
                outcome = found.pop((key, role), None)
                if outcome is None:
                    rejected.append(located(Rejection(key, role, LEFT_OUT), self.samples, number))
                elif isinstance(outcome, Rejection):
                    rejected.append(located(outcome, self.samples, number))
                    refused.append(rejected[-1])
                else:
                    captured.append(outcome)
        if found:
            key, role = next(iter(found))
            raise DataError(f"ray_data: shard '{shard}' has no sample '{key}' with role '{role}': leave keys unchanged")
        self.store().commit(shard, captured, rejected, self._codec)
        return Committed(len(captured), sum(len(item.records) for item in captured), refused)

    def on_write_complete(self, write_result: Any) -> None:
        """Keep what the write tasks did."""
        self.written = [shard for shards in write_result.write_returns if shards for shard in shards]

    def _roles(self, number: int) -> tuple[str, ...]:
        kind = str(self.samples.index.column("kind")[number])
        more = ("mismatched",) if self.samples.mismatched and kind != "conversation" else ()
        return (*ROLES_OF_KIND[kind], *more)


def write_cache(captured: Any, config: CacheTeacherConfig, *, allow: Sequence[str] = ()) -> Summary:
    """Run a pipeline of `read_set`, `capture` and a user's steps, and write its sequences to the cache `config.output`.

    A shard is committed as soon as its rows arrive: a stopped pipeline continues with `read_set(…, missing_in=output)`.
    Samples that a filter removed are listed in rejected.jsonl. `allow`: as in `run_capture`.
    Errors: as `run_capture`; `DataError` if rows were changed, lost or doubled on the way.
    """
    import ray

    values, _ = placed_values(config)
    setup = prepare_capture(**values)
    check_allowed(allow, setup.fingerprint)
    read = source_of(captured).shards
    tally = Tally(Rejected())
    limited = Rejected(config.max_rejected)
    output = absolute(config.output)
    sink = CacheSink(setup.samples, output, setup.fingerprint, setup.codec, allow)
    captured.context.raise_original_map_exception = True  # Ray's own wrapper loses the cause on the way here
    with locked(config.output):
        check_no_workers(config.output)
        store = sink.store()
        with keeping(lambda: store.kept):
            store.start()
            if config.max_rejected is not None:  # a rerun counts what an earlier one rejected
                before, rejected = store.outcomes()
                limited.add(before, [item for item in rejected if item.reason != LEFT_OUT])
                limited.check(config.output, last=not store.missing())
            try:
                if read:
                    captured.write_datasink(sink)
            except ray.exceptions.RayError as error:
                if (own := _own(error)) is None:
                    raise
                raise own from error
            # Shards of which a filter left nothing.
            sink.written += [sink.commit(name, []) for name in store.missing() if name in set(read)]
            for done in sink.written:
                tally.add(done.sequences, done.positions, done.rejected)
                limited.add(done.sequences, done.rejected)
            limited.check(config.output, last=True)
            return tally.summary(store, config.output)


def _own(error: BaseException) -> LlavaModError | None:
    """The `LlavaModError` that caused an error of Ray's, if any, without the lines that Ray adds."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None) or seen.__cause__
        if isinstance(cause, LlavaModError):
            cause.args = (first_line(cause),)
            return cause
        seen = cause
    return None
