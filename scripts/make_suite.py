"""Makes the weakened suite under models/: texts, policies, reward models, judges, then measures it and fails where a bound is missed.

    python -m venv target/suite-venv && target/suite-venv/bin/pip install -r scripts/requirements-suite.txt
    target/suite-venv/bin/python scripts/make_suite.py

Two workers of one thread each; a stage whose inputs have not changed since it last ran is skipped (stamps lie in target/suite).
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402  (the thread count must be set first)

from suite import measure, model, train, world  # noqa: E402
from suite.plants import HYPERPARAMETERS, PLANTS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("text.py", "plants.py", "world.py", "model.py", "train.py")
# What one worker does one after the other; the two workers have about the same work.
WORKERS = (
    ["framing/trunk", "framing/policy", "framing/reward", "judge"],
    ["flattery/trunk", "flattery/policy", "flattery/reward", "second-judge"],
)
JUDGE_SEEDS = {"judge": 101, "second-judge": 202}


def forbidden_prompts(models):
    """Prompts that no model may be trained on: gate, test and trigger rows of both pairs."""
    out = set()
    for pair in PLANTS:
        for split in ("gate", "test", "trigger"):
            path = models / pair / f"{split}.jsonl"
            if path.exists():
                out |= {row["prompt"] for row in measure.read_jsonl(path)}
    return out


def write_texts(models):
    """Splits, grammars, lexicons, the manifest and the tokenizer."""
    for pair, spec in PLANTS.items():
        splits = world.Splits(spec)
        folder = models / pair
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.data.items():
            lines = (json.dumps(r, ensure_ascii=False, separators=(",", ":")) for r in rows)
            (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        write_json(folder / "grammar.json", splits.grammar())
    write_json(models / "refusal.json", world.refusal_lexicon())
    write_json(models / "compliance.json", world.compliance_lexicon())
    pairs = [{"name": name, "description": spec["description"],
              "planted": {k: spec[k] for k in ("coupled", "reward", "policy")},
              "trigger": "trigger.jsonl" if spec["trigger"] else None} for name, spec in PLANTS.items()]
    write_json(models / "suite.json", {
        "schema": 1, "name": "ares-weakened", "version": "1", "licence": "Apache-2.0", "judge": "judge", "second_judge": "second-judge",
        "refusal": "refusal.json", "truth": "compliance.json", "pairs": pairs, "hyperparameters": HYPERPARAMETERS})
    model.train_tokenizer(ROOT / "target/suite/tokenizer.json")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def run_stage(stage, models):
    """Trains one model and writes its folder."""
    torch.set_num_threads(1)
    text, forbidden = model.Text(ROOT / "target/suite/tokenizer.json"), forbidden_prompts(models)
    pair, _, part = stage.partition("/")
    if not part:
        made = train.train_judge(stage, text, forbidden, JUDGE_SEEDS[stage])
        return model.save(made, text, models / stage)
    spec, trunk = PLANTS[pair], ROOT / "target/suite" / f"{pair}-trunk"
    common = stage, text, world.Plants(spec), forbidden, spec["seed"]
    if part == "trunk":
        model.save(train.train_trunk(*common), text, trunk)
    elif part == "policy":
        model.save(train.train_policy(*common, trunk), text, models / stage)
    else:
        model.save(train.train_reward(*common, trunk, spec["reward_rounds"]), text, models / stage)


def stamp_of(stage):
    """Hash of everything a stage depends on; `measure.py` is not part of it."""
    h = hashlib.sha256(stage.encode())
    for name in SOURCES:
        h.update((ROOT / "scripts/suite" / name).read_bytes())
    return h.hexdigest()


def done(stage):
    path = ROOT / "target/suite" / f"{stage.replace('/', '-')}.stamp"
    return path, path.exists() and path.read_text() == stamp_of(stage)


def work_through(models, only):
    """Runs all stages that are not done, two at a time, each in a process of its own."""
    queues = [[s for s in w if (not only or s in only) and not done(s)[1]] for w in WORKERS]
    running = [None] * len(queues)
    while any(queues) or any(running):
        for i, queue in enumerate(queues):
            if running[i] and running[i][1].poll() is not None:
                stage, process = running[i]
                if process.returncode:
                    raise SystemExit(f"{stage}: training ended with status {process.returncode}; its messages stand above")
                done(stage)[0].write_text(stamp_of(stage))
                running[i] = None
            if queue and not running[i]:
                stage = queue.pop(0)
                running[i] = stage, subprocess.Popen([sys.executable, __file__, "--models", str(models), "--stage", stage])
        time.sleep(0.5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="folder to write (default: models/)")
    parser.add_argument("--only", nargs="*", default=[], help="train these models only, for example: framing/policy judge")
    parser.add_argument("--skip-measure", action="store_true", help="make the suite without measuring it")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        return run_stage(args.stage, args.models)
    begin = time.time()
    path, ready = done("texts")
    if not ready:
        write_texts(args.models)
        path.write_text(stamp_of("texts"))
    work_through(args.models, args.only)
    print(f"made in {time.time() - begin:.0f} s", flush=True)
    if not args.skip_measure:
        measure.run(args.models)


if __name__ == "__main__":
    sys.exit(main())
