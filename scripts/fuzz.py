#!/usr/bin/env python3
"""Coverage-guided fuzzing of everything that reads files of others (`src/fuzz.rs`), by libFuzzer on stable Rust.

    python3 scripts/fuzz.py                          # every format in turn, until it is interrupted
    python3 scripts/fuzz.py --formats rows csv --hours 1

What was found stays in target/fuzz and is the next call's beginning; FORMAT.json there counts its seconds and inputs so
far. An input that crashes, takes longer than 5 s or more than 4 GiB is kept as target/fuzz/FORMAT-crash-…: mend what it broke, then move
it to fuzz/seeds/FORMAT under a name that says what it did. Exit code 1 if there is one.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "target/fuzz"
HOST = "x86_64-unknown-linux-gnu"
# What cargo-fuzz gives the compiler, without a sanitizer: those need a nightly one, and nearly all that is fuzzed here is safe code.
COVERAGE = ["--cfg=fuzzing", "-Cpasses=sancov-module", "-Cllvm-args=-sanitizer-coverage-level=4", "-Ccodegen-units=16",
            "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters", "-Cllvm-args=-sanitizer-coverage-pc-table",
            "-Cllvm-args=-sanitizer-coverage-trace-compares"]
# Long inputs find little that short ones do not, and slowly.
LONGEST = 65536


def built():
    # With --target: what runs while it is built must not be measured.
    command = ["cargo", "build", "--release", "--manifest-path", "fuzz/Cargo.toml", "--target", HOST, "--target-dir", "target/fuzz/build"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "RUSTFLAGS": " ".join(COVERAGE)})
    return PLACE / f"build/{HOST}/release/ares-fuzz"


def fuzz(program, name, seconds):
    """Returns the seconds of computing, the inputs tried, and the edges reached."""
    corpus = PLACE / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-timeout=5", "-rss_limit_mb=4096", f"-max_len={LONGEST}", "-print_final_stats=1",
               f"-artifact_prefix={PLACE}/{name}-", "-verbosity=1"]
    environment = {**os.environ, "ARES_FUZZ": name, "ARES_FUZZ_CORPUS": str(corpus), "RAYON_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        environment["TMPDIR"] = folder
        found = subprocess.run([program, *options, corpus], env=environment, capture_output=True, text=True, errors="replace")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (PLACE / f"{name}.log").write_text(found.stderr[-200000:])
    tried = re.search(r"number_of_executed_units:\s*(\d+)", found.stderr)
    edges = re.findall(r"cov: (\d+)", found.stderr)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, int(tried[1]) if tried else 0, int(edges[-1]) if edges else 0


def so_far(name):
    file = PLACE / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {"seconds": 0, "inputs": 0}


def crashes():
    return sorted(file.name for file in PLACE.glob("*-*") if re.search(r"-(crash|timeout|oom|leak)-", file.name))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", help="which; all of them by default")
    parser.add_argument("--hours", type=float, default=float("inf"), help="of this call")
    parser.add_argument("--turn", type=int, default=60, help="seconds a format is fuzzed before the next one's turn")
    parser.add_argument("--keep-going", action="store_true", help="also after a crash")
    options = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    program, end = built(), time.time() + options.hours * 3600
    known = subprocess.run([program], capture_output=True, text=True).stdout.split()
    while time.time() < end and (options.keep_going or not crashes()):
        tally = {name: so_far(name) for name in known}
        # Whoever has had least comes next.
        name = min(options.formats or known, key=lambda name: tally[name]["seconds"])
        seconds, tried, edges = fuzz(program, name, options.turn)
        mine = {"seconds": round(tally[name]["seconds"] + seconds, 1), "inputs": tally[name]["inputs"] + tried, "edges": edges}
        # Whole at once: others that fuzz beside this one read it.
        (PLACE / f"{name}.new").write_text(json.dumps(mine) + "\n")
        (PLACE / f"{name}.new").replace(PLACE / f"{name}.json")
        hours = sum(of["seconds"] for of in {**tally, name: mine}.values()) / 3600
        print(f"{name:15} {tried:8} inputs  {edges:6} edges  {hours:6.2f} h in all  {len(crashes())} kept", flush=True)
    if crashes():
        print("\n".join(crashes()), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
