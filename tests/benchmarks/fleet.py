"""Workers killed and stopped at random, with clocks up to five minutes off, until a cache is complete.

    python -m tests.benchmarks.fleet [--quick] --json FILE

Four workers capture 96 samples in 24 shards with a tiny teacher, into a folder and into a bucket (moto's S3 server).
Each round starts with a fresh output; rounds go on until at least 25 workers have been ended for each kind of output,
by SIGKILL or SIGTERM at random moments. Every cache must have the digest of one made by a single undisturbed process.

`same_digest`: share of the caches that have it. `kills`: workers ended. `redone_shards_per_kill`: shards started more
than once, per worker ended: those it was working on (one being captured, one being written). `lost_shards` must be 0.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from tests.benchmarks.form import Row, finish, parse_arguments
from tests.object_store import object_store
from tests.scripts import fork_script
from tests.teacher_cache.work.fleet import WORKERS, run_fleet
from tests.tiny import write_tiny_llava, write_tiny_set

NAME = "fleet"
SAMPLES, SHARD_SAMPLES = 96, 4
LEASE_SECONDS = 6.0
KILLS = {False: (26, 13), True: (6, 6)}  # per kind of output: in total, and in one round


def main() -> None:
    """Run the rounds and write their results."""
    arguments = parse_arguments(NAME, __doc__ or "")
    wanted, a_round = KILLS[arguments.quick]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fleet-") as scratch, object_store() as variables:
        folder = Path(scratch)
        data = write_tiny_set(folder / "set", SAMPLES, shard_samples=SHARD_SAMPLES)
        settings = [f"data={data}", f"teacher={write_tiny_llava(folder / 'teacher')}", "batch_size=2"]
        alone = fork_script(["cache-teacher", "run", *settings, f"output={folder / 'one'}", "--json"], folder / "log")
        assert alone.ended()[0] == 0
        digest = json.loads(alone.stdout.read_text())["digest"]
        os.environ.update(variables)
        import s3fs

        s3fs.S3FileSystem().mkdir("fleet")
        for kind in ("folder", "bucket"):
            kills = rounds = 0
            while kills < wanted:
                output = f"s3://fleet/c{rounds}" if kind == "bucket" else str(folder / f"c{rounds}")
                made = run_fleet(
                    ["cache-teacher", "work", *settings, f"output={output}"],
                    folder / f"{kind}-{rounds}",
                    shards=SAMPLES // SHARD_SAMPLES,
                    kills=a_round,
                    pause=2.0,
                    lease_seconds=LEASE_SECONDS,
                    seed=rounds,
                    variables={**variables, "LLAVAMOD_STAGING": str(folder / "staging")},
                )
                rounds, kills = rounds + 1, kills + made.kills
                rows.append(
                    {
                        "output": kind,
                        "round": rounds,
                        "SIGKILL": made.signals["SIGKILL"],
                        "SIGTERM": made.signals["SIGTERM"],
                        "statuses": json.dumps({str(key): count for key, count in sorted(made.statuses.items())}),
                        "shards": len(made.captured),
                        "begun": made.begun.total(),
                        "captured": made.captured.total(),
                        "seconds": round(made.seconds, 1),
                        "digest": made.digest,
                        "same": int(made.digest == digest),
                    }
                )
                print(rows[-1], flush=True)
    kills = sum(int(row["SIGKILL"]) + int(row["SIGTERM"]) for row in rows)
    redone = sum(int(row["begun"]) - int(row["shards"]) for row in rows)
    ratios = {
        "same_digest": sum(int(row["same"]) for row in rows) / len(rows),
        "kills": float(kills),
        "redone_shards_per_kill": redone / kills,
        "lost_shards": float(sum(SAMPLES // SHARD_SAMPLES - int(row["shards"]) for row in rows)),
    }
    about = {"workers": WORKERS, "shards": SAMPLES // SHARD_SAMPLES, "lease_seconds": LEASE_SECONDS, "digest": digest}
    finish(NAME, arguments, settings=about, rows=rows, ratios=ratios)


if __name__ == "__main__":
    main()
