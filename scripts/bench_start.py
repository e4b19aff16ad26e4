"""Seconds from the start of a process to the first letter of its answer, as JSON lines.

    python scripts/bench_start.py --runs 7 -- jaxllm run BUNDLE generate --prompt Hello

`cpu_s` is what the process had used by then: on a machine that does other work it says more than
the wall's clock.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path


def one(command: list[str]) -> dict[str, float]:
    """One start of a command."""
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        process.stdout.read(1)
        first = time.perf_counter() - begun
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        ticks = int(fields[11]) + int(fields[12])
        process.stdout.read()
    return {
        "first_s": round(first, 3),
        "cpu_s": round(ticks / os.sysconf("SC_CLK_TCK"), 3),
        "all_s": round(time.perf_counter() - begun, 3),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Print a line a run, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    rows = []
    for _ in range(given.runs):
        rows.append(one(given.command))
        print(json.dumps(rows[-1]), flush=True)
    names = rows[0].keys()
    print(json.dumps({"median": {n: statistics.median(row[n] for row in rows) for n in names}}))


if __name__ == "__main__":
    main()
