#!/usr/bin/env python3
r"""Everything that only a GPU can say, in one JSON: parity, kernels, ceilings, benchmarks, the framework beside them.

    scripts/gpu_pack.sh pack                       # where there is a compiler: binaries, data and this script, in one folder
    python3 pack/gpu_check.py --call A --out A.json # on the GPU's machine; then B and C, each complete in itself

Call A is what must be known first (parity, kernels, ceilings, step, score, decode), B holds the framework beside it, C looks
for faults of memory and at large shapes. Needs Python's standard library, a driver, libnvrtc (or --kernels); nothing is built
here. Each part runs by itself: what is missing or fails is recorded with its reason, and the rest goes on; the JSON is whole
after every part. Exit code 1 when any part that was there failed; 2 when no GPU was found. --rehearse puts the simulator in the
GPU's place, with small shapes: what it times means nothing. --predict needs no GPU: under the same names what each benchmark
launches and moves, and how long that takes at least on an H200.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Shapes as published; weights are random and made on the device.
QWEN_1_5B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 32768, "tie_word_embeddings": True, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151645,
}
QWEN_0_5B = QWEN_1_5B | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128001,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}
SHAPES = {"qwen2.5-1.5b": QWEN_1_5B, "qwen2.5-0.5b": QWEN_0_5B, "llama-3.1-8b": LLAMA_8B}
# name, policy, reward, `ares bench` arguments: the rows of the table in the README.
BENCHES = [
    ("step-1.5b-0.5b-16k-unshared", "qwen2.5-1.5b", "qwen2.5-0.5b", "step --unshared --tokens 16384 --length 1024"),
    ("step-1.5b-0.5b-16k", "qwen2.5-1.5b", "qwen2.5-0.5b", "step --tokens 16384 --length 1024"),
    # Contexts of 256 and 1024 in the mean; a step's milliseconds are 64000 / (tokens a second).
    ("decode-1.5b-64-at-256", "qwen2.5-1.5b", "qwen2.5-0.5b", "decode --sequences 64 --length 220 --new-tokens 72"),
    # Every tile beside its prediction, and the step by the tier of Hopper.
    ("products-1.5b-16k", "qwen2.5-1.5b", "qwen2.5-0.5b", "products --tokens 16384"),
    ("products-0.5b-16k", "qwen2.5-0.5b", "qwen2.5-0.5b", "products --tokens 16384"),
    ("products-8b-16k", "llama-3.1-8b", "llama-3.1-8b", "products --tokens 16384"),
    ("step-1.5b-0.5b-16k-tier", "qwen2.5-1.5b", "qwen2.5-0.5b", "step --unshared --tokens 16384 --length 1024 --tier sm_90a"),
    ("decode-1.5b-64-at-1024", "qwen2.5-1.5b", "qwen2.5-0.5b", "decode --sequences 64 --length 988 --new-tokens 72"),
    # Eight answers to a prompt, read once.
    ("decode-1.5b-64-at-1024-shared", "qwen2.5-1.5b", "qwen2.5-0.5b",
     "decode --sequences 64 --answers 8 --length 988 --new-tokens 72"),
    ("score-8b-32k", "qwen2.5-0.5b", "llama-3.1-8b", "score --tokens 32768 --length 1024 --batch-tokens 32768"),
    ("step-8b-8b-16k", "llama-3.1-8b", "llama-3.1-8b", "step --tokens 16384 --length 1024"),
    ("ops-1.5b-16k", "qwen2.5-1.5b", "qwen2.5-0.5b", "ops --tokens 16384 --length 1024"),
    ("ops-8b-16k", "llama-3.1-8b", "llama-3.1-8b", "ops --tokens 16384 --length 1024"),
    # Checkpoints that are there: the suite's, unless others are named.
    ("load", None, None, "load"),
]
PARTS = ("doctor", "kernels", "tests", "ceilings", "bench", "counters", "baseline", "sanitizer")
# Parts and benchmarks of a call in order of worth, and the seconds after which it begins nothing more.
CALLS = {
    "A": (("doctor", "tests", "bench", "ceilings", "counters", "kernels"), 480,
          ("products-1.5b-16k", "step-1.5b-0.5b-16k-unshared", "step-1.5b-0.5b-16k-tier", "decode-1.5b-64-at-256", "score-8b-32k",
           "ops-1.5b-16k")),
    "B": (("baseline", "ceilings"), 480, ()),
    "C": (("bench", "sanitizer", "kernels"), 540,
          ("products-0.5b-16k", "products-8b-16k", "step-1.5b-0.5b-16k", "step-8b-8b-16k", "decode-1.5b-64-at-1024",
           "decode-1.5b-64-at-1024-shared", "ops-8b-16k", "load")),
}
# Shapes at which a rehearsal runs, and how much.
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 1152, "bos_token_id": 0, "eos_token_id": 1}
LITTLE = "--tokens 32 --length 8 --batch-tokens 32 --sequences 2 --new-tokens 10 --warmup 0 --repeats 1".split()
# What the framework's own library reaches on this card, in the same call: matrix products (M, N, K) and a copy.
CEILINGS = """
import json, statistics, torch
def seconds(work, sets):
    for i in range(3): work(i % sets)
    torch.cuda.synchronize()
    found = []
    for i in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(); work(i % sets); end.record(); torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)
result = {"torch": torch.__version__, "cuda": torch.version.cuda, "products": []}
for m, n, k in [(8192, 8192, 8192), (16384, 2048, 1536), (16384, 17920, 1536), (16384, 1536, 8960), (16384, 9728, 896),
                (16384, 896, 4864), (16384, 28672, 4096), (16384, 4096, 14336), (1408, 151936, 1536), (64, 17920, 1536)]:
    sets = max(2, (128 << 20) // (2 * (m * k + n * k)) + 1)
    x = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    w = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    took = seconds(lambda i: torch.mm(x[i], w[i].t()), sets)
    result["products"].append({"m": m, "n": n, "k": k, "seconds": took, "flops_per_s": 2 * m * n * k / took})
a = [torch.randn(1 << 29, device="cuda") for _ in range(2)]
b = torch.empty_like(a[0])
result["copy_bytes_per_s"] = 8 * a[0].numel() / seconds(lambda i: b.copy_(a[i]), 2)
print(json.dumps(result))
"""
# Hardware counters of some launches of the kernels that a step spends its time in.
METRICS = ",".join(("gpu__time_duration.sum", "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
                    "sm__inst_executed_pipe_tensor.sum", "dram__bytes.sum", "lts__t_bytes.sum",
                    "sm__warps_active.avg.pct_of_peak_sustained_active",
                    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"))
# A test of the source tree, which is not there.
OUTSIDE = ("--skip", "every_operation_has_its_files")
HERE = Path(__file__).resolve().parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--call", choices=list(CALLS), help="the parts and benchmarks of one call, worthiest first")
    add("--rehearse", action="store_true", help="on the simulator, at small shapes")
    add("--predict", action="store_true", help="the benchmarks' plans, for results to be held against")
    add("--ares", type=Path, help="default: bin/ares beside this script, else target/release/ares")
    add("--test", action="append", default=[], metavar="NAME=PROGRAM", type=named,
        help="a prebuilt test binary; repeat (default: bin/ops and bin/parity beside this script)")
    add("--tests", type=Path, help="folder of the tests' data (default: tests beside this script)")
    add("--kernels", type=Path, help="a pack, for machines without libnvrtc")
    add("--nvrtc", type=Path, help="libnvrtc or its folder")
    add("--device", type=int, default=0)
    add("--part", action="append", choices=PARTS, help="only these; repeat (default: all)")
    add("--bench", action="append", metavar="NAME", help=f"only these of {', '.join(b[0] for b in BENCHES)}")
    add("--load", nargs=2, type=Path, metavar=("POLICY", "REWARD"), help="checkpoints to load (default: the suite's)")
    add("--baseline", nargs=argparse.REMAINDER, default=None, metavar="COMMAND",
        help="the framework's command, last: it writes its JSON to stdout, e.g. python3 scripts/baseline_hf.py --task step …")
    add("--limit", type=float, default=300.0, help="seconds per command")
    add("--total", type=float, help="seconds in all: parts that would begin later are recorded as not run (default: the call's)")
    add("--out", type=Path, required=True, help="JSON, written after every part")
    args = parser.parse_args()
    parts, total, benches = CALLS.get(args.call, (PARTS, 1500, ()))
    parts = ("bench",) if args.predict else parts
    args.part, args.total, args.bench = args.part or parts, args.total or total, args.bench or benches
    packed = HERE / "bin"
    args.ares = (args.ares or (packed if packed.is_dir() else HERE.parent / "target/release") / "ares").resolve()
    args.test = args.test or [(name, str(packed / name)) for name in ("ops", "parity") if (packed / name).is_file()]
    args.tests = args.tests or next((f for f in (HERE / "tests", HERE.parent / "tests") if f.is_dir()), None)
    args.kernels = args.kernels or next((f for f in (HERE / "kernels.pack",) if f.is_file()), None)
    args.nvrtc = args.nvrtc or nvrtc()
    return args


def nvrtc():
    """The newest libnvrtc below any Python's site-packages: where the framework's wheels put it."""
    folders = {Path(folder) for folder in sys.path if folder.endswith("-packages")}
    folders |= {Path(p).resolve().parent.parent / "lib" for p in (shutil.which("python3"), sys.executable) if p}
    found = (lib for folder in folders for lib in folder.glob("**/nvidia/*/lib/libnvrtc.so.1[23]"))
    return max(found, key=lambda lib: lib.name, default=None)


def named(test: str) -> tuple[str, str]:
    name, program = test.split("=", 1)
    return name, program


class Check:
    """Runs commands, and writes down what came of them."""

    def __init__(self, args) -> None:
        self.args = args
        self.begin = time.monotonic()
        self.failed = False
        self.result = {"schema": 1, "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
        self.cache = tempfile.TemporaryDirectory(prefix="ares-gpu-check-")
        self.device = "sim:sm_90a" if args.rehearse else f"cuda:{args.device}"
        needs = {"ARES_REQUIRE_SIM": "1"} if args.rehearse else {"ARES_REQUIRE_GPU": "1"}
        self.environment = os.environ | needs | {"ARES_CACHE": self.cache.name, "ARES_PARITY_DEVICE": self.device.split(":0")[0]}
        for name, value in (("ARES_KERNELS", args.kernels), ("ARES_NVRTC", args.nvrtc), ("ARES_TESTS", args.tests)):
            if value:
                self.environment[name] = str(value.resolve())

    def command(self, *words) -> dict:
        """Exit code, seconds and output; a command that is missing or too slow is a result as well."""
        begin = time.monotonic()
        left = self.args.total - (begin - self.begin)
        if left <= 5:
            return {"not_run": f"{self.args.total:.0f} s were used up"}
        try:
            done = subprocess.run([str(word) for word in words], env=self.environment, capture_output=True, text=True,
                                  errors="replace", timeout=min(self.args.limit, left))
        except FileNotFoundError as error:
            return {"missing": str(error)}
        except OSError as error:
            return {"error": str(error)}
        except subprocess.TimeoutExpired as error:
            tail = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
            return {"error": f"not done after {error.timeout:.0f} s", "output": tail[-4000:]}
        seconds = round(time.monotonic() - begin, 3)
        return {"code": done.returncode, "seconds": seconds, "stdout": done.stdout, "stderr": done.stderr}

    def json(self, *words) -> dict:
        """The object that a command prints, or why there is none."""
        found = self.command(*words)
        if found.get("code") != 0:
            return self.fault(found)
        try:
            return {"seconds": found["seconds"], "found": json.loads(found["stdout"])}
        except ValueError as error:
            return self.fault({"error": f"expected JSON: {error}", "output": found["stdout"][-2000:]})

    def fault(self, found: dict) -> dict:
        """A failure, with the end of what was printed."""
        # A plan needs nothing but the program itself.
        self.failed |= self.args.predict or not found.keys() & {"missing", "not_run"}
        for stream in ("stdout", "stderr"):
            if stream in found:
                found[stream] = found[stream][-4000:]
        return found

    def keep(self, part: str, value) -> None:
        self.result[part] = value
        self.result["seconds"] = round(time.monotonic() - self.begin, 1)
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        self.args.out.write_text(json.dumps(self.result, indent=1) + "\n")
        print(f"{time.monotonic() - self.begin:7.1f} s  {part}", file=sys.stderr)

    # ------------------------------------------------------------------------------------------------- parts

    def machine(self) -> bool:
        if self.args.rehearse or self.args.predict:
            self.keep("gpu", {"rehearsal": self.device} if self.args.rehearse else {"predicted": "an H200"})
            return True
        fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,compute_cap"
        found = self.command("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", self.args.device)
        if found.get("code") == 0:
            values = [value.strip() for value in found["stdout"].strip().split(",")]
            self.keep("gpu", dict(zip(fields.split(","), values)))
            return True
        # Some containers have the driver and not its tools.
        self.keep("gpu", self.fault(found))
        return bool(self.json(self.args.ares, "doctor", "--json").get("found", {}).get("gpus"))

    def doctor(self) -> dict:
        return self.json(self.args.ares, "doctor", "--device", self.device, "--json")

    def kernels(self) -> dict:
        """Compiled anew and then from the cache; the second is what every later start pays."""
        capability = str(self.result.get("gpu", {}).get("compute_cap", ""))
        arch = {"8": "sm_80", "9": "sm_90a", "10": "sm_100", "12": "sm_120"}.get(capability.split(".")[0], "sm_90a")
        words = [self.args.ares, "kernels", "--arch", arch, "--check", "--json"]
        return {"arch": arch, "cold": self.json(*words), "warm_seconds": self.command(*words).get("seconds")}

    def tests(self) -> dict:
        """By the kernels of every architecture, then, on Hopper, by its own."""
        hopper = self.args.rehearse or str(self.result.get("gpu", {}).get("compute_cap", "")).startswith("9")
        found = {}
        for name, program, tier in [(*test, tier) for tier in ("sm_80", "sm_90a")[:1 + hopper] for test in self.args.test]:
            self.environment["ARES_TIER"] = tier
            name = f"{name}-{tier}"
            # One thread: kernels are timed and captured on one device.
            run = self.command(program, "--test-threads=1", "--show-output", *OUTSIDE)
            del self.environment["ARES_TIER"]
            text = run.get("stdout", "")
            counts = re.search(r"(\d+) passed; (\d+) failed; (\d+) ignored", text)
            found[name] = {
                "code": run.get("code"), "seconds": run.get("seconds"),
                "skipped": [line for line in text.splitlines() if line.startswith("skipped: ")],
            }
            if counts:
                found[name] |= dict(zip(("passed", "failed", "ignored"), map(int, counts.groups())))
            if run.get("code") != 0:
                found[name] |= self.fault(run)
        return found or {"missing": "no --test NAME=PROGRAM"}

    def ceilings(self) -> dict:
        if self.args.rehearse:
            return {"missing": "a GPU: the framework has no simulator"}
        return self.json("python3", "-c", CEILINGS)

    def counters(self) -> dict:
        """A few launches of each kernel that matters, under Nsight Compute, where it is installed."""
        name, policy, reward, words = BENCHES[0]
        found = {}
        with self.shapes() as folder:
            models = ["--policy", Path(folder, f"{policy}.json"), "--reward", Path(folder, f"{reward}.json"), "--layers", "2"]
            for kernels in ("product", "attention_forward", "attention_backward_queries", "attention_backward_keys", "lora_partial"):
                profile = ["ncu", "--clock-control", "none", "--csv", "--metrics", METRICS, "--kernel-name", kernels,
                           "--launch-skip", "12", "--launch-count", "6"]
                run = self.command(*profile, self.args.ares, "bench", *self.words(words), "--warmup", "0", "--repeats", "1",
                                   "--device", self.device, *models)
                found[kernels] = run["stdout"].splitlines()[-60:] if run.get("code") == 0 else self.fault(run)
                if "missing" in run:
                    break
        return found

    def sanitizer(self) -> dict:
        """Parity again under compute-sanitizer, where it is installed."""
        found = {}
        for name, program in self.args.test:
            for tool in ("memcheck", "racecheck"):
                run = self.command("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", program, "--test-threads=1", "parity",
                                   *OUTSIDE)
                errors = re.search(r"ERROR SUMMARY: (\d+)", run.get("stdout", ""))
                found[f"{name}-{tool}"] = {"errors": int(errors[1]) if errors else None, "code": run.get("code")}
                if run.get("code") != 0:
                    found[f"{name}-{tool}"] |= self.fault(run)
        return found

    @contextlib.contextmanager
    def shapes(self):
        """A folder with the configs."""
        with tempfile.TemporaryDirectory() as folder:
            for name, config in SHAPES.items():
                Path(folder, f"{name}.json").write_text(json.dumps(config | (TINY if self.args.rehearse else {})))
            yield folder

    def words(self, words: str) -> list:
        words = words.split()
        return [word for word in words if word.isalpha()] + LITTLE if self.args.rehearse else words

    def bench(self) -> dict:
        found = {}
        with self.shapes() as folder:
            for name, policy, reward, words in BENCHES:
                if self.args.bench and name not in self.args.bench:
                    continue
                if self.args.predict and words.split()[0] in ("ops", "load"):
                    continue  # parts of the others, and what no plan knows
                if policy:
                    models = ["--policy", Path(folder, f"{policy}.json"), "--reward", Path(folder, f"{reward}.json")]
                else:
                    models = ["--policy", self.args.load[0], "--reward", self.args.load[1]] if self.args.load else []
                device = ["--json", "--plan"] if self.args.predict else ["--json", "--device", self.device]
                found[name] = self.json(self.args.ares, "bench", *self.words(words), *models, *device)
                self.keep("bench", found)
        return found

    def baseline(self) -> dict:
        """The framework on the same rows: the command that was given, or at the shapes of a step, weights of random numbers."""
        if self.args.baseline:
            return self.json(*self.args.baseline)
        wheels = sorted((HERE / "wheels").glob("*.whl"))
        if wheels:
            folder = Path(self.cache.name) / "packages"
            self.command("python3", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, *wheels)
            self.environment["PYTHONPATH"] = str(folder)
        with self.shapes() as folder:
            work, found = Path(folder) / "work", {}
            for role, shape in (("policy", "qwen2.5-1.5b"), ("reward", "qwen2.5-0.5b")):
                config = Path(folder) / role
                config.mkdir()
                (config / "config.json").write_text(Path(folder, f"{shape}.json").read_text())
                size = ["--rows", "8", "--tokens", "8", "12"] if self.args.rehearse else ["--rows", "64", "--tokens", "200", "450"]
                made = self.command("python3", HERE / "random_workload.py", config / "config.json", work / role, "--only", role,
                                    "--tokenizer", HERE / "tokenizer", "--dtype", "bfloat16", *size)
                if made.get("code") != 0:
                    return self.fault(made)
            rows = [word for name in ("failures", "retain", "replay") for word in (f"--{name}", work / f"policy/{name}.jsonl")]
            device = "cpu" if self.args.rehearse else "cuda"
            for task, size in (("step", ["--items", "8", "8", "8"]), ("score", ["--limit", "64"])):
                out = Path(folder) / f"{task}.json"
                few = ["--repeats", "0"] if self.args.rehearse else ["--repeats", "5", "--warmup", "2"]
                run = self.command("python3", HERE / "baseline_hf.py", "--task", task, "--policy", work / "policy/policy", "--reward",
                                   work / "reward/reward", *rows, *size, *few, "--device", device, "--ares", self.args.ares,
                                   "--timeout", "120", "--out", out)
                found[task] = json.loads(out.read_text()) if run.get("code") == 0 else self.fault(run)
                self.keep("baseline", found)
        return found


def main() -> None:
    args = arguments()
    check = Check(args)
    print(f"call {args.call or '-'}: {', '.join(args.part)}; begins nothing after {args.total:.0f} s", file=sys.stderr)
    if not check.machine():
        print("no GPU found", file=sys.stderr)
        sys.exit(2)
    check.result["call"] = args.call
    for part in args.part:
        check.keep(part, getattr(check, part)())
    sys.exit(1 if check.failed else 0)


if __name__ == "__main__":
    main()
