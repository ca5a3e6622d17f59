#!/usr/bin/env python3
"""What only long runs show: memory and open files that stay flat, and a long score that is killed and goes on.

    python3 scripts/endurance.py rows --rows 1000000    score so many rows twice, once killed and resumed; the outputs must be equal
    python3 scripts/endurance.py loop --minutes 60      long runs of `ares run` on the suite's pair until the time is over

Prints one JSON; ends with 1 where outputs differ or a limit is passed. Linux only: it reads /proc.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "models/framing"


class Watched:
    """A process and what it holds, sampled: seconds since its start, resident megabytes, open files."""

    def __init__(self, words, errors, folder=None):
        self.begin, self.samples = time.time(), []
        self.child = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL, stderr=errors, cwd=folder)

    def sample(self):
        try:
            status = Path(f"/proc/{self.child.pid}/status").read_text()
            resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
            files = len(os.listdir(f"/proc/{self.child.pid}/fd"))
        except (FileNotFoundError, IndexError, ProcessLookupError):
            return  # it has just ended
        self.samples.append((round(time.time() - self.begin, 1), resident, files))

    def wait(self, until=None, every=0.5):
        """The exit code, or None where `until` seconds passed first."""
        while self.child.poll() is None:
            self.sample()
            if until is not None and time.time() - self.begin > until:
                return None
            time.sleep(every)
        return self.child.returncode

    def kill(self):
        self.child.send_signal(signal.SIGKILL)
        self.child.wait()


def rows(options, work):
    """Score a million rows undisturbed, then again with one kill in the middle."""
    texts = [json.loads(line) for name in ("gate", "test") for line in (SUITE / f"{name}.jsonl").open()]
    texts = [row for row in texts if "safe" in row]
    rng, source = random.Random(1), work / "rows.jsonl"
    with source.open("w") as out:
        for number in range(options.rows):
            row = rng.choice(texts)
            out.write(json.dumps({"id": number, "prompt": row["prompt"], "response": row["safe"].split(".")[0] + f", {number}."}) + "\n")
    command = [options.ares, "-q", "score", "--reward", SUITE / "reward", "-i", source]
    with (work / "errors.txt").open("w") as errors:
        whole = Watched([*command, "-o", work / "whole.jsonl"], errors)
        code = whole.wait()
        first = Watched([*command, "-o", work / "resumed.jsonl"], errors)
        killed = first.wait(until=(time.time() - whole.begin) * rng.uniform(0.3, 0.6)) is None
        first.kill()
        kept = sum(1 for _ in (work / "resumed.jsonl.part").open("rb")) if killed else None
        second = Watched([*command, "-o", work / "resumed.jsonl", "--resume"], errors)
        code = code or second.wait()
    equal = code == 0 and subprocess.run(["cmp", work / "whole.jsonl", work / "resumed.jsonl"]).returncode == 0
    peaks = [round(max(resident for _, resident, _ in run.samples)) for run in (whole, first, second)]
    return {"rows": options.rows, "exit": code, "killed_after_rows": kept, "equal": equal, "peak_mb": peaks,
            "seconds": whole.samples[-1][0]}, equal and killed and max(peaks) <= options.megabytes


def loop(options, work):
    """Runs with the experiment's settings but longer searches and repairs; each one's second half is held against its first."""
    config, runs, until = (ROOT / "benches/evidence.toml").read_text(), [], time.time() + 60 * options.minutes
    for key, value in {"queries": 6000, "steps": 400}.items():
        config = re.sub(rf"^{key} = .*$", f"{key} = {value}", config, count=1, flags=re.MULTILINE)
    (work / "run.toml").write_text(config + "\n[rounds]\nrounds = 8\n")
    with (work / "errors.txt").open("w") as errors:
        while time.time() < until:
            run = Watched([options.ares, "-q", "run", work / "run.toml", "--out", work / f"run-{len(runs)}"], errors, folder=SUITE)
            code, half = run.wait(), len(run.samples) // 2
            halves = run.samples[:half], run.samples[half:]
            runs.append({"exit": code, "seconds": run.samples[-1][0],
                         "peak_mb": [round(max(resident for _, resident, _ in part)) for part in halves],
                         "median_mb": [round(statistics.median(resident for _, resident, _ in part)) for part in halves],
                         "open_files": [max(files for _, _, files in part) for part in halves]})
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    # A run keeps the records of its searches, some ten megabytes a round at this size; nothing else may grow.
    flat = all(run["open_files"][1] <= run["open_files"][0] + 1 and run["peak_mb"][1] <= 1.1 * run["peak_mb"][0] for run in runs)
    return {"runs": runs}, flat and all(run["exit"] in (0, 3) for run in runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "loop"))
    parser.add_argument("--ares", type=lambda path: Path(path).resolve(), default=ROOT / "target/release/ares")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--megabytes", type=int, default=300, help="limit of resident memory of a score")
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ares-endurance-") as work:
        found, fine = {"rows": rows, "loop": loop}[options.what](options, Path(work))
    print(json.dumps(found, indent=1))
    sys.exit(0 if fine else 1)


main()
