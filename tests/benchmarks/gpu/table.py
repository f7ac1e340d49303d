"""One table of what `gpu.sh` measured: `python -m tests.benchmarks.gpu.table FOLDER`, which holds a JSON file per part.

Exits with status 1 if a row stays empty because a part ran out of time or failed.
"""

from __future__ import annotations

import fnmatch
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.form import Row, table


@dataclass(frozen=True)
class Asked:
    """A part's ratio, by a pattern for its name, and the highest value allowed; `gpu_only`: not on a CPU."""

    part: str
    pattern: str
    most: float | None = None
    gpu_only: bool = False


ASKED = (
    Asked("loss", "time_vs_liger_*", 1.10, gpu_only=True),
    Asked("loss", "memory_vs_liger_*", 1.10, gpu_only=True),
    Asked("loss", "time_vs_ce_*_*"),
    Asked("loss", "time_vs_dense_[0-9]*"),
    Asked("loss", "memory_vs_dense_[0-9]*", 0.10),
    Asked("step", "offline_vs_sft_time", 1.05),
    Asked("step", "offline_vs_sft_memory", 1.02),
    Asked("step", "online_vs_offline_time"),
    Asked("step", "online_vs_offline_memory"),
    Asked("step", "sparse_vs_dense_time", 1.15),
    Asked("capture", "run_vs_forward_*[!u]", 1.10),
    Asked("capture", "run_waiting_share_*"),
    Asked("feed", "waiting_share"),
    Asked("feed", "fed_vs_resident"),
)
RATES = (("capture", "run", "positions_per_s"), ("feed", "fed", "samples_per_s"))


def collected(folder: Path) -> list[Row]:
    """The rows of the table; an empty one has no `measured`."""
    results = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    rows: list[Row] = []
    for asked in ASKED:
        result = results.get(asked.part, {"ratios": {}, "device": ""})
        found = {name: value for name, value in result["ratios"].items() if fnmatch.fnmatch(name, asked.pattern)}
        on_cpu = " core" in result["device"]  # at tiny sizes, which have no limits
        if not found and asked.gpu_only and on_cpu:
            found = {asked.pattern: "needs a GPU"}
        most = "" if asked.most is None else f"≤ {asked.most:g}"
        rows += [
            {
                "part": asked.part,
                "what": name,
                "measured": value,
                "asked": most,
                "": "" if on_cpu else _verdict(value, asked.most),
            }
            for name, value in (found or {asked.pattern: ""}).items()
        ]
    for part, case, column in RATES:
        found_rows = [row for row in results.get(part, {"rows": []})["rows"] if row.get("case") == case]
        for row in found_rows or [{column: ""}]:
            what = " ".join(str(word) for word in (column, row.get("size", "")) if word)
            rows.append({"part": part, "what": what, "measured": row[column], "asked": "", "": ""})
    return rows


def _verdict(value: float | str, most: float | None) -> str:
    if isinstance(value, str) or most is None:
        return ""
    return "met" if value <= most else "short"


def main() -> None:
    """Print the table."""
    rows = collected(Path(sys.argv[1]))
    print(table(rows))
    empty = [row for row in rows if row["measured"] == ""]
    if empty:
        raise SystemExit(f"{len(empty)} of {len(rows)} rows are empty: see the logs of their parts in {sys.argv[1]}")


if __name__ == "__main__":
    main()
