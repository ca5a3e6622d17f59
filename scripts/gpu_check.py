#!/usr/bin/env python3
r"""Everything that only a GPU can say, in one JSON: parity, kernels, ceilings, benchmarks, the framework beside them.

    cargo build --release && cargo test --release --no-run
    python3 scripts/gpu_check.py --ares target/release/ares --test ops=target/release/deps/ops-0123… \
        --test parity=target/release/deps/parity-4567… --out H200.json

Needs Python's standard library, a driver, libnvrtc (or --kernels) and binaries built elsewhere; nothing is built here. Each
part runs by itself: what is missing or fails is recorded with its reason, and the rest goes on. Exit code 1 when any part
that was there failed; 2 when no GPU was found.
"""

import argparse
import datetime
import json
import os
import re
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
    ("step-1.5b-0.5b-16k", "qwen2.5-1.5b", "qwen2.5-0.5b", "step --tokens 16384 --length 1024"),
    # Contexts of 256 and 1024 in the mean; a step's milliseconds are 64000 / (tokens a second).
    ("decode-1.5b-64-at-256", "qwen2.5-1.5b", "qwen2.5-0.5b", "decode --sequences 64 --length 220 --new-tokens 72"),
    ("decode-1.5b-64-at-1024", "qwen2.5-1.5b", "qwen2.5-0.5b", "decode --sequences 64 --length 988 --new-tokens 72"),
    ("score-8b-32k", "qwen2.5-0.5b", "llama-3.1-8b", "score --tokens 32768 --length 1024 --batch-tokens 32768"),
    ("step-8b-8b-16k", "llama-3.1-8b", "llama-3.1-8b", "step --tokens 16384 --length 1024"),
    ("ops-1.5b-16k", "qwen2.5-1.5b", "qwen2.5-0.5b", "ops --tokens 16384 --length 1024"),
    ("ops-8b-16k", "llama-3.1-8b", "llama-3.1-8b", "ops --tokens 16384 --length 1024"),
    # Checkpoints that are there: the suite's, unless others are named.
    ("load", None, None, "load"),
]
PARTS = ("doctor", "kernels", "tests", "sanitizer", "bench", "baseline")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ares", type=Path, default=Path("target/release/ares"))
    add("--test", action="append", default=[], metavar="NAME=PROGRAM", type=named, help="a prebuilt test binary; repeat")
    add("--kernels", type=Path, help="a pack, for machines without libnvrtc")
    add("--nvrtc", type=Path, help="libnvrtc or its folder")
    add("--device", type=int, default=0)
    add("--part", action="append", choices=PARTS, help="only these; repeat (default: all)")
    add("--bench", action="append", metavar="NAME", help=f"only these of {', '.join(b[0] for b in BENCHES)}")
    add("--load", nargs=2, type=Path, metavar=("POLICY", "REWARD"), help="checkpoints to load (default: the suite's)")
    add("--baseline", nargs=argparse.REMAINDER, default=None, metavar="COMMAND",
        help="the framework's command, last: it writes its JSON to stdout, e.g. python3 scripts/baseline_hf.py --task step …")
    add("--limit", type=float, default=300.0, help="seconds per command")
    add("--total", type=float, default=1500.0, help="seconds in all: parts that would begin later are recorded as not run")
    add("--out", type=Path, required=True, help="JSON, written after every part")
    return parser.parse_args()


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
        self.environment = os.environ | {"ARES_REQUIRE_GPU": "1", "ARES_CACHE": self.cache.name, "ARES_PARITY_DEVICE": "cuda"}
        for name, value in (("ARES_KERNELS", args.kernels), ("ARES_NVRTC", args.nvrtc)):
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
        self.failed |= "missing" not in found and "not_run" not in found
        for stream in ("stdout", "stderr"):
            if stream in found:
                found[stream] = found[stream][-4000:]
        return found

    def keep(self, part: str, value) -> None:
        self.result[part] = value
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        self.args.out.write_text(json.dumps(self.result, indent=1) + "\n")
        print(f"{time.monotonic() - self.begin:7.1f} s  {part}", file=sys.stderr)

    # ------------------------------------------------------------------------------------------------- parts

    def machine(self) -> bool:
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
        return self.json(self.args.ares, "doctor", "--device", f"cuda:{self.args.device}", "--json")

    def kernels(self) -> dict:
        """Compiled anew and then from the cache; the second is what every later start pays."""
        capability = str(self.result.get("gpu", {}).get("compute_cap", ""))
        arch = {"8": "sm_80", "9": "sm_90a", "10": "sm_100", "12": "sm_120"}.get(capability.split(".")[0], "sm_80")
        words = [self.args.ares, "kernels", "--arch", arch, "--check", "--json"]
        return {"arch": arch, "cold": self.json(*words), "warm_seconds": self.command(*words).get("seconds")}

    def tests(self) -> dict:
        found = {}
        for name, program in self.args.test:
            # One thread: kernels are timed and captured on one device.
            run = self.command(program, "--test-threads=1", "--show-output")
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

    def sanitizer(self) -> dict:
        """Parity again under compute-sanitizer, where it is installed."""
        found = {}
        for name, program in self.args.test:
            for tool in ("memcheck", "racecheck"):
                run = self.command("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", program, "--test-threads=1")
                errors = re.search(r"ERROR SUMMARY: (\d+)", run.get("stdout", ""))
                found[f"{name}-{tool}"] = {"errors": int(errors[1]) if errors else None, "code": run.get("code")}
                if run.get("code") != 0:
                    found[f"{name}-{tool}"] |= self.fault(run)
        return found

    def bench(self) -> dict:
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, config in SHAPES.items():
                Path(folder, f"{name}.json").write_text(json.dumps(config))
            for name, policy, reward, words in BENCHES:
                if self.args.bench and name not in self.args.bench:
                    continue
                if policy:
                    models = ["--policy", Path(folder, f"{policy}.json"), "--reward", Path(folder, f"{reward}.json")]
                else:
                    models = ["--policy", self.args.load[0], "--reward", self.args.load[1]] if self.args.load else []
                device = ["--device", f"cuda:{self.args.device}", "--json"]
                found[name] = self.json(self.args.ares, "bench", *words.split(), *models, *device)
                self.keep("bench", found)
        return found

    def baseline(self) -> dict:
        if not self.args.baseline:
            return {"missing": "no --baseline COMMAND"}
        return self.json(*self.args.baseline)


def main() -> None:
    args = arguments()
    args.ares = args.ares.resolve()
    check = Check(args)
    if not check.machine():
        print("no GPU found", file=sys.stderr)
        sys.exit(2)
    for part in PARTS:
        if args.part and part not in args.part:
            continue
        check.keep(part, getattr(check, part)())
    check.keep("seconds", round(time.monotonic() - check.begin, 1))
    sys.exit(1 if check.failed else 0)


if __name__ == "__main__":
    main()
