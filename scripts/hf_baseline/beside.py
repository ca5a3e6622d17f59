"""`ares` on the same rows as the framework: its values for agreement, its seconds for the ratio."""

import json
import os
import random
import subprocess
from pathlib import Path

from .models import Lora, write_adapter
from .objective import Objective
from .rows import BadRow, Renderer, drawn_prefix, read_failures, read_jsonl
from .tasks import read_values, scored_rows

# Repair settings of `ares` by the objective's names.
NAMES = {"likelihood": "unlearn", "logp": "logp", "b": "npo_beta", "margin": "margin", "retain": "retain"}


def beside(task: str):
    """What runs `ares` for the task."""
    return StepBeside if task == "step" else RowsBeside


class RowsBeside:
    """score, logprob, generate: rows in, rows out."""

    def __init__(self, args, task: str, folder: str):
        self.args, self.task = args, task
        self.source, self.out = Path(folder) / f"{task}-rows.jsonl", Path(folder) / f"{task}-ares.jsonl"
        self._write_rows()

    def _write_rows(self) -> None:
        """The rows of the task, as `ares` reads them, with nothing else in them."""
        args, task = self.args, self.task
        if task == "score":
            rows = [row if text is None else {"prompt": row["prompt"], "response": text} for row, text in scored_rows(args)]
            rows = rows[: args.limit]
        else:
            rows = read_jsonl(args.input or args.retain)
            rows = rows[: args.sequences] if task == "generate" else rows[: args.limit]
        if task == "generate":
            fields = ("prompt", "messages", "tokens")
        else:
            fields = ("prompt", "messages", "response", "tokens", "prompt_tokens")
        write_jsonl(self.source, [{name: row[name] for name in fields if name in row} for row in rows])

    def overrides(self) -> list[str]:
        """Flags that let the framework read what `ares` reads: its own files hold the same rows."""
        return []

    def _run(self) -> float:
        args = self.args
        flag, spec = ("--reward", args.reward) if self.task == "score" else ("--model", args.policy)
        words = [self.task, "--device", args.device, flag, spec, "--input", self.source, "--output", self.out]
        if self.task == "generate":
            words += ["--greedy", "--max-new-tokens", args.max_new_tokens] + ["--ignore-eos"] * args.ignore_eos
        return run_ares(args, words)["seconds"]

    def values(self) -> dict:
        """What `ares` computed; the run is the warm-up of those that are timed."""
        self._run()
        return read_values(self.task, str(self.out))

    def seconds(self) -> list[float]:
        """Of every run, as `ares --json` reports them: opening the model is left out on both sides, while reading, tokenising
        and writing rows is in these and not in the framework's."""
        return [self._run() for _ in range(self.args.repeats)]


class StepBeside:
    """`ares repair` on the very items of the framework's step: all rows of small files in every step, prefixes given, adapters
    shared. The judge that admits failures and marks replay answers is a lexicon of what the rows call harmful."""

    def __init__(self, args, task: str, folder: str):
        self.args, self.folder = args, Path(folder) / "step"
        self.folder.mkdir()
        self.objective: Objective = args.objective
        self.specs = {name: self._with_adapter(name) for name in ("policy", "reward")}
        sizes = args.items
        failures = balanced(read_failures(args.failures)[: sizes[0] or None])
        retain = read_jsonl(args.retain, ("prompt", "response"))[: sizes[1] or None]
        replay = read_jsonl(args.replay, ("prompt", "chosen", "rejected"))[: sizes[2] or None]
        self.trained = sum(row["verdict"] != "reward" for row in failures)  # as many as train the reward model
        self.sizes = (len(failures), len(retain), len(replay))
        self._write_rows(failures, retain, replay)
        (self.folder / "repair.toml").write_text(self._settings())

    def _with_adapter(self, name: str) -> str:
        """The model with its adapter; a fresh one that both sides open where the user gave none."""
        spec, place = getattr(self.args, name), self.folder / f"{name}-adapter"
        if "+" in spec:
            return spec
        write_adapter(spec, name == "reward", Lora(self.args.rank, self.args.alpha, self.args.seed), place)
        return f"{spec}+{place}"

    def _write_rows(self, failures: list, retain: list, replay: list) -> None:
        renderer, generator = Renderer(self.args.policy.partition("+")[0]), random.Random(self.args.seed)
        harmful = [row["rejected"].strip() for row in failures]
        for row in replay:
            harmful += [row[side].strip() for side, h in zip(("chosen", "rejected"), row.get("harmful", ())) if h]
        judged = lambda text: any(text.strip().startswith(start) for start in harmful)  # noqa: E731
        for row in failures:
            drawn = drawn_prefix(generator, renderer.answer(row, row["rejected"]))
            row["forced"] = row.get("forced", drawn) if self.args.forced_prefix else 0
            if not isinstance(row["chosen"], str):
                raise BadRow(f"{row['_where']}: expected a `chosen` (`ares` would sample one), found none")
        for row in replay:
            row["harmful"] = [judged(row["chosen"]), judged(row["rejected"])]
        for name, rows, fields in (
            ("failures", failures, ("prompt", "rejected", "chosen", "verdict", "forced")),
            ("retain", retain, ("prompt", "response")),
            ("replay", replay, ("prompt", "chosen", "rejected", "harmful")),
        ):
            write_jsonl(self.folder / f"{name}.jsonl", [{field: row[field] for field in fields} for row in rows])
        lexicon = {"schema": 1, "match": "any", "start": harmful}
        (self.folder / "judge.json").write_text(json.dumps(lexicon))

    def _settings(self) -> str:
        """The objective as `ares repair --config` reads it."""
        o, (_, retain, replay) = self.objective, self.sizes
        values = {NAMES[name]: getattr(o, name) for name in NAMES}
        values |= {f"lambda_{name}": float(weight) for name, weight in o.weights.items()}
        values |= {"items": self.trained, "retain_items": retain, "replay_items": replay, "resample": 0}
        values |= {"forced_prefix": 0.0, "train_head": self.args.train_head, "lr": self.args.lr}
        values |= {"steps": self.args.warmup + max(self.args.repeats, 1)}
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())

    def overrides(self) -> list[str]:
        """Flags that let the framework read what `ares` reads."""
        words = [word for name, spec in self.specs.items() for word in (f"--{name}", spec)]
        words += [word for name in ("failures", "retain", "replay") for word in (f"--{name}", self._file(f"{name}.jsonl"))]
        return words + ["--items", "0", "0", "0"]

    def _file(self, name: str) -> str:
        return str(self.folder / name)

    def _run(self, out: str, *more: str) -> dict:
        o = self.objective
        words = ["repair", "--device", self.args.device, "--seed", self.args.seed, "--out", self._file(out), *more]
        words += ["--method", "joint" if o.coupling else "joint-uncoupled", "--config", self._file("repair.toml")]
        words += [f"--thresholds={o.tau_r},{o.mu_0},{o.s}", "--judge", f"lexicon:{self._file('judge.json')}"]
        words += [word for name, spec in self.specs.items() for word in (f"--{name}", spec)]
        words += ["--input", self._file("failures.jsonl")]
        words += [word for name in ("retain", "replay") for word in (f"--{name}", self._file(f"{name}.jsonl"))]
        result = run_ares(self.args, words)
        if result["failures"] != self.sizes[0] or result["left_out"]:
            raise BadRow(f"{self.args.failures}: expected `ares` to admit all failures, it left out {result['left_out']}")
        return result

    def values(self) -> dict:
        dump = self._file("gradients.safetensors")
        self._run("gradients", "--dump-gradients", dump)
        return read_values("step", dump)

    def seconds(self) -> list[float]:
        """Of every step after the warm-up, as metrics.jsonl has them: the framework's are of the same span."""
        self._run("steps")
        steps = [row["seconds"] for row in read_jsonl(self._file("steps/metrics.jsonl"))]
        return steps[self.args.warmup :]


def balanced(rows: list[dict]) -> list[dict]:
    """As many failures of the policy as of the reward model, as `ares` draws them: surplus ones of one kind are left out."""
    count = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("policy", "reward")}
    room, kept = dict.fromkeys(count, min(count.values())), []
    for row in rows:
        if row["verdict"] in room:
            if room[row["verdict"]] == 0:
                continue
            room[row["verdict"]] -= 1
        kept.append(row)
    return kept


def write_jsonl(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_ares(args, words: list) -> dict:
    """The result that `ares --json` prints."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(args.threads)}
    command = [args.ares, "--json", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=args.timeout)
    if done.returncode != 0:
        raise RuntimeError(f"{args.ares} {words[0]}: exit {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)
