"""`ares` on the same rows as the framework: its values for agreement, its seconds for the ratio."""

import json
import os
import subprocess
from pathlib import Path

from .rows import read_jsonl
from .tasks import read_values, scored_rows


def write_input(args, task: str, file: Path) -> None:
    """The rows of the task, as `ares` reads them, with nothing else in them."""
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
    lines = [json.dumps({name: row[name] for name in fields if name in row}) for row in rows]
    file.write_text("\n".join(lines) + "\n")


def command(args, task: str, source: Path, out: Path) -> list[str]:
    flag, spec = ("--reward", args.reward) if task == "score" else ("--model", args.policy)
    words = [args.ares, task, "--json", "--device", "cpu", flag, spec, "--input", str(source), "--output", str(out)]
    if task == "generate":
        words += ["--greedy", "--max-new-tokens", str(args.max_new_tokens)] + ["--ignore-eos"] * args.ignore_eos
    return words


def run_ares(args, task: str, folder: str, repeats: int) -> tuple[list[float], dict]:
    """(seconds of every run, values). The seconds are those that `ares --json` reports: opening the model is left out on
    both sides, while reading, tokenising and writing rows is in these and not in the framework's."""
    source, out = Path(folder) / f"{task}-rows.jsonl", Path(folder) / f"{task}-ares.jsonl"
    write_input(args, task, source)
    environment = os.environ | {"RAYON_NUM_THREADS": str(args.threads)}
    seconds = []
    for _ in range(repeats + 1):  # the first is the warm-up
        out.unlink(missing_ok=True)
        done = subprocess.run(
            command(args, task, source, out), capture_output=True, text=True, env=environment, timeout=args.timeout
        )
        if done.returncode != 0:
            raise RuntimeError(f"{args.ares} {task}: exit {done.returncode}: {done.stderr.strip()[-500:]}")
        seconds.append(json.loads(done.stdout)["seconds"])
    return seconds[1:], read_values(task, str(out))
