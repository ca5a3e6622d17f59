#!/usr/bin/env python3
"""Holds what ares made of damaged files against what transformers and PEFT make of them.

    ARES_HOSTILE=5000 ARES_HOSTILE_KEEP=target/hostile cargo test --release --test cli hostile::mutation
    target/suite-venv/bin/python scripts/hostile_check.py target/hostile

The test keeps each input that was accepted: the model's folder with the rows and what ares wrote of them. Where transformers
accepts it as well, every reward must be the same; what it refuses alone is counted, by its reason. Exit code 1 if any reward differs.
"""

import argparse
import collections
import json
import math
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging

# Of f32 on two sides.
TOLERANCE = 2e-4


def rewards(folder, raw, adapted):
    """One number per row, or None where the row is refused."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    special = {key: config[key] for key in ("eos_token", "bos_token") if key in config}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    tokenizer.chat_template = config.get("chat_template")
    tokenizer.backend_tokenizer.no_truncation()
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    if adapted:
        model = PeftModel.from_pretrained(model, folder / "adapter").base_model.model.eval()
    found = []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        try:
            found.append(reward(model, ids(row, tokenizer, raw)))
        except Exception as error:  # whatever transformers raises is its refusal
            found.append(str(error).splitlines()[0][:80] if str(error) else type(error).__name__)
    return found


def ids(row, tokenizer, raw):
    if "tokens" in row:
        return row["tokens"]
    if raw and "prompt" in row:
        return tokenizer.encode(row["prompt"] + row["response"], add_special_tokens=True)
    turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    return tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)


@torch.no_grad()
def reward(model, tokens):
    """As transformers reads it; a class that it does not have (OpenRLHF's) reads at the last token, and may normalise."""
    tokens, config = torch.tensor([tokens]), model.config
    if config.architectures[0].endswith("ForSequenceClassification"):
        score = model(tokens).logits[0]
    else:
        score = model.score(model.model(tokens).last_hidden_state[0, -1])
        if getattr(config, "normalize_reward", True) and hasattr(config, "mean") and hasattr(config, "std"):
            score = (score - config.mean) / config.std
    assert score.numel() == 1, f"{score.numel()} labels"
    return score.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kept", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    counts, refusals, differ = collections.Counter(), collections.Counter(), []
    for folder in sorted(args.kept.iterdir()):
        line = (folder / "line").read_text()
        kind = folder.name.split("-")[0]
        if kind in ("Rows", "Csv"):  # what is damaged there is no model
            continue
        ours = [json.loads(text) for text in (folder / "out.jsonl").read_text().splitlines()]
        try:
            theirs = rewards(folder, "--raw" in line, "+" in line)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
            counts[kind, "transformers refuses"] += 1
            refusals[reason] += 1
            continue
        for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            mine = mine.get("reward")
            if mine is None or not isinstance(other, float):
                counts[kind, "row refused by " + ("both" if mine is None and not isinstance(other, float) else "ares" if mine is None else "transformers")] += 1
                if mine is not None:
                    refusals[other] += 1
            elif math.isfinite(other) and abs(mine - other) <= TOLERANCE * max(1.0, abs(other)):
                counts[kind, "same"] += 1
            else:
                counts[kind, "DIFFERENT"] += 1
                differ.append(f"{folder}: row {row + 1}: ares {mine}, transformers {other}")
    for (kind, what), n in sorted(counts.items()):
        print(f"{kind:16} {what:32} {n}")
    print("\nwhat transformers alone refuses:", *(f"  {n} {reason}" for reason, n in refusals.most_common(30)), sep="\n")
    print(*differ[:40], sep="\n")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
