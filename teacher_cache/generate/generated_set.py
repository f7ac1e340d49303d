"""A set of a teacher's own answers while it is being written: a file of answers for each shard, then the set.

The answers are kept next to the set in `.NAME.answers/`: `job.json` (what they are made from) and a JSON Lines file
for each finished shard, all written atomically. Once all are there, the set is packed from them and renamed into place,
and the folder is removed. A rerun reads the same files, so it packs the same set.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.rows import Located, RejectedRow, RejectionKind
from llavamod_offline.data.sample import Generated, Sample, Turn
from llavamod_offline.data.sets.sample_set import MANIFEST_NAME, SampleSet
from llavamod_offline.errors import ConfigError, DataError, EmptySetError
from llavamod_offline.storage import atomic
from teacher_cache.config import GenerateConfig
from teacher_cache.fingerprint import differences, without_tokens
from teacher_cache.format.manifest import canonical

Turns = Literal["last", "all"]
Made = Callable[[Sample, "AnsweredSample"], Sample]
_JOB_NAME = "job.json"


@dataclass(frozen=True)
class AnsweredSample:
    """The outcome of one sample: the texts of its written turns, or why it has none.

    `log_probs`: see `Generated.behaviour_log_probs`. `tokens`: how many were written. `copy`: which of several answers
    to the sample's prompt this is.
    """

    key: str
    texts: tuple[str, ...] = ()
    log_probs: tuple[tuple[float, ...] | None, ...] = ()
    tokens: int = 0
    kind: RejectionKind | None = None
    reason: str = ""
    copy: int = 0

    @property
    def retokenised(self) -> bool:
        """Whether a text tokenizes differently from what was written."""
        return None in self.log_probs

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> AnsweredSample:
        """Read what `asdict` gave, or an earlier version's, which kept no log-probs."""
        log_probs = tuple(None if own is None else tuple(own) for own in row.get("log_probs", ()))
        known = {name: value for name, value in row.items() if name != "retokenised"}
        return cls(**{**known, "texts": tuple(row["texts"]), "log_probs": log_probs})


# The sections of a capture's fingerprint that also determine the answers.
_ABOUT = ("tokenizer", "template", "sequence", "images", "teacher", "engine", "data")


def made_from(fingerprint: Mapping[str, Any], given: GenerateConfig) -> dict[str, Any]:
    """What answers are made from: the sections of their writer's fingerprint, and the settings of the writing."""
    return without_tokens({**{name: fingerprint[name] for name in _ABOUT}, "generate": given.described})


def begun_answers(path: Path) -> dict[str, Any] | None:
    """What the answers of a set, finished or begun, were made from; None if none can be read."""
    manifest = path / MANIFEST_NAME
    try:
        file = manifest if manifest.is_file() else _answers(path) / _JOB_NAME
        content: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None  # opening it reports what is wrong
    found: dict[str, Any] | None = content.get("generated") if manifest.is_file() else content
    return found


def _answers(path: Path) -> Path:
    return path.with_name(f".{path.name}.answers")


class WrittenSet:
    """The set folder `path`, finished or not, and its answers; `about` says what they are made from.

    Errors: `ConfigError` if a set made with other settings, finished or begun, is already there.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, allow: Sequence[str] = ()) -> None:
        self.path = path
        self.about: dict[str, Any] = json.loads(canonical(about))  # in the order that a rerun will read
        self._folder = _answers(path)
        if self.finished:
            manifest = _read_json(path / MANIFEST_NAME, f"remove {path} and run again")
            if "generated" not in manifest:
                raise ConfigError(f"output_set: '{path}' is not a generated set: choose another folder")
            self.about = _same(manifest["generated"], about, allow, f"set '{path}' was generated")
            shutil.rmtree(self._folder, ignore_errors=True)  # a kill may have left it
        elif path.exists():
            raise ConfigError(f"output_set: '{path}' exists and is not a set: choose another folder")
        elif (self._folder / _JOB_NAME).exists():
            begun = _read_json(self._folder / _JOB_NAME, f"remove {self._folder} and run again")
            self.about = _same(begun, about, allow, f"set '{path}' was begun")

    @property
    def finished(self) -> bool:
        """Whether the set is there."""
        return (self.path / MANIFEST_NAME).is_file()

    def missing(self, shards: Sequence[str]) -> list[str]:
        """The shards of the source without answers."""
        return [] if self.finished else [name for name in shards if not self._file(name).exists()]

    def kept(self, shards: Sequence[str]) -> str:
        """What a stopped writer has kept, for its last message; empty if nothing."""
        done = len(shards) - len(self.missing(shards))
        return f"the answers to {done} of {len(shards)} shards are kept for {self.path}" if done else ""

    def begin(self) -> None:
        """Record what the answers are made from, or check another process's record. Errors: `ConfigError`,
        `DataError`."""
        job = self._folder / _JOB_NAME
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not atomic.create_file(job, canonical(self.about)):
                there = _read_json(job, f"remove {self._folder} and run again")
                _same(there, self.about, (), f"set '{self.path}' was begun")
        except OSError as error:
            raise self._not_kept(error) from error

    def commit(self, shard: str, answers: Sequence[AnsweredSample]) -> None:
        """Keep the answers of a shard. Errors: `DataError` if they cannot be written."""
        lines = [json.dumps(asdict(answer)) + "\n" for answer in answers]
        try:
            atomic.write_file(self._file(shard), "".join(lines))
        except OSError as error:
            raise self._not_kept(error) from error

    def _not_kept(self, error: OSError) -> DataError:
        return DataError(
            f"output_set '{self.path}': answers cannot be kept in {self._folder}: {error.strerror or error}: "
            "free disk space or fix permissions, then rerun to resume"
        )

    def finish(self, source: SampleSet, made: Made, *, max_rejected: float | None = None) -> None:
        """Pack the set from the answers, which must be complete; `made` makes its samples, see `written_sample`.

        Errors: `DataError` if no answer makes a sample, `ConfigError` if more than `max_rejected` are rejected.
        """
        if self.finished:
            return
        weights, licences = (source.manifest.get(name) or {} for name in ("weights", "licences"))
        left = self._left(source) if weights or licences else set()
        try:
            write_set(
                self._rows(source, made),
                self.path,
                generated=self.about,
                max_rejected=max_rejected,
                weights={name: weight for name, weight in weights.items() if name in left},
                licences={name: licence for name, licence in licences.items() if name in left},
                max_side=source.manifest.get("max_side"),
            )
        except EmptySetError as error:
            raise DataError(
                f"output_set: {error}; to write answers with other settings, remove {self._folder} or choose another "
                "output_set"
            ) from error
        shutil.rmtree(self._folder, ignore_errors=True)

    def _left(self, source: SampleSet) -> set[str]:
        """The sources of the prompts' set that have samples in the new set."""
        names = source.index.column("source")
        found = (pair for shard in source.shard_names for pair in self._answers_of(source, shard))
        return {names[row].as_py() for answer, row in found if not answer.kind}

    def _rows(self, source: SampleSet, made: Made) -> Iterator[Located | RejectedRow]:
        for shard in source.shard_names:
            for answer, row in self._answers_of(source, shard):
                sample = source.read(row, verify=True)
                if sample.key != answer.key:
                    raise DataError(
                        f"{self._file(shard)}: not the answers of set '{source.path}': remove {self._folder}"
                    )
                file, number = source.origin_of(row) or (f"{shard}.tar", row)
                if answer.kind is not None:
                    yield RejectedRow(sample.key, answer.kind, answer.reason, file, number)
                else:
                    yield Located(made(sample, answer), file, number)

    def _answers_of(self, source: SampleSet, shard: str) -> Iterator[tuple[AnsweredSample, int]]:
        """The answers to a shard, each with the row of its prompt."""
        answers, rows = self.read(shard), source.rows_of(shard)
        copies = self.about["generate"].get("answers", 1)
        if len(answers) != len(rows) * copies:
            raise DataError(
                f"{self._file(shard)}: holds {len(answers)} of {len(rows) * copies} answers: remove it and run again"
            )
        return zip(answers, (row for row in rows for _ in range(copies)), strict=True)

    def read(self, shard: str) -> list[AnsweredSample]:
        """The answers to a shard. Errors: `DataError` if they cannot be read."""
        file = self._file(shard)
        try:
            return [AnsweredSample.from_json(json.loads(line)) for line in file.read_text().splitlines()]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file}: cannot be read ({error}): remove it and run again") from error

    def _file(self, shard: str) -> Path:
        return self._folder / f"{shard}.jsonl"


def _read_json(file: Path, way_out: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}): {way_out}") from error
    return content


def written_turns(sample: Sample, turns: Turns) -> list[int]:
    """The indices of the assistant turns to write: the last one, or all."""
    places = [place for place, turn in enumerate(sample.turns) if turn.role == "assistant"]
    return places if turns == "all" else places[-1:]


def with_system(sample: Sample, text: str | None) -> Sample:
    """The sample with a system turn of that text, unless it has one."""
    if text is None or any(turn.role == "system" for turn in sample.turns):
        return sample
    at = int(sample.turns[0].role == "tools")  # which come first
    return replace(sample, turns=(*sample.turns[:at], Turn("system", text), *sample.turns[at:]))


def with_texts(turns: Sequence[Turn], places: Sequence[int], texts: Sequence[str]) -> tuple[Turn, ...]:
    """The turns with `texts` at the first of `places`."""
    changed = list(turns)
    for place, text in zip(places, texts, strict=False):
        changed[place] = Turn("assistant", text)
    return tuple(changed)


def written_sample(
    sample: Sample,
    answer: AnsweredSample,
    *,
    given: GenerateConfig,
    teacher: str,
    source: str,
) -> Sample:
    """The sample of the new set; `source` is the old one's digest. Errors: `DataError` if the texts are invalid."""
    sample = with_system(sample, given.system)
    return replace(
        sample,
        key=f"{sample.key}{given.suffix(answer.copy)}",
        turns=with_texts(sample.turns, written_turns(sample, given.turns), answer.texts),
        generated=Generated(
            teacher=teacher,
            set_digest=source,
            key=sample.key,
            turns=given.turns,
            temperature=given.temperature,
            top_p=given.top_p,
            max_new_tokens=given.limit(sample.source)[0],
            seed=given.seed,
            round=given.round,
            behaviour_log_probs=answer.log_probs,
        ),
    )


def _same(there: Mapping[str, Any], now: Mapping[str, Any], allow: Sequence[str], what: str) -> dict[str, Any]:
    """The existing description if it matches. Errors: `ConfigError` with the differing fields side by side."""
    found = differences(there, now, allow=allow)
    if found:
        raise ConfigError(
            f"output_set: {what} with other settings: {'; '.join(found)}: set them back, or choose another folder"
        )
    return dict(there)
