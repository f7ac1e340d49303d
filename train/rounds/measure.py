"""How far a student is from its teacher on answers that it wrote itself, from their log-probs alone.

For tokens that the student drew at temperature 1, the mean of log π_student − log π_teacher is an unbiased estimate of
the reverse KL at their positions. The set holds the student's log-probs, its cache the teacher's.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import DataError
from teacher_cache.read.reader import open_cache


@dataclass(frozen=True)
class OwnAnswers:
    """Means over the tokens of a student's own answers.

    `reverse_kl`: KL(student ‖ teacher) in nats per token, with its standard error over answers. `length`: tokens per
    answer. `answers`: how many were measured; `rejected`: those that did not end or could not be used; `reread`: those
    whose text tokenizes differently from what was written, which are left out as well.
    """

    reverse_kl: float
    standard_error: float
    length: float
    answers: int
    rejected: int
    reread: int


def measure_own_answers(data: Path, cache_path: Path) -> OwnAnswers:
    """Measure a set of own answers, captured with the teacher. Errors: `DataError` if none can be used."""
    samples, cache = SampleSet.open(data), open_cache(cache_path)
    sums, lengths, reread = [], [], 0
    for row in range(len(samples)):
        sample = samples.read(row)
        if sample.generated is None or (sample.key, "response") not in cache:
            continue
        found = [own for own in sample.generated.behaviour_log_probs if own]
        if len(found) < len(sample.generated.behaviour_log_probs) or not found:
            reread += 1
            continue
        (own,) = found  # the last turn
        targets = cache.targets([(sample.key, "response")])
        scores_N = targets.target_log_probs_N[targets.target_ids_N >= 0].double().numpy()[-len(own) :]
        sums.append(float(np.sum(own) - scores_N.sum()))
        lengths.append(len(own))
    if not lengths:
        raise DataError(f"set '{data}': no answer can be measured: see {data}/rejected.jsonl, or use other prompts")
    sums_S, lengths_S = np.array(sums), np.array(lengths)
    mean = sums_S.sum() / lengths_S.sum()
    spread = math.sqrt(((sums_S - mean * lengths_S) ** 2).sum()) / float(lengths_S.sum())
    rejected = int(samples.manifest["rejected"])
    return OwnAnswers(float(mean), spread, float(lengths_S.mean()), len(lengths), rejected, reread)


def scores(folder: Path, tasks: list[str]) -> dict[str, float]:
    """Read each benchmark's headline below a round's `eval` folder."""
    found = {}
    for task in tasks:
        score = json.loads((folder / task / "score.json").read_text())
        name = score["headlines"][0]
        found[f"{task} {name}"] = score["metrics"][name]
    return found
