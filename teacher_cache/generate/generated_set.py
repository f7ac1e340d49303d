"""A set of a teacher's own answers in the making: a file of answers for each shard of the source, then the set.

Beside the set to be lies `.NAME.answers/`: `job.json`, what the answers are made from and with, and a JSON Lines file
for each shard that is done, every file written at once or not at all. When all are there the set is packed from them
and renamed into place, and the folder is removed. A new start reads the same files, so it packs the same set.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.rows import Located, RejectedRow, RejectionKind
from llavamod_offline.data.sample import Generated, Sample, Turn
from llavamod_offline.data.sets.sample_set import MANIFEST_NAME, SampleSet
from llavamod_offline.errors import ConfigError, DataError
from llavamod_offline.storage import atomic
from teacher_cache.fingerprint import differences
from teacher_cache.format.manifest import canonical

if TYPE_CHECKING:
    from teacher_cache.config import GenerateConfig

_JOB_NAME = "job.json"


@dataclass(frozen=True)
class AnsweredSample:
    """What became of one sample: the texts of its written turns, or why there are none.

    `tokens`: how many were written. `retokenised`: the texts are read as other tokens than were written.
    """

    key: str
    texts: tuple[str, ...] = ()
    tokens: int = 0
    retokenised: bool = False
    kind: RejectionKind | None = None
    reason: str = ""


class WrittenSet:
    """The set folder `path`, finished or not, and what belongs to it; `about` says what it is made from and with.

    Errors when made: `ConfigError` if there is a set, or the beginning of one, that was made otherwise.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, allow: Sequence[str] = ()) -> None:
        self.path = path
        self.about: dict[str, Any] = json.loads(canonical(about))  # in the order that a new start will read
        self._folder = path.with_name(f".{path.name}.answers")
        if self.finished:
            manifest = json.loads((path / MANIFEST_NAME).read_bytes())
            if "generated" not in manifest:
                raise ConfigError(f"output_set: '{path}' is a set that no teacher wrote: choose another folder")
            self.about = _same(manifest["generated"], about, allow, f"set '{path}' was generated")
            shutil.rmtree(self._folder, ignore_errors=True)  # a kill may have left it
        elif path.exists():
            raise ConfigError(f"output_set: '{path}' exists and is no set: choose another folder")
        elif (self._folder / _JOB_NAME).exists():
            begun = json.loads((self._folder / _JOB_NAME).read_bytes())
            self.about = _same(begun, about, allow, f"set '{path}' was begun")

    @property
    def finished(self) -> bool:
        """Whether the set is there."""
        return (self.path / MANIFEST_NAME).is_file()

    def missing(self, shards: Sequence[str]) -> list[str]:
        """The shards of the source whose answers are still to be written."""
        return [] if self.finished else [name for name in shards if not self._file(name).exists()]

    def commit(self, shard: str, answers: Sequence[AnsweredSample]) -> None:
        """Keep the answers of a shard. Errors: `DataError` if they cannot be written."""
        lines = [json.dumps(asdict(answer)) + "\n" for answer in answers]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / _JOB_NAME).exists():
                atomic.write_file(self._folder / _JOB_NAME, canonical(self.about))
            atomic.write_file(self._file(shard), "".join(lines))
        except OSError as error:
            raise DataError(
                f"output_set '{self.path}': answers cannot be kept in {self._folder}: {error.strerror or error}: "
                "free disk space or get permission to write there, and run again to resume"
            ) from error

    def finish(
        self, source: SampleSet, settings: GenerateConfig, teacher: str, *, max_rejected: float | None = None
    ) -> None:
        """Pack the set, once all answers are there.

        Errors: `DataError` if not one of them makes a sample, or more than the share `max_rejected` make none.
        """
        if self.finished:
            return
        rows = self._rows(source, settings, teacher)
        weights = self._weights(source)
        write_set(rows, self.path, generated=self.about, max_rejected=max_rejected, weights=weights)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _weights(self, source: SampleSet) -> dict[str, float]:
        """How often the samples of a source are seen in training: as in the set of the prompts, where any is left."""
        weights = source.manifest.get("weights") or {}
        if not weights:
            return {}
        origins = source.index.column("source")
        answers = ((self._read(shard), source.rows_of(shard)) for shard in source.shard_names)
        left = {origins[row].as_py() for pair in answers for answer, row in zip(*pair, strict=True) if not answer.kind}
        return {name: weight for name, weight in weights.items() if name in left}

    def _rows(self, source: SampleSet, settings: GenerateConfig, teacher: str) -> Iterator[Located | RejectedRow]:
        for shard in source.shard_names:
            for answer, row in zip(self._read(shard), source.rows_of(shard), strict=True):
                sample = source.read(row, verify=True)
                if sample.key != answer.key:
                    raise DataError(
                        f"{self._file(shard)}: not the answers of set '{source.path}': remove {self._folder}"
                    )
                file = f"{shard}.tar"
                if answer.kind is not None:
                    yield RejectedRow(sample.key, answer.kind, answer.reason, file, row)
                else:
                    written = written_sample(sample, answer.texts, settings, teacher=teacher, source=source.digest)
                    yield Located(written, file, row)

    def _read(self, shard: str) -> list[AnsweredSample]:
        file = self._file(shard)
        try:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            return [AnsweredSample(**{**row, "texts": tuple(row["texts"])}) for row in rows]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file}: cannot be read ({error}): remove it and run again") from error

    def _file(self, shard: str) -> Path:
        return self._folder / f"{shard}.jsonl"


def written_turns(sample: Sample, turns: str) -> list[int]:
    """The places of the assistant's turns that are to be written: the last one, or all."""
    places = [place for place, turn in enumerate(sample.turns) if turn.role == "assistant"]
    return places if turns == "all" else places[-1:]


def with_texts(turns: Sequence[Turn], places: Sequence[int], texts: Sequence[str]) -> tuple[Turn, ...]:
    """The turns with the first of `places` taken by `texts`."""
    changed = list(turns)
    for place, text in zip(places, texts, strict=False):
        changed[place] = Turn("assistant", text)
    return tuple(changed)


def written_sample(
    sample: Sample, texts: Sequence[str], settings: GenerateConfig, *, teacher: str, source: str
) -> Sample:
    """The sample of the new set; `source` is the digest of the old one. Errors: `DataError` if the texts make none."""
    return replace(
        sample,
        key=f"{sample.key}{settings.key_suffix}",
        turns=with_texts(sample.turns, written_turns(sample, settings.turns), texts),
        generated=Generated(
            teacher=teacher,
            set_digest=source,
            key=sample.key,
            turns=settings.turns,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
        ),
    )


def _same(there: Mapping[str, Any], now: Mapping[str, Any], allow: Sequence[str], what: str) -> dict[str, Any]:
    """What is there, if it is what is asked for now. Errors: `ConfigError` with the differing fields side by side."""
    found = differences(there, now, allow=allow)
    if found:
        raise ConfigError(
            f"output_set: {what} with other settings: {'; '.join(found)}: set them back, or choose another folder"
        )
    return dict(there)
