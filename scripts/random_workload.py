#!/usr/bin/env python3
"""A workload at a real model's shapes without that model: random weights, random adapters, ragged rows of plain words.

    python scripts/random_workload.py CONFIG.json OUT --layers 4 --tokenizer DIR --template FILE

writes OUT/policy, OUT/reward (checkpoints that `ares` and transformers open), OUT/policy-adapter, OUT/reward-adapter
(PEFT, A and B random and not zero), and OUT/{failures,retain,replay,prompts}.jsonl. Speed does not depend on what the
words say; weights are never zero, because zeros are faster on some hardware.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from hf_baseline.models import auto_class, write_adapter
from hf_baseline.rows import write_jsonl

WORDS = (
    "the a small large old new river house garden table window letter paper morning evening road tree hill "
    "and then while because after before with without near under over walks reads writes opens closes finds "
    "keeps brings carries asks answers gives takes slowly quietly often again twice together bread water "
    "lamp chair boat bridge market field stone bird horse wind rain summer winter green blue white long short"
).split()
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a config.json as published")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--template", type=Path, help="chat template (default: the tokenizer's own, else ChatML)")
    parser.add_argument("--only", choices=["policy", "reward"], help="make this model alone")
    parser.add_argument("--layers", type=int, help="cut to this many layers")
    parser.add_argument("--override", type=json.loads, default={}, metavar="JSON", help="other values of the config")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64, help="rows of each file")
    parser.add_argument("--tokens", type=int, nargs=2, default=[40, 400], help="shortest and longest row, about")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def write_model(args, reward: bool) -> None:
    config = AutoConfig.from_pretrained(args.config)
    for name, value in args.override.items():
        setattr(config, name, value)
    if args.layers:
        config.num_hidden_layers = args.layers
        config.layer_types = None
    config.pad_token_id = config.eos_token_id if isinstance(config.eos_token_id, int) else config.eos_token_id[0]
    if reward:
        config.num_labels = 1
    # What the constructor derives of dtype and layers is derived anew.
    config = type(config)(**{k: v for k, v in config.to_dict().items() if k != "layer_types"})
    torch.manual_seed(args.seed + reward)
    model = auto_class(reward).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    name = "reward" if reward else "policy"
    model.to(getattr(torch, args.dtype)).save_pretrained(args.out / name)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.chat_template = args.template.read_text() if args.template else tokenizer.chat_template or CHATML
    # One file that every reader knows, rather than chat_template.jinja beside it.
    tokenizer.save_pretrained(args.out / name, save_jinja_files=False)
    write_adapter(args.out / name, reward, args.rank, args.alpha, args.seed + reward, args.out / f"{name}-adapter")


def words(generator: random.Random, count: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(count))


def write_rows(args) -> None:
    """A row's words are split between prompt and answer; nearly every word is one token."""
    generator = random.Random(args.seed)
    low, high = args.tokens

    def split() -> tuple[str, list[int]]:
        total = generator.randint(low, high)
        asked = int(total * generator.uniform(0.2, 0.7))
        answers = [max(4, int((total - asked) * generator.uniform(0.6, 1.0))) for _ in range(2)]
        return words(generator, max(4, asked)), answers

    files = {name: [] for name in ("failures", "retain", "replay", "prompts")}
    verdicts = ("coupled", "policy", "reward")
    for number in range(args.rows):
        prompt, (one, two) = split()
        verdict = verdicts[number % len(verdicts)]
        pair = {"chosen": words(generator, one), "rejected": words(generator, two)}
        files["failures"].append({"prompt": prompt, **pair, "verdict": verdict})
        prompt, (one, _) = split()
        files["retain"].append({"prompt": prompt, "response": words(generator, one)})
        prompt, (one, two) = split()
        pair = {"chosen": words(generator, one), "rejected": words(generator, two)}
        files["replay"].append({"prompt": prompt, **pair, "harmful": [False, number % 3 == 0]})
        files["prompts"].append({"prompt": split()[0]})
    for name, rows in files.items():
        rows = [{"id": f"{name}-{number:04}", **row} for number, row in enumerate(rows)]
        write_jsonl(args.out / f"{name}.jsonl", rows)


def main() -> None:
    args = arguments()
    try:
        args.out.mkdir(parents=True)
    except FileExistsError:
        sys.exit(f"{args.out}: expected a folder that does not exist yet")
    for reward in (False, True):
        if args.only in (None, "reward" if reward else "policy"):
            write_model(args, reward)
    write_rows(args)


if __name__ == "__main__":
    main()
