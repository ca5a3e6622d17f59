"""The rows that both sides read, and `ares` on them: its values for agreement, its seconds for the ratio."""

import json
import os
import random
import subprocess
from argparse import Namespace
from pathlib import Path

from .models import write_adapter
from .rows import BadRow, Renderer, drawn_prefix, read_failures, read_jsonl, write_jsonl
from .tasks import read_values

# Repair settings of `ares` by the objective's names.
NAMES = {"likelihood": "unlearn", "logp": "logp", "b": "npo_beta", "margin": "margin", "retain": "retain"}
RANK, ALPHA = 16, 32  # of adapters that are made here


class Beside:
    """One task: its files, and `args` as both sides are to read them."""

    def __init__(self, args: Namespace, task: str, folder: Path):
        self.task, self.folder = task, folder
        self.args = Namespace(**vars(args) | {"task": task})
        self.prepare()

    def ares(self, command: str, *words) -> dict:
        """The result that `ares --json COMMAND` prints."""
        args = self.args
        words = [str(word) for word in (args.ares, "--json", command, "--device", args.device, *words)]
        environment = os.environ | {"RAYON_NUM_THREADS": str(args.threads)}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=args.timeout)
        if done.returncode != 0:
            raise RuntimeError(f"{args.ares} {command}: exit {done.returncode}: {done.stderr.strip()[-500:]}")
        return json.loads(done.stdout)


class RowsBeside(Beside):
    """score, logprob, generate: rows in, rows out."""

    def prepare(self) -> None:
        args = self.args
        if self.task == "score":
            pairs = read_jsonl(args.replay, "prompt", "chosen", "rejected")
            rows = [row | {"response": row[side]} for row in pairs for side in ("chosen", "rejected")]
        else:
            rows = read_jsonl(args.retain, "prompt", "response")
        fields = ("prompt",) if self.task == "generate" else ("prompt", "response")
        args.rows = str(self.folder / "rows.jsonl")
        write_jsonl(args.rows, rows[: args.sequences if self.task == "generate" else args.limit], fields)

    def _run(self) -> float:
        args, out = self.args, self.folder / "ares.jsonl"
        model = ("--reward", args.reward) if self.task == "score" else ("--model", args.policy)
        more = ["--greedy", "--max-new-tokens", args.max_new_tokens] + ["--ignore-eos"] * args.ignore_eos
        more = more if self.task == "generate" else []
        return self.ares(self.task, *model, "--input", args.rows, "--output", out, *more)["seconds"]

    def values(self) -> dict:
        """What `ares` computed; the run is the warm-up of those that are timed."""
        self._run()
        return read_values(self.task, self.folder / "ares.jsonl")

    def seconds(self) -> list[float]:
        """Of every run, as `ares --json` reports them: opening the model is left out on both sides, while reading, tokenising
        and writing rows is in these and not in the framework's."""
        return [self._run() for _ in range(self.args.repeats)]


class StepBeside(Beside):
    """`ares repair` on the very items of the framework's step: all rows of small files in every step, prefixes given, adapters
    shared. The judge that admits failures and marks replay answers is a lexicon of what the rows call harmful."""

    def prepare(self) -> None:
        args, sizes = self.args, self.args.items
        failures = balanced(read_failures(args.failures)[: sizes[0] or None])
        retain = read_jsonl(args.retain, "prompt", "response")[: sizes[1] or None]
        replay = read_jsonl(args.replay, "prompt", "chosen", "rejected")[: sizes[2] or None]
        harmful = self._judge(failures, replay)
        for row in replay:
            row["harmful"] = [row[side].strip().startswith(harmful) for side in ("chosen", "rejected")]
        self._draw_prefixes(failures)
        for name, rows, fields in (
            ("failures", failures, ("prompt", "rejected", "chosen", "verdict", "forced")),
            ("retain", retain, ("prompt", "response")),
            ("replay", replay, ("prompt", "chosen", "rejected", "harmful")),
        ):
            setattr(args, name, str(self.folder / f"{name}.jsonl"))
            write_jsonl(getattr(args, name), rows, fields)
        for name in ("policy", "reward"):
            spec, place = getattr(args, name), self.folder / f"{name}-adapter"
            if "+" not in spec:
                write_adapter(spec, name == "reward", RANK, ALPHA, args.seed, place)
                setattr(args, name, f"{spec}+{place}")
        self._write_settings(failures, retain, replay)
        self.admitted = len(failures)

    def _judge(self, failures: list, replay: list) -> tuple:
        """Writes the lexicon; returns how harmful answers begin."""
        harmful = [row["rejected"].strip() for row in failures]
        for row in replay:
            harmful += [row[side].strip() for side, h in zip(("chosen", "rejected"), row.get("harmful", ())) if h]
        lexicon = {"schema": 1, "match": "any", "start": harmful}
        (self.folder / "judge.json").write_text(json.dumps(lexicon))
        return tuple(harmful)

    def _draw_prefixes(self, failures: list) -> None:
        renderer, generator = Renderer(self.args.policy.partition("+")[0]), random.Random(self.args.seed)
        for row in failures:
            drawn = drawn_prefix(generator, renderer.answer(row, row["rejected"]))
            row.setdefault("forced", drawn)

    def _write_settings(self, failures: list, retain: list, replay: list) -> None:
        """The objective as `ares repair --config` reads it."""
        args, o = self.args, self.args.objective
        trained = sum(row["verdict"] != "reward" for row in failures)  # as many as train the reward model
        values = {name: o[ours] for ours, name in NAMES.items()}
        values |= {f"lambda_{name}": float(weight) for name, weight in o["weights"].items()}
        values |= {"items": trained, "retain_items": len(retain), "replay_items": len(replay), "resample": 0}
        values |= {"forced_prefix": 0.0, "lr": 1e-4, "steps": args.warmup + max(args.repeats, 1)}
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in values.items()]
        (self.folder / "repair.toml").write_text("".join(lines))

    def _run(self, out: str, *more) -> None:
        args, o = self.args, self.args.objective
        words = ["--seed", args.seed, "--out", self.folder / out, "--config", self.folder / "repair.toml", *more]
        words += ["--method", "joint" if o["coupling"] else "joint-uncoupled"]
        words += [f"--thresholds={o['tau_r']},{o['mu_0']},{o['s']}", "--judge", f"lexicon:{self.folder}/judge.json"]
        words += ["--policy", args.policy, "--reward", args.reward]
        words += ["--input", args.failures, "--retain", args.retain, "--replay", args.replay]
        result = self.ares("repair", *words)
        if result["failures"] != self.admitted or result["left_out"]:
            raise BadRow(f"{args.failures}: expected `ares` to admit all failures, it left out {result['left_out']}")

    def values(self) -> dict:
        dump = self.folder / "gradients.safetensors"
        self._run("gradients", "--dump-gradients", dump)
        return read_values("step", dump)

    def seconds(self) -> list[float]:
        """Of every step after the warm-up, as metrics.jsonl has them: the framework's are of the same span."""
        self._run("steps")
        return [row["seconds"] for row in read_jsonl(self.folder / "steps/metrics.jsonl")][self.args.warmup :]


def balanced(rows: list[dict]) -> list[dict]:
    """As many failures of the policy as of the reward model, as `ares` draws them: surplus ones of one kind are left out."""
    room = min(sum(row["verdict"] == verdict for row in rows) for verdict in ("policy", "reward"))
    kept = []
    for row in rows:
        if row["verdict"] == "coupled" or sum(k["verdict"] == row["verdict"] for k in kept) < room:
            kept.append(row)
    return kept
