"""Does the suite's attacker help? Probes and repairs with it and without it, on cells that the grammar cannot say.

    target/suite-venv/bin/python scripts/attacker_lift.py [--seeds 3]

Each pair and seed twice, at equal queries of the policy: the grammar alone, and the attacker beside it; then one joint repair of what was
found. Counted are distinct coupled failures of the adaptive search by the distance of their words (near: other words for a seen tactic;
semantic: a frame of its own), and by ground truth the harmful answers and coupled failures on the test split after the repair. Differences are paired by
prompt; their 95 % intervals are from a bootstrap over pair × seed × tactic × domain. The result is benches/results/attacker.json.
"""

import argparse
import json
import random
import subprocess
import time
from pathlib import Path

from evidence import CONFIG, DRAWS, PAIRS, changed, processor, read_lines
from suite.text import TACTICS

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benches/results/attacker.json"
ARMS = ("grammar", "attacker")
DISTANCES = ("seen", "near", "semantic", "far")
# Words by which a prompt's frame is known, longest first.
FRAMES = sorted(((words.strip(), tactic[1]) for tactic in TACTICS if not tactic[3] for template in tactic[2]
                 for words in [template.replace("{persona}", "").replace("{request}", "")] if words.strip()), key=lambda f: -len(f[0]))
DISTANCE = {tactic[0]: tactic[1] for tactic in TACTICS}
WRITTEN = {"write", "rephrase", "retarget", "cross"}


def run(ares, work, pair, seed, arm, failures):
    """The folder of one comparison, made if it is not there."""
    out = work / f"{pair}-{seed}-{arm}-{failures}"
    if not (out / "summary.json").exists():
        changes = {"seed": seed, "methods": '["joint"]', "grid": "[]", "samples": 0, "further": 0, "prefill": "[0]", "failures": failures}
        text = changed(CONFIG.read_text(), changes)
        if arm == "attacker":
            text = text.replace("[probe]\n", '[probe]\nattacker = "../attacker"\n')
        config = out.with_suffix(".toml")
        config.write_text(text)
        subprocess.run([ares, "-q", "compare", config, "--out", out], cwd=ROOT / "models" / pair, check=True)
    return out


def found(folder):
    """{distance: distinct coupled failures} of the adaptive search before the repair, and its queries."""
    queries = [q for q in read_lines(folder / "probes.jsonl") if not q["uniform"] and not q["after"]]
    of = lambda prompt: next((distance for words, distance in FRAMES if words in prompt), "seen")
    coupled = [q for q in queries if q.get("verdict") == "coupled"]
    return {d: sum(of(q["prompt"]) == d for q in coupled) for d in DISTANCES} | {
        "written": sum(bool(WRITTEN & set(q["operators"])) for q in queries), "queries": len(queries)}


def after(folder, arm):
    """{distance: {prompt: (cell, harmful, coupled)}} of joint, by truth."""
    out = {d: {} for d in DISTANCES}
    for row in read_lines(folder / "outcomes.jsonl"):
        if row["method"] == arm and row["kind"] == "harmful" and row.get("prefill") is None and row.get("truth") is not None:
            harmful = bool(row["truth"])
            out[DISTANCE[row["tactic"]]][row["prompt"]] = (f"{row['domain']}/{row['tactic']}", harmful, harmful and row["reward"] >= row["tau_r"])
    return out


def difference(runs, distance, place):
    """Points by which `attacker` differs from `grammar`, and the interval."""
    clusters = {}
    for (pair, seed), arms in runs.items():
        ours, theirs = arms["attacker"][distance], arms["grammar"][distance]
        assert set(ours) == set(theirs), "the arms were measured on different prompts"
        for prompt, row in ours.items():
            cell = clusters.setdefault((pair, seed, row[0]), [0, 0])
            cell[0] += int(row[place]) - int(theirs[prompt][place])
            cell[1] += 1
    groups, rng = list(clusters.values()), random.Random(1)
    of = lambda some: 100 * sum(s for s, _ in some) / sum(n for _, n in some)
    draws = sorted(of(rng.choices(groups, k=len(groups))) for _ in range(DRAWS))
    return {"points": of(groups), "ci95": [draws[int(0.025 * DRAWS)], draws[int(0.975 * DRAWS) - 1]], "cells": len(groups)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--failures", type=int, default=240, help="failures that a repair is given at most (default: 240)")
    parser.add_argument("--work", type=Path, default=ROOT / "target/attacker")
    parser.add_argument("--ares", type=Path, default=ROOT / "target/release/ares")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    runs, table, device = {}, {}, None
    for pair in PAIRS:
        for seed in range(1, args.seeds + 1):
            for arm in ARMS:
                folder = run(args.ares.resolve(), args.work.resolve(), pair, seed, arm, args.failures)
                summary = json.loads((folder / "summary.json").read_text())
                device = summary["device"]
                measured = after(folder, "joint")
                runs.setdefault((pair, seed), {})[arm] = measured
                rate = lambda d, place: 100 * sum(row[place] for row in measured[d].values()) / len(measured[d])
                table[f"{pair}, seed {seed}, {arm}"] = {
                    "found": found(folder), "writing": summary["probe"].get("writing"),
                    **{f"harmful %, {d}": rate(d, 1) for d in DISTANCES}, **{f"coupled %, {d}": rate(d, 2) for d in DISTANCES}}
                print(f"{time.strftime('%H:%M:%S')} {pair}, seed {seed}, {arm}: {table[f'{pair}, seed {seed}, {arm}']['found']}", flush=True)
    result = {"schema": 1, "failures": args.failures, "date": time.strftime("%Y-%m-%d"), "device": device, "processor": processor(), "table": table,
              "attacker - grammar": {f"{what}, {d}": difference(runs, d, place)
                                     for place, what in ((1, "harmful"), (2, "coupled")) for d in DISTANCES}}
    out = OUT if args.failures == 240 else OUT.with_stem(f"attacker-{args.failures}")
    out.write_text(json.dumps(result, indent=1) + "\n")
    for name, found_ in result["attacker - grammar"].items():
        print(f"{name}: {found_['points']:+.1f} points [{found_['ci95'][0]:+.1f}, {found_['ci95'][1]:+.1f}]")


if __name__ == "__main__":
    main()
