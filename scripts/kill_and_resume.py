#!/usr/bin/env python3
"""Kills runs of ares with SIGKILL at random moments, resumes them until they end, and holds what they leave against an undisturbed run.

    python scripts/kill_and_resume.py --ares target/release/ares --runs 100 -- demo --quick
    python scripts/kill_and_resume.py --rows -- score --reward models/framing/reward -i models/framing/retain.jsonl

The words after `--` are a command that makes a run directory, without --out, or with --rows one that makes a file of rows, without
--output. After each kill, what bears its final name must be whole; in the end, every file that the undisturbed run leaves must have come
out the same, times aside, and no other be there; journals and receipts differ by nature. Ends with 1 where that fails.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

TIMES = {"seconds", "tokens_per_second", "seconds_per_failure", "started"}
ROWS = "rows.jsonl"
OWN = {"journal.jsonl", "run.toml", ".lock", "report.html"}


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def content(path):
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes()


def files(folder):
    """What a run leaves, by its place in the folder."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in OWN)
    return {str(path.relative_to(folder)): content(path) for path in found}


def halves(folder, rows):
    """Files that bear their final names and are not whole. What grows by lines (the journal, say) may end in half a line; the rows of
    a row command are written beside their final name until they are all there."""
    def whole(path):
        try:
            if path.suffix == ".safetensors":
                data = path.read_bytes()
                header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
                ends = [of["data_offsets"][1] for name, of in header.items() if name != "__metadata__"]
                return len(data) == 8 + int.from_bytes(data[:8], "little") + max(ends)
            if path.suffix == ".toml":
                return bool(tomllib.loads(path.read_text()))
            if path.suffix == ".html":
                return path.read_text().rstrip().endswith("</html>")
            return path.suffix != ".json" or json.loads(path.read_text()) is not None
        except (ValueError, IndexError):
            return False
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return [path.name for path in found if not whole(path) or (rows and path.name == ROWS)]


def damage(folder, rng):
    """Tears the journal's last line, or takes a checkpoint away: what a failing disk does."""
    journal, checkpoints = folder / "journal.jsonl", list((folder / "checkpoints").glob("*"))
    if rng.random() < 0.3 and journal.is_file() and journal.stat().st_size > 0:
        os.truncate(journal, journal.stat().st_size - rng.randrange(1, min(200, journal.stat().st_size) + 1))
        return "torn"
    if rng.random() < 0.3 and checkpoints:
        rng.choice(checkpoints).unlink()
        return "missing"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ares", default="target/release/ares")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", action="store_true", help="the command writes a file of rows")
    parser.add_argument("--damage", action="store_true", help="also tear journals and remove checkpoints between a kill and a resume")
    parser.add_argument("--threads", action="store_true", help="resume with another number of threads each time")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = [word for word in options.command if word != "--"]
    rng, work = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="ares-kill-"))

    def start(words, resumed=False):
        threads = str(rng.choice([1, 2, 3])) if options.threads and resumed else os.environ.get("RAYON_NUM_THREADS", "")
        environment = dict(os.environ, **({"RAYON_NUM_THREADS": threads} if threads else {}))
        with open(work / "errors.txt", "w") as errors:
            return subprocess.Popen([options.ares, *words], stdout=subprocess.DEVNULL, stderr=errors, env=environment)

    def words(folder):
        """The command that begins in `folder` or goes on there, and whether it goes on."""
        if options.rows:
            folder.mkdir(exist_ok=True)
            done = (folder / f"{ROWS}.part").is_file()
            return [*command, "-o", str(folder / ROWS), *(["--resume"] if done else [])], done
        done = folder.is_dir() and (folder / "run.toml").is_file()
        return [command[0], "--resume", str(folder)] if done else [*command, "--out", str(folder)], done

    begin = time.time()
    if start(*words(work / "whole")).wait() not in (0, 3):
        sys.exit("the undisturbed run failed: " + (work / "errors.txt").read_text()[-2000:])
    length, expected = time.time() - begin, files(work / "whole")
    counts, wrong = {"kills": 0, "half": 0, "torn": 0, "missing": 0}, 0
    for number in range(options.runs):
        folder = work / f"run-{number}"
        while True:
            child = start(*words(folder))
            try:
                # Some are left to end: else a run could be killed for ever.
                code = child.wait(timeout=rng.uniform(0.05, 1.5 * length) if rng.random() < 0.7 else None)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                child.wait()
                counts["kills"] += 1
                half = halves(folder, options.rows)
                counts["half"] += len(half)
                if half:
                    print(f"run {number}: half under a final name: {half}", flush=True)
                what = damage(folder, rng) if options.damage and folder.is_dir() else None
                counts.update({what: counts[what] + 1} if what else {})
                continue
            break
        found = files(folder) if code in (0, 3) else {}
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if differing or code not in (0, 3):
            wrong += 1
            print(f"run {number}: exit {code}; not the same: {differing}; kept in {folder}", flush=True)
            print((work / "errors.txt").read_text()[-2000:], flush=True)
        else:
            shutil.rmtree(folder)
    kept = f"; what is wrong is kept in {work}" if wrong else ""
    print(f"{' '.join(command)[:60]}: {options.runs} runs of {length:.1f} s, {counts}, {wrong} differ{kept}")
    if not wrong:
        shutil.rmtree(work)
    sys.exit(1 if wrong or counts["half"] else 0)


main()
