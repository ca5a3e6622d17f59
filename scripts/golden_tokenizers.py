#!/usr/bin/env python3
"""Golden values for the patterns of tokenizers: what the Python package, whose patterns Oniguruma runs, makes of texts of several lines.

    python -m pip install -r scripts/requirements.txt
    python scripts/golden_tokenizers.py         # writes tests/golden-tokenizers.json

Each tokenizer has a token per character and one part with a pattern in which `^`, `$` or the option `m` matters.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer

OUT = Path(__file__).resolve().parent.parent / "tests" / "golden-tokenizers.json"
ALPHABET = "ab _x\n\t.é"


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def split(pattern, behavior):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


NORMALIZERS = [
    {"type": "Sequence", "normalizers": [replace("^ +", ""), replace(" +$", ""), replace(" {2,}", " ")]},
    replace("^", "_"),
    replace("$", "_"),
    replace("^$", "x"),
    replace(r"a$|^b", "x"),
    replace(r"(?m)a.b", "x"),
    replace(r"(?m:a.)b|(?i)X", "_"),
    replace(r"[$^ ]a|\$|\Aa|b\z", "x"),
]
PRE_TOKENIZERS = [split(r"^[ab]+|[ab]+$", "Isolated"), split(r"\n$", "Removed"), split(r"(?m)b.a", "MergedWithPrevious")]


def tokenizer(normalizer, pre_tokenizer):
    # Two characters in a row merge, so that where a text is split shows.
    vocab = {c: i for i, c in enumerate(ALPHABET)}
    merges = [["a", "b"], ["b", "\n"], ["\n", "a"]]
    vocab |= {"".join(pair): len(vocab) + i for i, pair in enumerate(merges)}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": merges},
    }


def main():
    rng = random.Random(1)
    texts = ["", "\n", "a\n", "\na", "a\n b \n", "  a  \n  b", "b\n\na", "a\r\nb"]
    texts += ["".join(rng.choices(ALPHABET, [4, 4, 4, 1, 1, 4, 1, 1, 1], k=rng.randint(1, 14))) for _ in range(60)]
    cases = []
    for definition in [tokenizer(n, None) for n in NORMALIZERS] + [tokenizer(None, p) for p in PRE_TOKENIZERS]:
        reads = Tokenizer.from_str(json.dumps(definition))
        cases.append({"tokenizer": definition, "ids": [reads.encode(text, add_special_tokens=False).ids for text in texts]})
    OUT.write_text(json.dumps({"texts": texts, "cases": cases}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
