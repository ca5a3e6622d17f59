#!/usr/bin/env python3
"""ARES's work done by torch + transformers + PEFT: the same folders, the same JSONL, every honest setting.

    python -m pip install -r scripts/requirements.txt
    python scripts/baseline_hf.py --policy models/framing/policy --reward models/framing/reward \\
        --failures F.jsonl --retain R.jsonl --replay P.jsonl --task step --task score --ares target/release/ares --out O.json

Each setting runs in a process of its own, so that peak memory and failures are its own. The reference is the framework
in float64; distances are relative to a tensor's largest value. f32 settings further from it than LIMITS are recorded as wrong
and not timed; bf16 settings are timed with their distance stated.

`--ares PROGRAM` runs `ares` itself on the same rows, first for its values: on disagreement with the reference nothing is
timed (exit 1, with the term or tensor and the amount). On the CPU, where `ares` computes in f32, LIMITS hold for it as well. On a
GPU it computes in bf16: its distance may be at most OF_BF16 times that of the framework's own bf16, and only bf16 settings are
timed. Then for its seconds, beside the framework's. A step is that of `ares
repair` on the first `--items` of each file, all of them in every step, with the same forced prefixes and adapters; scores are
of both answers of the replay pairs, log-probabilities and answers of the rows to retain. `--repeats 0` checks agreement only.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from hf_baseline.beside import Beside, RowsBeside, StepBeside
from hf_baseline.models import Setting
from hf_baseline.objective import WEIGHTS, Objective
from hf_baseline.tasks import TASKS

REFERENCE = "f64-eager-padded"
CPU_SETTINGS = ["f32-eager-padded", "f32-eager-bucketed", "f32-eager-packed", "f32-compile-padded", "f32-compile-bucketed",
                "f32-compile-packed", "bf16-eager-padded", "bf16-eager-bucketed", "bf16-eager-bucketed-adapter_bf16"]
# In order of worth: a call that is cut short keeps the first ones.
GPU_SETTINGS = ["bf16-eager-packed", "bf16-compile-packed", "bf16-eager-packed-liger", "bf16-eager-padded", "bf16-compile-padded",
                "bf16-compile-packed-adapter_bf16", "bf16-eager-packed-adapter_bf16", "bf16-eager-packed-checkpointing"]
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "liger-kernel", "flash-attn", "triton")
NEEDS = {"step": ("policy", "reward", "failures", "retain", "replay"), "score": ("reward", "replay"),
         "logprob": ("policy", "retain"), "generate": ("policy", "retain")}
# Largest allowed distance in f32, relative to a tensor's largest value, and to 1 where that is smaller and no gradient.
# A near tie may part two greedy continuations for good: a fiftieth of the tokens may differ.
LIMITS = {"term": 1e-4, "gradient": 1e-3, "reward": 1e-4, "logprob": 1e-4, "tokens": 0.02}
# Two roundings of the same kind lie about √2 of one of them apart; this is from float64, so 1 is what is expected.
OF_BF16 = 1.5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", action="append", choices=list(NEEDS), required=True)
    add("--policy", metavar="DIR[+ADAPTER]")
    add("--reward", metavar="DIR[+ADAPTER]")
    add("--failures", metavar="FILE", help="prompt, rejected, chosen, verdict, or a split's prompt, harmful, safe; `forced`: tokens "
        "of the forced prefix")
    add("--retain", metavar="FILE", help="prompt, response")
    add("--replay", metavar="FILE", help="prompt, chosen, rejected; `harmful`: the judge's word on both")
    add("--setting", action="append", help="e.g. f32-compile-packed; repeat; default: all that suit the device")
    add("--ares", metavar="PROGRAM", help="run `ares` on the same rows too: check, time, ratio")
    add("--out", metavar="FILE", help="JSON (default: stdout)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--threads", type=int, default=os.cpu_count())
    add("--warmup", type=int, default=2)
    add("--repeats", type=int, default=7)
    add("--timeout", type=float, default=900.0, help="seconds per setting")
    add("--seed", type=int, default=0, help="of forced prefixes and of adapters that are made here")
    add("--items", type=int, nargs=3, default=[0, 0, 0], metavar=("FAILURES", "RETAIN", "REPLAY"),
        help="rows in one step (0: the whole file)")
    add("--batch-tokens", type=int, default=0,
        help="tokens of one forward, padding included (0: 2048 on cpu, which is faster there, 16384 on cuda)")
    add("--limit", type=int, help="answers that score and logprob read")
    add("--sequences", type=int, default=64, help="prompts that generate answers at once")
    add("--max-new-tokens", type=int, default=64)
    add("--ignore-eos", action="store_true")
    add("--objective", type=json.loads, default={}, metavar="JSON",
        help='likelihood, logp, b, margin, retain ("ce"|"kl"), coupling, tau_r, mu_0, s; weights: an object')
    args = parser.parse_args()
    for task in args.task:
        missing = [f"--{name}" for name in NEEDS[task] if not getattr(args, name)]
        if missing:
            parser.error(f"--task {task} needs {', '.join(missing)}")
    try:
        weights = WEIGHTS | args.objective.get("weights", {})
        args.objective = asdict(Objective(**args.objective | {"weights": weights}))
    except (TypeError, AttributeError) as error:
        parser.error(f"--objective: {error}")
    if weights.keys() != WEIGHTS.keys():
        parser.error(f"--objective: expected the weights {', '.join(WEIGHTS)}, found {', '.join(weights)}")
    return args


# ----------------------------------------------------------------------------------------------- one setting


def worker(args: argparse.Namespace) -> dict:
    """One task in one setting: its values to a file, then (unless only values are asked for) its times."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    cuda = cuda_wanted(args)
    tokens = args.batch_tokens or (16384 if cuda else 2048)
    limits = (tokens, tokens if cuda else 512)
    task = TASKS[args.task](args, Setting.parse(args.setting), "cuda" if cuda else "cpu", limits)
    save_file(task.values(), args.values)
    if args.repeats == 0:
        return {"device": device_name(cuda)}
    synchronise = torch.cuda.synchronize if cuda else lambda: None
    for i in range(args.warmup):
        task.run(i)
    seconds, tokens = [], []
    for i in range(args.repeats):
        synchronise()
        start = time.perf_counter()
        tokens.append(task.run(args.warmup + i))
        synchronise()
        seconds.append(time.perf_counter() - start)
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"device": device_name(cuda), "seconds": spread(seconds), "tokens": statistics.fmean(tokens),
            "tokens_per_second": statistics.median(n / s for n, s in zip(tokens, seconds)),
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else resident}


def cuda_wanted(args: argparse.Namespace) -> bool:
    return args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())


def spread(seconds: list[float]) -> dict:
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    return {"median": statistics.median(ordered), "q1": ordered[quarter], "q3": ordered[-1 - quarter],
            "min": ordered[0], "max": ordered[-1], "repeats": len(ordered)}


def device_name(cuda: bool) -> str:
    if cuda:
        return torch.cuda.get_device_name()
    # Virtual machines name the make alone: family and model tell its generations apart.
    about = dict(re.findall(r"^(cpu family|model|model name|flags)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M))
    name = about.get("model name", platform.processor())
    number = f"family {about.get('cpu family', '?')} model {about.get('model', '?')}"
    vectors = next((isa for isa in ("avx512f", "avx2") if isa in about.get("flags", "").split()), "neither avx512f nor avx2")
    return f"{name} ({number}, {vectors}), {torch.get_num_threads()} threads"


def run_setting(args: argparse.Namespace, setting: str, values: Path, repeats: int) -> dict:
    """Runs `worker` in a process of its own; whatever goes wrong there becomes a record."""
    wanted = vars(args) | {"setting": setting, "values": str(values), "repeats": repeats}
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run([sys.executable, __file__, "--worker", json.dumps(wanted)], capture_output=True, text=True,
                              env=environment, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"more than {args.timeout:.0f} s"}
    if done.returncode == 0:
        return {"status": "ok"} | json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return {"status": "failed", "reason": lines[-1][:500] if lines else f"exit {done.returncode}", "exit": done.returncode}


# ------------------------------------------------------------------------------------------------- agreement


def distances(found: dict, expected: dict) -> dict:
    """Per kind of value, the largest distance and the name of the tensor that has it."""
    worst: dict = {}
    missing = sorted(set(expected) ^ set(found))
    if missing:
        return {"names": [math.inf, missing[0]]}
    for name, value in expected.items():
        other, kind = found[name], name.split(".")[0]
        if kind == "tokens":  # rows end where their longest does
            width = max(other.shape[1], value.shape[1])
            other, value = (F.pad(t, (0, width - t.shape[1]), value=-1) for t in (other, value))
        if other.shape != value.shape:
            return {kind: [math.inf, f"{name}: {tuple(other.shape)} against {tuple(value.shape)}"]}
        distance, largest = (other.double() - value.double()).abs().max().item(), value.abs().max().item()
        if kind == "tokens":
            distance = (other != value).double().mean().item()
        elif kind in ("policy", "reward") and "." in name:
            kind = "gradient"
            distance = distance / largest if largest > 0 else (0.0 if distance == 0 else math.inf)
        else:
            distance /= max(largest, 1.0)
        # Written so that a NaN is the worst, not the best.
        if kind not in worst or not distance <= worst[kind][0]:
            worst[kind] = [distance, name]
    return worst


def agree(worst: dict, limits: dict = LIMITS) -> bool:
    return all(distance <= limits.get(kind, -1.0) for kind, (distance, _) in worst.items())


def limits_of_bf16(own: dict) -> dict:
    """What `ares` in bf16 may differ by, of what the framework's own bf16 differs by; f32's limits where that is less."""
    return {kind: max(OF_BF16 * distance, LIMITS.get(kind, -1.0)) for kind, (distance, _) in own.items()}


def described(worst: dict) -> str:
    return ", ".join(f"{kind} {distance:.1e} ({name})" for kind, (distance, name) in worst.items())


# ------------------------------------------------------------------------------------------------------ main


def measure(args: argparse.Namespace, task: str, folder: Path) -> list[dict]:
    """All settings of one task, after `ares` and the reference agreed; disagreement ends everything."""
    folder.mkdir()
    beside = (StepBeside if task == "step" else RowsBeside)(args, task, folder)
    values, checked = folder / "values.safetensors", None
    first = run_setting(beside.args, REFERENCE, values, 0)
    if first["status"] != "ok":
        sys.exit(f"{task}, {REFERENCE}: {first['reason']}")
    reference, limits, cuda = load_file(values), LIMITS, cuda_wanted(args)
    if args.ares and cuda:
        own = run_setting(beside.args, "bf16-eager-padded", values, 0)
        if own["status"] != "ok":
            sys.exit(f"{task}, bf16-eager-padded: {own['reason']}")
        limits = limits_of_bf16(distances(load_file(values), reference))
    if args.ares:
        checked = distances(beside.values(), reference)
        print(f"{task:9} ares against {REFERENCE}: {described(checked)}", file=sys.stderr, flush=True)
        zero = [name for name, value in reference.items() if name.startswith("term.") and not value.any()]
        if zero:
            print(f"{task:9} 0 with these rows, so their agreement says little: {', '.join(zero)}", file=sys.stderr)
        if not agree(checked, limits):
            print(f"{task:9} limits: {limits}", file=sys.stderr)
            sys.exit(f"{task}: ares and transformers disagree; nothing was timed")
    results = []
    for setting in settings_of(args, task) if args.repeats else []:
        result = run_setting(beside.args, setting, values, args.repeats)
        if result["status"] == "ok":
            worst = distances(load_file(values), reference)
            result["distance"] = {kind: distance for kind, (distance, _) in worst.items()}
            if setting.startswith("f32") and not agree(worst):
                result = {"status": "wrong", "reason": described(worst)}
        results.append({"task": task, "setting": setting} | result)
        report(results[-1])
    if args.ares:
        results.append({"task": task, "setting": "ares", "status": "ok"} | ratio(beside, checked, results))
        report(results[-1])
    return results


def settings_of(args: argparse.Namespace, task: str) -> list[str]:
    suiting = GPU_SETTINGS if cuda_wanted(args) else CPU_SETTINGS
    return [s for s in args.setting or suiting if task != "generate" or "-padded" in s]


def ratio(beside: Beside, checked: dict, results: list[dict]) -> dict:
    """The distance of `ares`, its times, and how often its time goes into that of the best setting of the same precision."""
    result = {"distance": {kind: distance for kind, (distance, _) in checked.items()}}
    if not beside.args.repeats:
        return result
    result["seconds"] = spread(beside.seconds())
    precision = "bf16" if cuda_wanted(beside.args) else "f32"
    timed = [r for r in results if "seconds" in r and r["setting"].startswith(precision)]
    if timed:
        best, median = min(timed, key=lambda r: r["seconds"]["median"]), result["seconds"]["median"]
        result |= {"tokens_per_second": best["tokens"] / median, "beside": best["setting"],
                   "ratio": best["seconds"]["median"] / median}
    return result


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
    present = {distribution.name for distribution in importlib.metadata.distributions()}
    found = {package: importlib.metadata.version(package) if package in present else None for package in PACKAGES}
    command = ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True)
    return {"python": platform.python_version()} | found | {"commit": commit.stdout.strip() or None}


def main() -> None:
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(argparse.Namespace(**json.loads(sys.argv[2])))))
        return
    args = arguments()
    document = {"schema": 1, "tool": "baseline_hf", "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "versions": versions(), "arguments": {k: v for k, v in vars(args).items() if k != "out"}}
    # Load of the last minute, before anything here ran: above 0.5 the machine was not ours alone, and all that is timed should
    # run at real-time priority (chrt -r 5).
    document["load_before"] = os.getloadavg()[0]
    document["real_time"] = os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(args, task, Path(folder) / task) for task in dict.fromkeys(args.task)]
    text = json.dumps(document | {"results": sum(results, [])}, indent=1) + "\n"
    if args.out:
        Path(args.out).write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        # Rows, folders and settings that cannot be meant, and what `ares` says of them: reported, not traced.
        sys.exit(str(error))
