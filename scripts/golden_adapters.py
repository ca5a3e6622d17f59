#!/usr/bin/env python3
"""Golden values for adapters of every kind that the loader reads: what PEFT makes of them on tests/golden/llama-causal.

    python -m pip install -r scripts/requirements.txt
    python scripts/golden_adapters.py       # writes tests/golden-adapters/, seconds; `git diff` says what moved

Per kind the adapter's folder as PEFT saves it, with random A and B, and the log-probabilities of the golden sequences' answers in float64.
"""

import json
import shutil
import zlib
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
BASE, OUT = ROOT / "tests/golden/llama-causal", ROOT / "tests/golden-adapters"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = {
    "ranks": dict(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"q_proj": 1, r"layers\.1\.mlp\.down_proj": 4}),
    "alphas": dict(r=2, lora_alpha=3, target_modules=["q_proj", "k_proj", "up_proj"], alpha_pattern={"0.self_attn.k_proj": 7, "k_proj": 0.5}),
    "rslora": dict(r=3, lora_alpha=3, target_modules=["o_proj", "gate_proj"], rank_pattern={"o_proj": 2}, alpha_pattern={"gate_proj": 5}, use_rslora=True),
    "pattern": dict(r=2, lora_alpha=4, target_modules=r"model\.layers\.\d+\.(self_attn\.(q|o)_proj|mlp\.up_proj)"),
    "all-linear": dict(r=1, lora_alpha=2, target_modules="all-linear"),
    "layers": dict(r=2, lora_alpha=3, target_modules=ATTENTION, layers_to_transform=[1], layers_pattern="layers"),
    "excluded": dict(r=2, lora_alpha=3, target_modules=ATTENTION, exclude_modules=r".*layers\.0\..*"),
}


@torch.no_grad()
def logprobs(model, sequence):
    tokens, prompt = torch.tensor(sequence["tokens"]), sequence["prompt_tokens"]
    logits = model(tokens[None]).logits[0].log_softmax(-1)
    return logits[torch.arange(prompt - 1, len(tokens) - 1), tokens[prompt:]].tolist()


def main():
    sequences = json.loads((BASE / "golden.json").read_text())["sequences"]
    shutil.rmtree(OUT, ignore_errors=True)
    values = {}
    base = lambda: AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64)
    for kind, settings in KINDS.items():
        model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind}/{name}".encode()))
                    size = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.2
                    parameter.copy_((torch.randn(parameter.shape, generator=generator) * size).float())
        model.peft_config["default"].base_model_name_or_path = "tests/golden/llama-causal"
        model.float().save_pretrained(OUT / kind)
        (OUT / kind / "README.md").unlink(missing_ok=True)
        # What is saved is what is read: PEFT opens it again.
        config = json.loads((OUT / kind / "adapter_config.json").read_text())
        if settings["target_modules"] == "all-linear":
            config["target_modules"] = "all-linear"
        config["target_modules"] = sorted(config["target_modules"]) if isinstance(config["target_modules"], list) else config["target_modules"]
        (OUT / kind / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        model = PeftModel.from_pretrained(base(), OUT / kind).to(torch.float64).eval()
        values[kind] = [logprobs(model, sequence) for sequence in sequences]
        print(kind, [round(sum(row), 3) for row in values[kind]])
    (OUT / "golden.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
