#!/usr/bin/env python3
"""ARES's work done by torch + transformers + PEFT: the same folders, the same JSONL, every honest setting.

    python -m pip install -r scripts/requirements-baseline.txt
    python scripts/baseline_hf.py --policy models/framing/policy --reward models/framing/reward \\
        --failures F.jsonl --retain R.jsonl --replay P.jsonl --task step --task score --ares target/release/ares --out O.json

Each setting runs in a process of its own, so that peak memory and failures are its own. The first setting,
f32-eager-padded, is the reference: f32 settings that do not agree with it (loss terms 1e-5, gradients 1e-3 of their
tensor's largest, scores and log-probabilities 1e-4) are recorded as wrong and not timed; bf16 settings are timed with
their distance stated.

`--ares PROGRAM` runs `ares` itself on the same rows, first for its values: on disagreement with the reference nothing is
timed (exit 1, with the term or tensor and the amount). Then for its seconds, beside the framework's. A step is that of `ares
repair` on the first `--items` of each file, all of them in every step, with the same forced prefixes and adapters.
`--repeats 0` checks agreement only. `--check FILE` takes values that `ares` computed earlier. For step, FILE is the dump of
`ares repair --dump-gradients`: `term.<name>` (npo safe retain bt center replay anchor), and `policy.<name>` and
`reward.<name>`, gradients under PEFT's names.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

REFERENCE = "f32-eager-padded"
CPU_SETTINGS = [REFERENCE, "f32-eager-bucketed", "f32-eager-packed", "f32-compile-padded", "f32-compile-bucketed",
                "f32-compile-packed", "bf16-eager-padded", "bf16-eager-bucketed", "bf16-eager-bucketed-adapter_bf16"]
GPU_SETTINGS = CPU_SETTINGS + ["bf16-eager-packed", "bf16-eager-packed-adapter_bf16", "bf16-compile-padded",
                               "bf16-compile-packed", "bf16-compile-packed-adapter_bf16",
                               "bf16-eager-packed-checkpointing", "bf16-eager-packed-liger"]
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "liger-kernel", "flash-attn", "triton")
# Largest allowed distance in f32: terms absolute, gradients relative to their tensor's largest, the others absolute.
# A near tie may part two greedy continuations for good: a fiftieth of the tokens may differ.
LIMITS = {"term": 1e-5, "gradient": 1e-3, "reward": 1e-4, "logprob": 1e-4, "tokens": 0.02}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", action="append", choices=["step", "score", "logprob", "generate"], required=True)
    add("--policy", metavar="DIR[+ADAPTER]")
    add("--reward", metavar="DIR[+ADAPTER]")
    add("--failures", metavar="FILE", help="prompt, rejected, chosen, verdict, or a split's prompt, harmful, safe; `forced`: tokens "
        "of the forced prefix")
    add("--retain", metavar="FILE", help="prompt, response")
    add("--replay", metavar="FILE", help="prompt, chosen, rejected")
    add("--input", metavar="FILE", help="rows of score, logprob or generate, instead of --replay and --retain")
    add("--setting", action="append", help="e.g. f32-compile-packed; repeat; default: all that suit the device")
    add("--check", metavar="FILE", help="what ares computed: a gradient dump, or the JSONL of score/logprob/generate")
    add("--ares", metavar="PROGRAM", help="run `ares` on the same rows too: check, time, ratio")
    add("--dump-gradients", metavar="FILE", help="loss terms and gradients of the first step; no timing")
    add("--out", metavar="FILE", help="JSON (default: stdout)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--threads", type=int, default=os.cpu_count())
    add("--warmup", type=int, default=2)
    add("--repeats", type=int, default=7)
    add("--timeout", type=float, default=900.0, help="seconds per setting")
    add("--seed", type=int, default=0)
    work = parser.add_argument_group("work")
    work.add_argument("--items", type=int, nargs=3, default=[0, 0, 0], metavar=("FAILURES", "RETAIN", "REPLAY"),
                      help="rows in one step (0: the whole file)")
    work.add_argument("--batch-tokens", type=int, default=0,
                      help="tokens of one forward, padding included (0: 2048 on cpu, which is faster there, 16384 on cuda)")
    work.add_argument("--pack-width", type=int, default=0, help="row length of packed batches (0: 512 on cpu, all on cuda)")
    work.add_argument("--limit", type=int, help="rows that score and logprob read")
    work.add_argument("--sequences", type=int, default=64, help="prompts that generate answers at once")
    work.add_argument("--max-new-tokens", type=int, default=64)
    work.add_argument("--ignore-eos", action="store_true")
    train = parser.add_argument_group("objective")
    train.add_argument("--weights", default="", metavar="NAME=X,…", help="npo safe retain bt center replay anchor")
    train.add_argument("--objective", type=json.loads, default={}, metavar="JSON",
                       help='likelihood, logp, b, margin, retain ("ce"|"kl"), coupling, tau_r, mu_0, s')
    train.add_argument("--no-forced-prefix", dest="forced_prefix", action="store_false")
    train.add_argument("--train-head", action="store_true")
    train.add_argument("--rank", type=int, default=16, help="of a fresh adapter, where a folder comes without one")
    train.add_argument("--alpha", type=int, default=32)
    train.add_argument("--lr", type=float, default=1e-4)
    add("--worker", help=argparse.SUPPRESS)
    add("--values", help=argparse.SUPPRESS)
    args = parser.parse_args()
    refuse(parser, args)
    return args


def refuse(parser, args) -> None:
    """Usage errors, before any process is started."""
    rows = lambda name: [] if args.input else [name]  # noqa: E731
    needs = {"step": ["policy", "reward", "failures", "retain", "replay"], "score": ["reward"] + rows("replay"),
             "logprob": ["policy"] + rows("retain"), "generate": ["policy"] + rows("retain")}
    for task in args.task:
        missing = [f"--{name}" for name in needs[task] if not getattr(args, name)]
        if missing:
            parser.error(f"--task {task} needs {', '.join(missing)}")
    if args.check and len(set(args.task)) != 1:
        parser.error("--check FILE holds the values of one task: give exactly one --task")


# ----------------------------------------------------------------------------------------------- one setting


def objective_of(args):
    """The objective from its two flags; an unknown name is an error."""
    from hf_baseline.objective import Objective

    known = {f.name for f in fields(Objective)} - {"weights"}
    unknown = set(args.objective) - known
    weights = dict(Objective().weights)
    for part in filter(None, args.weights.split(",")):
        name, _, value = part.partition("=")
        unknown |= {name} - set(weights)
        weights[name] = float(value)
    if unknown:
        raise ValueError(f"unknown in the objective: {', '.join(sorted(unknown))}")
    return Objective(weights=weights, **args.objective)


def worker(args) -> dict:
    """One task in one setting: its values to a file, then (unless only values are asked for) its times."""
    import torch
    from safetensors.torch import save_file

    from hf_baseline.models import Setting
    from hf_baseline.tasks import TASKS

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    args.batch_tokens = args.batch_tokens or (16384 if device == "cuda" else 2048)
    args.pack_width = args.pack_width or (args.batch_tokens if device == "cuda" else 512)
    task = TASKS[args.task[0]](args, Setting.parse(args.worker), device)
    save_file(task.values(), args.values)
    if args.repeats == 0:
        return {"device": device_name(device)}
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    for i in range(args.warmup):
        task.run(i)
    seconds, tokens = [], []
    for i in range(args.repeats):
        synchronise()
        start = time.perf_counter()
        count = task.run(args.warmup + i)
        synchronise()
        seconds.append(time.perf_counter() - start)
        tokens.append(count)
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident
    return {"device": device_name(device), "seconds": spread(seconds), "tokens": statistics.fmean(tokens),
            "tokens_per_second": statistics.median(n / s for n, s in zip(tokens, seconds)), "peak_bytes": peak}


def spread(seconds: list[float]) -> dict:
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    return {"median": statistics.median(ordered), "q1": ordered[quarter], "q3": ordered[-1 - quarter],
            "min": ordered[0], "max": ordered[-1], "repeats": len(ordered)}


def device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    model = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{model[0] if model else platform.processor()}, {torch.get_num_threads()} threads"


def run_setting(args, task: str, setting: str, values: str, repeats: int, overrides: list[str] = []) -> dict:
    """Runs `worker` in a process of its own; whatever goes wrong there becomes a record."""
    command = [sys.executable, __file__, *sys.argv[1:], *overrides, "--worker", setting, "--values", values]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    command += ["--task", task, "--repeats", str(repeats)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"more than {args.timeout:.0f} s"}
    if done.returncode == 0:
        return {"status": "ok"} | json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"status": "failed", "reason": lines[-1][:500] if lines else f"exit {done.returncode}", "exit": done.returncode}


# ------------------------------------------------------------------------------------------------- agreement


def distances(found: dict, expected: dict) -> dict:
    """Per kind of value, the largest distance and the name of the tensor that has it."""
    import torch.nn.functional as F

    worst: dict = {}
    missing = sorted(set(expected) ^ set(found))
    if missing:
        return {"names": [math.inf, missing[0]]}
    for name, value in expected.items():
        other = found[name]
        kind = name.split(".")[0]
        kind = "gradient" if kind in ("policy", "reward") and "." in name else kind
        if kind == "tokens":  # rows end where their longest does
            width = max(other.shape[1], value.shape[1])
            other, value = (F.pad(t, (0, width - t.shape[1]), value=-1) for t in (other, value))
        if other.shape != value.shape:
            return {kind: [math.inf, f"{name}: {tuple(other.shape)} against {tuple(value.shape)}"]}
        distance = (other.double() - value.double()).abs().max().item()
        if kind == "gradient":
            largest = value.abs().max().item()
            distance = distance / largest if largest > 0 else (0.0 if distance == 0 else math.inf)
        if kind == "tokens":
            distance = (other != value).double().mean().item()
        # Written so that a NaN is the worst, not the best.
        if kind not in worst or not distance <= worst[kind][0]:
            worst[kind] = [distance, name]
    return worst


def agree(worst: dict) -> bool:
    return all(distance <= LIMITS.get(kind, -1.0) for kind, (distance, _) in worst.items())


def told(worst: dict) -> str:
    return ", ".join(f"{kind} {distance:.1e} ({name})" for kind, (distance, name) in worst.items())


# ------------------------------------------------------------------------------------------------------ main


def measure(args, task: str, folder: str) -> list[dict]:
    """All settings of one task, after `ares` and the reference agreed; disagreement ends everything."""
    from safetensors.torch import load_file

    from hf_baseline.beside import beside
    from hf_baseline.tasks import read_values

    ares = beside(task)(args, task, folder) if args.ares else None
    overrides = ares.overrides() if ares else []
    reference_file = f"{folder}/{task}-reference.safetensors"
    first = run_setting(args, task, REFERENCE, reference_file, 0, overrides)
    if first["status"] != "ok":
        sys.exit(f"{task}, {REFERENCE}: {first['reason']}")
    reference, checked = load_file(reference_file), None
    if ares or args.check:
        checked = distances(ares.values() if ares else read_values(task, args.check), reference)
        print(f"{task:9} ares against {REFERENCE}: {told(checked)}", file=sys.stderr, flush=True)
        zero = [name for name, value in reference.items() if name.startswith("term.") and not value.any()]
        if zero:
            print(f"{task:9} 0 with these rows, so their agreement says little: {', '.join(zero)}", file=sys.stderr)
        if not agree(checked):
            sys.exit(f"{task}: ares and transformers disagree; nothing was timed")
    results = []
    for setting in settings_of(args, task) if args.repeats else []:
        file = f"{folder}/{task}-{setting}.safetensors"
        result = run_setting(args, task, setting, file, args.repeats, overrides)
        if result["status"] == "ok":
            worst = distances(load_file(file), reference)
            result["distance"] = {kind: distance for kind, (distance, _) in worst.items()}
            if setting.startswith("f32") and not agree(worst):
                result = {"status": "wrong", "reason": told(worst)}
        results.append({"task": task, "setting": setting} | result)
        report(results[-1])
    if ares:
        results.append({"task": task, "setting": "ares", "status": "ok"} | ratio(ares, checked, results))
        report(results[-1])
    return results


def settings_of(args, task: str) -> list[str]:
    suiting = GPU_SETTINGS if cuda_wanted(args) else CPU_SETTINGS
    return [s for s in args.setting or suiting if task != "generate" or "-padded" in s]


def ratio(ares, checked: dict, results: list[dict]) -> dict:
    """The distance of `ares`, its times, and how often its time goes into that of the best f32 setting."""
    result = {"distance": {kind: distance for kind, (distance, _) in checked.items()}}
    seconds = ares.seconds() if ares.args.repeats else []
    timed = [r for r in results if "seconds" in r and r["setting"].startswith("f32")]
    best = min(timed, key=lambda r: r["seconds"]["median"], default=None)
    if seconds:
        result["seconds"] = spread(seconds)
    if seconds and best:
        median = result["seconds"]["median"]
        result |= {"tokens_per_second": best["tokens"] / median, "beside": best["setting"],
                   "ratio": best["seconds"]["median"] / median}
    return result


def cuda_wanted(args) -> bool:
    import torch

    return args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())


def report(result: dict) -> None:
    if result["status"] == "ok" and "seconds" in result:
        s = result["seconds"]
        text = f"{s['median']:.4f} s  [{s['q1']:.4f}, {s['q3']:.4f}]  {result.get('tokens_per_second', 0):.0f} tokens/s"
        if "ratio" in result:
            text += f"  {result['ratio']:.2f} x {result['beside']}"
    else:
        text = f"{result['status']} {result.get('reason', '')}"
    print(f"{result['task']:9} {result['setting']:34} {text}", file=sys.stderr, flush=True)


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    checkout = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=checkout)
    return found | {"commit": commit.stdout.strip() or None}


def document(args, results: list[dict]) -> dict:
    best = {}
    for result in results:
        if "seconds" in result and result["setting"] != "ares":
            kind = "f32" if result["setting"].startswith("f32") else "any"
            for key in {kind, "any"}:
                label = f"{result['task']}.{key}"
                if label not in best or result["tokens_per_second"] > best[label]["tokens_per_second"]:
                    best[label] = {name: result[name] for name in ("setting", "seconds", "tokens_per_second")}
    hidden = {"worker", "values", "out", "check", "dump_gradients"}
    settings = {name: value for name, value in vars(args).items() if name not in hidden}
    settings["objective"] = asdict(args.objective)
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"schema": 1, "tool": "baseline_hf", "date": date, "versions": versions(), "arguments": settings,
            "best": best, "results": results}


def main() -> None:
    args = arguments()
    from transformers.utils import logging

    args.objective = objective_of(args)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if args.worker:
        args.task = args.task[-1:]
        print(json.dumps(worker(args)))
        return
    if args.dump_gradients:
        result = run_setting(args, "step", (args.setting or [REFERENCE])[0], args.dump_gradients, 0)
        sys.exit(0 if result["status"] == "ok" else result["reason"])
    # Load of the last minute, before anything here ran: above 0.5 the machine was not ours alone, and all that is timed should
    # run at real-time priority (chrt -r 5).
    before = {"load_before": os.getloadavg()[0], "real_time": os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)}
    with tempfile.TemporaryDirectory() as folder:
        results = [result for task in dict.fromkeys(args.task) for result in measure(args, task, folder)]
    text = json.dumps(document(args, results) | before, indent=1) + "\n"
    if args.out:
        Path(args.out).write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        # Rows, folders and settings that cannot be meant, and what `ares` says of them: told, not traced.
        sys.exit(str(error))
