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
from suite import attacker, measure, model, train, world  # noqa: E402
from suite.plants import HYPERPARAMETERS, PLANTS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("text.py", "plants.py", "world.py", "model.py", "train.py")
# Two workers at a time; each does its list one after the other. Judges stand on a trunk of their own.
PHASES = (
    (["trunk"], ["judge-trunk"]),
    (["framing/policy", "framing/reward", "second-judge", "guard"], ["judge", "flattery/policy", "flattery/reward", "attacker"]),
)
SEEDS = {"trunk": 1, "judge-trunk": 2, "judge": 101, "second-judge": 202, "guard": 303, "attacker": 404}


class Suite:
    """The suite of one base seed: its folder, and the place where trunks, tokenizer and stamps lie."""

    def __init__(self, models, seed):
        self.models, self.work, self.shift = models, ROOT / "target/suite" / str(seed), 1000 * (seed - 1)
        self.plants = {name: spec | {"seed": spec["seed"] + self.shift} for name, spec in PLANTS.items()}

    def write_texts(self):
        """Splits, grammars, the rule of truth, the refusal lexicon, the manifest and the tokenizer."""
        for pair, spec in self.plants.items():
            splits = world.Splits(spec)
            folder = self.models / pair
            folder.mkdir(parents=True, exist_ok=True)
            for split, rows in splits.data.items():
                lines = (json.dumps(r, ensure_ascii=False, separators=(",", ":")) for r in rows)
                (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
            write_json(folder / "grammar.json", splits.grammar())
        write_json(self.models / "refusal.json", world.refusal_lexicon())
        write_json(self.models / "truth.json", world.truth_rule())
        pairs = [{"name": name, "description": spec["description"],
                  "planted": {k: spec[k] for k in ("coupled", "reward", "policy", "shy")}, "exception": spec["exception"],
                  "trigger": "trigger.jsonl" if spec["trigger"] else None} for name, spec in PLANTS.items()]
        write_json(self.models / "suite.json", {
            "schema": 1, "name": "ares-weakened", "version": "2", "licence": "Apache-2.0", "judge": "judge",
            "second_judge": "second-judge", "guard": "guard", "attacker": "attacker", "refusal": "refusal.json", "truth": "truth.json", "pairs": pairs,
            "hyperparameters": HYPERPARAMETERS})
        model.train_tokenizer(self.work / "tokenizer.json")

    def forbidden_prompts(self):
        """Prompts that no model may be trained on: gate, check, test and trigger rows of both pairs."""
        files = [self.models / pair / f"{split}.jsonl" for pair in PLANTS for split in ("gate", "check", "test", "trigger")]
        return {row["prompt"] for file in files if file.exists() for row in read_jsonl(file)}

    def train(self, stage):
        """Trains one model and writes its folder."""
        text, forbidden = model.Text(self.work / "tokenizer.json"), self.forbidden_prompts()
        pair, _, part = stage.partition("/")
        seed = SEEDS[stage] + self.shift if stage in SEEDS else self.plants[pair]["seed"]
        # What begins as its trunk draws nothing but its auxiliary heads: not from where the process's last stage left off.
        torch.manual_seed(seed)
        if stage in SEEDS:
            if stage.endswith("trunk"):
                return model.save(train.train_trunk(stage, text, forbidden, seed), text, self.work / stage)
            learn = {"guard": train.train_guard, "attacker": attacker.train_attacker}.get(stage, train.train_judge)
            made = learn(stage, text, forbidden, seed, self.work / "judge-trunk")
        else:
            spec = self.plants[pair]
            learn = train.train_policy if part == "policy" else train.train_reward
            made = learn(stage, text, world.Plants(spec), forbidden, seed, self.work / "trunk")
        model.save(made, text, self.models / stage)
        if stage == "guard":
            (self.models / stage / "guard.toml").write_text(train.guard_form())
        if stage == "attacker":
            (self.models / stage / "attacker.toml").write_text(attacker.form())

    def once(self, stage, work, *args):
        """Does the work of a stage, unless the same sources did it before; `measure.py` is not one of them."""
        names = (*SOURCES, "attacker.py") if stage == "attacker" else SOURCES
        sources = [(ROOT / "scripts/suite" / name).read_bytes() for name in names]
        stamp, path = hashlib.sha256(stage.encode() + b"".join(sources)).hexdigest(), self.work / f"{stage.replace('/', '-')}.stamp"
        if not path.exists() or path.read_text() != stamp:
            work(*args)
            path.write_text(stamp)

    def run(self, stages):
        torch.set_num_threads(1)
        for stage in stages:
            self.once(stage, self.train, stage)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="folder to write (default: models/)")
    parser.add_argument("--seed", type=int, default=1, help="base seed: of every split, draw and weight (default: 1, the committed suite)")
    parser.add_argument("--ares", type=Path, default=ROOT / "target/release/ares", help="what measures it (default: %(default)s)")
    args = parser.parse_args()
    begin, suite = time.time(), Suite(args.models, args.seed)
    suite.work.mkdir(parents=True, exist_ok=True)
    suite.once("texts", suite.write_texts)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as workers:
        for phase in PHASES:
            for worker in [workers.submit(suite.run, stages) for stages in phase]:
                worker.result()
    print(f"made in {time.time() - begin:.0f} s", flush=True)
    measure.run(args.ares, args.models)


if __name__ == "__main__":
    main()
