#!/usr/bin/env python3
"""Golden values for classifiers' heads: what torch computes of every head that the loader knows, on the guard's tiny trunk.

    python -m pip install -r scripts/requirements.txt
    python scripts/golden_heads.py          # writes tests/golden-heads/, seconds; `git diff` says what moved

The trunk and the tokenizer are those of tests/golden-guard. heads.safetensors holds each rule's own tensors as `RULE/NAME`, and as `RULE/gradient` the
gradient of the sum of c * reward over all rows by layer 0's down_proj. transformers' own classes are run as they are; the other heads are modules of
torch, put together as their trainers do. Everything in float64.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
TRUNK, OUT = ROOT / "tests/golden-guard", ROOT / "tests/golden-heads"
PLAIN = "LlamaForSequenceClassification"
WIDTH = 32
EOS = 3

# name: (what config.json says, the head's name, its hidden layer, its biases, the trunk's prefix)
RULES = {
    "plain": ({"architectures": [PLAIN], "num_labels": 1}, "score", None, False, "model."),
    "pad-is-eos": ({"architectures": [PLAIN], "num_labels": 1, "pad_token_id": EOS}, "score", None, False, "model."),
    "no-pad": ({"architectures": [PLAIN], "num_labels": 1, "pad_token_id": None}, "score", None, False, "model."),
    "openrlhf": ({"architectures": ["RewardModel"], "value_head_prefix": "value_head", "pad_token_id": EOS, "normalize_reward": True,
                  "mean": 0.25, "std": 1.75}, "value_head", None, False, "model."),
    "openrlhf-raw": ({"architectures": ["RewardModel"], "normalize_reward": False, "mean": 0.25, "std": 1.75}, "score", None, False, "model."),
    "grm-linear": ({"architectures": ["GRewardModel"]}, "v_head.summary", None, True, "model."),
    "grm-two-layers": ({"architectures": ["GRewardModel"], "pad_token_id": EOS}, "v_head.summary", 24, True, "model."),
    "inf-orm": ({"architectures": ["INFORMForSequenceClassification"], "num_labels": 1, "pad_token_id": EOS}, "score", WIDTH, True, "model."),
    "ultra-rm": ({"architectures": ["LlamaRewardModel"], "pad_token_id": EOS}, "regression_head", None, False, "model."),
    "starling": ({"architectures": [PLAIN]}, "v_head", None, False, "transformer."),
    "safe-rlhf": ({"architectures": ["LlamaForScore"], "pad_token_id": EOS, "do_normalize": True}, "score_head", None, True, "model."),
    "causal-inside": ({"architectures": ["GRewardModel"]}, "v_head.summary", 24, True, "model.model."),
}
SKIPS_PAD = {PLAIN, "INFORMForSequenceClassification"}


def rows():
    generator = torch.Generator().manual_seed(11)
    ids = lambda n: torch.randint(5, 1024, (n,), generator=generator).tolist()
    return [ids(9), ids(6) + [EOS], ids(5) + [EOS, EOS], [EOS] + ids(4), ids(7) + [0], ids(3) + [0, EOS], [EOS, EOS, EOS]]


def linear(inputs, outputs, bias):
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, inputs**-0.5)
            parameter.copy_(parameter.float())
    return layer


def main():
    OUT.mkdir(exist_ok=True)
    torch.manual_seed(5)
    written = json.loads((TRUNK / "config.json").read_text())
    trunk = {name: tensor.to(torch.float64) for name, tensor in load_file(TRUNK / "model.safetensors").items()}
    bare = {name.removeprefix("model."): tensor for name, tensor in trunk.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TRUNK / "tokenizer.json"), eos_token="<|end|>")
    raw = ["How do I bake bread? Mix flour and wait.", "A line that ends in its own<|end|>"]
    encoded = [tokenizer(text)["input_ids"] for text in raw]
    appended = [ids if ids[-1] == EOS else ids + [EOS] for ids in encoded]
    golden = {"rows": rows(), "raw": raw, "rules": {}}
    tensors = {}
    for rule, (changes, name, hidden, bias, prefix) in RULES.items():
        config = LlamaConfig(**{**written, "num_labels": 1} | {key: value for key, value in changes.items() if key != "architectures"})
        model = LlamaModel(config).to(torch.float64).eval()
        model.load_state_dict(bare)
        head = linear(WIDTH, 1, bias) if hidden is None else nn.Sequential(linear(WIDTH, hidden, bias), nn.ReLU(), linear(hidden, 1, bias))
        own = {f"{name}.{key}": value for key, value in head.state_dict().items()}
        whole = None
        if changes["architectures"] == [PLAIN]:
            whole = LlamaForSequenceClassification(config).to(torch.float64).eval()
            whole.load_state_dict({f"model.{key}": value for key, value in bare.items()} | {"score.weight": head.weight.detach()})
            model = whole.model
        if changes.get("do_normalize"):
            own |= {"normalizer.mean": torch.tensor([0.4], dtype=torch.float64), "normalizer.var": torch.tensor([2.25], dtype=torch.float64)}

        def reward(ids):
            ids = torch.tensor([ids])
            if whole is not None:
                return whole(ids).logits[0, 0]
            at = -1
            if changes["architectures"][0] in SKIPS_PAD and config.pad_token_id is not None:
                kept = (ids[0] != config.pad_token_id).nonzero()
                at = int(kept[-1]) if len(kept) else 0
            r = head(model(ids).last_hidden_state[0, at])[0]
            if changes.get("normalize_reward"):
                r = (r - changes["mean"]) / changes["std"]
            if changes.get("do_normalize"):
                r = (r - 0.4) / 2.25**0.5
            return r

        rewards = [reward(ids) for ids in golden["rows"]]
        model.zero_grad()
        sum(0.5 * (-1) ** i * (i + 1) * r for i, r in enumerate(rewards)).backward()
        gradient = model.layers[0].mlp.down_proj.weight.grad
        with torch.no_grad():
            golden["rules"][rule] = {
                "config": changes,
                "prefix": prefix,
                "rewards": [r.item() for r in rewards],
                "appended": [reward(ids).item() for ids in appended],
            }
        tensors |= {f"{rule}/{key}": value.float().contiguous() for key, value in own.items()} | {f"{rule}/gradient": gradient.float().contiguous()}
        print(rule, [round(r.item(), 4) for r in rewards])
    save_file(tensors, OUT / "heads.safetensors", {"format": "pt"})
    (OUT / "heads.safetensors").chmod(0o644)
    (OUT / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
