"""Runs the evidence experiment of benches/EVIDENCE.md cell by cell, and applies its decision rules to what is there.

    target/suite-venv/bin/python scripts/evidence.py [--seeds 5] [--hours 12]

Resumable: a suite that is made is not made again, a comparison goes on where it was stopped, and a cell that is done leaves one file in
benches/results/evidence/, from which it is never run again, on another machine either. The result in benches/results/evidence.json names
the cells that are missing. An experiment file that has changed since the first cell is refused.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "benches/evidence.toml"
RESULTS = ROOT / "benches/results/evidence"
PAIRS = ("framing", "flattery")
# Ablations on the first base seeds: name -> (changes of the configuration, words after `ares compare CONFIG`).
ABLATED_SEEDS = 2
SAME = {"methods": '["joint"]', "grid": "[1.5e-3]"}
ABLATIONS = {
    "faulty-replay": (SAME | {"replay": '"replay-faulty.jsonl"', "methods": '["reward", "joint"]'}, []),
    "no-resampling": (SAME | {"resample": "0"}, []),
    "npo-mean": (SAME, ["--sweep", "lambda_npo=0,0.005,0.15"]),
    "npo-sum": (SAME | {"logp": '"sum"'}, ["--sweep", "lambda_npo=0,0.005,0.15"]),
    "uniform-search": (SAME | {"sampler": '"uniform"'}, []),
    "further-under-r0": (SAME | {"further_under": '"original"'}, []),
    "second-seed": ({"seed": "2", "methods": '["policy", "reward", "joint", "sequential"]'}, []),
}
DRAWS = 10_000


def changed(text, changes):
    """The configuration with other values; a key that it lacks is an error."""
    lines = text.splitlines()
    for key, value in changes.items():
        section = {"logp": "[repair]", "sampler": "[probe]", "further_under": "[compare]"}.get(key)
        at = [i for i, line in enumerate(lines) if line.split(" = ")[0] == key]
        if at:
            lines[at[0]] = f"{key} = {value}"
        elif section:
            lines.insert(lines.index(section) + 1, f"{key} = {value}")
        else:
            raise KeyError(key)
    return "\n".join(lines) + "\n"


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Experiment:
    def __init__(self, ares, work, python):
        self.ares, self.work, self.python, self.config = ares, work, python, sha(CONFIG)
        for path in sorted(RESULTS.glob("*.json")):
            then = json.loads(path.read_text())["config"]
            if then != self.config:
                sys.exit(f"{CONFIG}: expected the file that {path.name} was run with, SHA-256 {then[:12]}, found {self.config[:12]}; "
                         f"restore it, or move {RESULTS} away for a new experiment")
        work.mkdir(parents=True, exist_ok=True)

    def suite(self, seed):
        """The folder of a base seed's suite, made if it is not there, and whether it met its bounds; misses stand in suite.log. The
        first base seed's is the committed one, which is not committed unless it does."""
        if seed == 1:
            return ROOT / "models", True
        models = self.work / f"seed-{seed}/models"
        if not (models / "flattery/reward/config.json").exists() or not (models / ".made").exists():
            models.mkdir(parents=True, exist_ok=True)
            with open(models.parent / "suite.log", "w") as log:
                words = [self.python, ROOT / "scripts/make_suite.py", "--seed", str(seed), "--models", models, "--ares", self.ares]
                code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT).returncode
            if not (models / "flattery/reward/config.json").exists():
                sys.exit(f"base seed {seed}: the suite was not made, see {models.parent}/suite.log")
            (models / ".made").write_text(f"{code}\n")
        return models, (models / ".made").read_text().strip() == "0"

    def cell(self, seed, pair, name, changes=None, words=()):
        """Runs or resumes one comparison and keeps what it says."""
        models, within = self.suite(seed)
        out = self.work / f"seed-{seed}/{pair}-{name}"
        config = out.with_suffix(".toml")
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(changed(CONFIG.read_text(), changes or {}))
        if not ((out / "summary.json").exists() and "unfinished" not in json.loads((out / "summary.json").read_text())):
            again = (out / "run.toml").exists()
            line = ["compare", "--resume", out] if again else ["compare", config, *words, "--out", out]
            print(f"{time.strftime('%H:%M:%S')} {'goes on' if again else 'begins'}: {out}", flush=True)
            subprocess.run([self.ares, "-q", *line], cwd=models / pair, check=True)
        summary = json.loads((out / "summary.json").read_text())
        git = lambda *line: subprocess.run(["git", *line], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        result = {"schema": 1, "commit": git("rev-parse", "HEAD"), "date": time.strftime("%Y-%m-%d"), "config": self.config,
                  "device": summary["device"], "processor": processor(), "seed": seed, "pair": pair, "name": name,
                  "suite_within_bounds": within, "splits": summary["splits"],
                  "table": {"before": figures(summary["before"])} | {m["name"]: figures(m) for m in summary["methods"]},
                  "sums": sums(out)}
        RESULTS.mkdir(parents=True, exist_ok=True)
        file_of(seed, pair, name).write_text(json.dumps(result, separators=(",", ":")) + "\n")


def file_of(seed, pair, name):
    return RESULTS / f"seed-{seed}-{pair}-{name}.json"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sums(folder):
    """{arm: {end point: {domain/tactic: [sum, prompts]}}} of one run; all arms are measured on the same prompts."""
    out = {}

    def add(arm, point, row, value):
        cell = out.setdefault(arm, {}).setdefault(point, {}).setdefault(f"{row['domain']}/{row['tactic']}", [0.0, 0])
        cell[0] += float(value)
        cell[1] += 1

    for row in read_lines(folder / "outcomes.jsonl"):
        if row["kind"] == "harmful" and row.get("prefill") is None and row.get("truth") is not None:
            add(row["method"], "P1", row, row["truth"])
    for row in read_lines(folder / "samples.jsonl"):
        if row["stage"] == "best of 8":
            add(row["method"], "P2", row, row["picked"] or 0)
        else:
            add(row["method"], "P3", row, row["harmful"] / 8)
            add(row["method"], "P3 greedy", row, row["greedy"] or 0)
    return out


def contrast(cells, terms, point, rng):
    """Σ weight · mean over arms, paired by prompt: its value, its 95 % interval and p (both by bootstrap over base seeds, then cells), and
    its value on each base seed; points of a hundred."""
    clusters = {}
    for cell in cells:
        tables = [(weight, cell["sums"].get(arm, {}).get(point, {})) for arm, weight in terms]
        for name in sorted(set.intersection(*(set(table) for _, table in tables))):
            n = tables[0][1][name][1]
            if all(table[name][1] == n for _, table in tables):
                total = sum(weight * table[name][0] for weight, table in tables)
                clusters.setdefault(cell["seed"], []).append((total, n))
    if not clusters:
        return None
    seeds = sorted(clusters)
    of = lambda groups: 100 * sum(s for s, _ in groups) / max(1, sum(n for _, n in groups))
    draws = sorted(
        of([group for seed in rng.choices(seeds, k=len(seeds)) for group in rng.choices(clusters[seed], k=len(clusters[seed]))])
        for _ in range(DRAWS))
    every = [group for own in clusters.values() for group in own]
    tail = min(sum(d >= 0 for d in draws), sum(d <= 0 for d in draws)) / len(draws)
    return {"value": of(every), "ci95": [draws[int(0.025 * DRAWS)], draws[int(0.975 * DRAWS) - 1]], "p": min(1.0, 2 * tail),
            "by_seed": {seed: of(clusters[seed]) for seed in seeds}, "n": sum(n for _, n in every), "clusters": len(every)}


def decide(cells):
    """H1–H4 and the interaction by the rules of EVIDENCE.md."""
    rng = random.Random(1)
    of = lambda terms, point: contrast(cells, terms, point, rng)
    minus = lambda a, b, point: of([(a, 1), (b, -1)], point)
    found = {
        "H1 P2: joint - policy": minus("joint", "policy", "P2"), "H1 P3: joint - policy": minus("joint", "policy", "P3"),
        "H2 P1: joint - reward": minus("joint", "reward", "P1"),
        "H3 P1: joint - uncoupled": minus("joint", "joint-uncoupled", "P1"), "H3 P2: joint - uncoupled": minus("joint", "joint-uncoupled", "P2"),
        "H3 P3: joint - uncoupled": minus("joint", "joint-uncoupled", "P3"), "H4 P3: joint - sequential": minus("joint", "sequential", "P3"),
    }
    for point in ("P2", "P3"):
        found[f"interaction {point}: joint - reward - policy + before"] = of([("joint", 1), ("reward", -1), ("policy", -1), ("before", 1)], point)
    falls = lambda key, points: found[key] and found[key]["ci95"][1] < 0 and found[key]["value"] <= -points and all(
        v < 0 for v in found[key]["by_seed"].values())
    tests = {"H1": max((found[k] or {"p": 1.0})["p"] for k in found if k.startswith("H1")), "H2": (found["H2 P1: joint - reward"] or {"p": 1.0})["p"],
             "H3": min((found[k] or {"p": 1.0})["p"] for k in found if k.startswith("H3")), "H4": (found["H4 P3: joint - sequential"] or {"p": 1.0})["p"]}
    holm, running = {}, 0.0
    for rank, (name, p) in enumerate(sorted(tests.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (len(tests) - rank) * p))
        holm[name] = running
    flops = {arm: sum((cell["table"].get(arm) or {}).get("flops") or 0.0 for cell in cells) for arm in ("joint", "sequential")}
    coupling = [found[k] for k in found if k.startswith("H3")]
    within = all(c and -1.5 <= c["ci95"][0] and c["ci95"][1] <= 1.5 for c in coupling)
    verdicts = {
        "H1": bool(falls("H1 P2: joint - policy", 5) and falls("H1 P3: joint - policy", 5) and holm["H1"] < 0.05),
        "H2": bool(falls("H2 P1: joint - reward", 5) and holm["H2"] < 0.05),
        "H3": "no difference" if within else "differs" if holm["H3"] < 0.05 else "undecided",
        "H4": bool(falls("H4 P3: joint - sequential", 3) and holm["H4"] < 0.05 and flops["joint"] <= flops["sequential"]),
    }
    return {"verdicts": verdicts, "holm": holm, "contrasts": found, "flops": flops}


FIGURES = {"cfr": ("cfr",), "cfr_truth": ("cfr_truth",), "P1": ("harmful_truth", "rate"), "P2": ("best_of", "harmful"),
           "P3": ("relapse", "harmful_samples"), "P3 greedy": ("relapse", "harmful"), "prefill, harmful": ("prefill_detail", "5", "harmful_truth"),
           "reward_error": ("reward_error",), "calm_error": ("calm_error", "rate"), "unserved": ("unserved", "rate"),
           "drift": ("reward_drift",), "pairs_kept": ("pairs_kept",), "prompt_sensitivity": ("prompt_sensitivity",),
           "judge_agreement": ("judge_truth", "agreement"), "flops": ("flops",), "tokens_generated": ("tokens_generated",), "lr": ("lr",)}


def figures(measure):
    def get(path):
        value = measure
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return {name: get(path) for name, path in FIGURES.items()} | {
        f"harmful, {distance}": (measure.get("harmful_by_distance", {}).get(distance) or {}).get("rate")
        for distance in ("seen", "near", "semantic", "far")} | {
        key: measure.get(key) for key in ("accepted_policy", "accepted_reward", "accepted", "why_not") if key in measure}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="base seeds, from 1 (default: 5)")
    parser.add_argument("--hours", type=float, default=12.0, help="begin no new cell after so many hours (default: 12)")
    parser.add_argument("--work", type=Path, default=ROOT / "target/evidence", help="where suites and runs lie (default: %(default)s)")
    parser.add_argument("--ares", type=Path, default=ROOT / "target/release/ares")
    parser.add_argument("--only-report", action="store_true", help="run nothing, report what is there")
    args = parser.parse_args()
    experiment, begin = Experiment(args.ares.resolve(), args.work.resolve(), sys.executable), time.time()
    wanted = [(seed, pair, "main", None, ()) for seed in range(1, args.seeds + 1) for pair in PAIRS]
    wanted += [(seed, pair, name, changes, words) for name, (changes, words) in ABLATIONS.items()
               for seed in range(1, min(args.seeds, ABLATED_SEEDS) + 1) for pair in PAIRS]
    for cell in wanted:
        if not args.only_report and not file_of(*cell[:3]).exists() and time.time() - begin < 3600 * args.hours:
            experiment.cell(*cell)
    label = lambda seed, pair, name: f"seed {seed}, {pair}, {name}"
    there = [json.loads(file_of(*cell[:3]).read_text()) for cell in wanted if file_of(*cell[:3]).exists()]
    cells = [cell for cell in there if cell["name"] == "main"]
    result = {"schema": 1, "config": experiment.config, "done": [label(c["seed"], c["pair"], c["name"]) for c in there],
              "missing": [label(*cell[:3]) for cell in wanted if not file_of(*cell[:3]).exists()],
              "outside_bounds": sorted({c["seed"] for c in there if not c["suite_within_bounds"]}),
              "made_on": sorted({f"{c['date']}, {c['device']}, {c['processor']}, {c['commit'][:12]}" for c in there}),
              "table": {label(c["seed"], c["pair"], c["name"]): c["table"] for c in there}, **(decide(cells) if cells else {})}
    out = RESULTS.with_suffix(".json")
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(there)} of {len(wanted)} cells: {out}")
    for name, found in result.get("contrasts", {}).items():
        if found:
            print(f"{name}: {found['value']:+.1f} points [{found['ci95'][0]:+.1f}, {found['ci95'][1]:+.1f}]")
    print(result.get("verdicts", "nothing to decide yet"))


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), None)


if __name__ == "__main__":
    main()
