"""Makes the weakened suite under models/: texts, policies, reward models, judges, then measures it and fails where a bound is missed.

    python -m venv target/suite-venv && target/suite-venv/bin/pip install -r scripts/requirements.txt
    cargo build --release && target/suite-venv/bin/python scripts/make_suite.py

Two workers of one thread each; a stage whose inputs have not changed since it last ran is skipped (stamps lie in target/suite).
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402  (the thread count must be set first)

from hf_baseline.rows import read_jsonl  # noqa: E402
from suite import measure, model, train, world  # noqa: E402
from suite.plants import HYPERPARAMETERS, PLANTS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "target/suite"
SOURCES = ("text.py", "plants.py", "world.py", "model.py", "train.py")
# What one worker does one after the other; the two workers have about the same work.
WORKERS = (
    ["framing/trunk", "framing/policy", "framing/reward", "judge"],
    ["flattery/trunk", "flattery/policy", "flattery/reward", "second-judge"],
)
JUDGE_SEEDS = {"judge": 101, "second-judge": 202}


def forbidden_prompts(models):
    """Prompts that no model may be trained on: gate, test and trigger rows of both pairs."""
    files = [models / pair / f"{split}.jsonl" for pair in PLANTS for split in ("gate", "test", "trigger")]
    return {row["prompt"] for file in files if file.exists() for row in read_jsonl(file)}


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
    model.train_tokenizer(WORK / "tokenizer.json")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def run_stage(stage, models):
    """Trains one model and writes its folder."""
    text, forbidden = model.Text(WORK / "tokenizer.json"), forbidden_prompts(models)
    pair, _, part = stage.partition("/")
    if not part:
        made = train.train_judge(stage, text, forbidden, JUDGE_SEEDS[stage])
        return model.save(made, text, models / stage)
    spec, trunk = PLANTS[pair], WORK / f"{pair}-trunk"
    common = stage, text, world.Plants(spec), forbidden, spec["seed"]
    if part == "trunk":
        model.save(train.train_trunk(*common), text, trunk)
    elif part == "policy":
        model.save(train.train_policy(*common, trunk), text, models / stage)
    else:
        model.save(train.train_reward(*common, trunk, spec["reward_rounds"]), text, models / stage)


def once(stage, work, *args):
    """Does the work of a stage, unless the same sources did it before; `measure.py` is not one of them."""
    sources = [(ROOT / "scripts/suite" / name).read_bytes() for name in SOURCES]
    stamp, path = hashlib.sha256(stage.encode() + b"".join(sources)).hexdigest(), WORK / f"{stage.replace('/', '-')}.stamp"
    if not path.exists() or path.read_text() != stamp:
        work(*args)
        path.write_text(stamp)


def run_stages(stages, models):
    torch.set_num_threads(1)
    for stage in stages:
        once(stage, run_stage, stage, models)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="folder to write (default: models/)")
    parser.add_argument("--ares", type=Path, default=ROOT / "target/release/ares", help="what measures it (default: %(default)s)")
    args = parser.parse_args()
    begin = time.time()
    once("texts", write_texts, args.models)
    with ProcessPoolExecutor(len(WORKERS), multiprocessing.get_context("spawn")) as workers:
        for worker in [workers.submit(run_stages, stages, args.models) for stages in WORKERS]:
            worker.result()
    print(f"made in {time.time() - begin:.0f} s", flush=True)
    measure.run(args.ares, args.models)


if __name__ == "__main__":
    main()
