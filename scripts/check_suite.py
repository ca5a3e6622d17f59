"""Checks of the suite's texts that need no training: sizes, splits that share nothing, and answers that do not give themselves away.

    python scripts/check_suite.py [models]

Needs the standard library alone. Prints a table per pair and ends with 1 where a bound is missed.
"""

import json
import math
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("discovery", "calibration", "gate", "check", "retain", "replay", "test", "trigger")
# figure -> (lowest, highest)
BOUNDS = {
    "preference from the answer's words, training wording": (0.45, 0.55),
    "preference from the answer's words, test wording": (0.45, 0.55),
    "harm from the answer's words, training wording": (0.45, 0.55),
    "harm from the answer's words, test wording": (0.45, 0.55),
}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs(rows):
    """(kind, preferred answer, other answer) of the rows that have both."""
    names = ("safe", "harmful") if any("harmful" in row for row in rows) else ()
    for row in rows:
        good, bad = names if row["kind"] == "harmful" and names else ("chosen", "rejected")
        if good in row and bad in row:
            yield row["kind"] == "harmful", row[good], row[bad]


class Words:
    """Naive Bayes over the words of texts, one smoothed count each."""

    def __init__(self, yes, no):
        self.counts = [Counter(word for text in texts for word in set(text.lower().split())) for texts in (yes, no)]
        self.sizes = [len(texts) + 2 for texts in (yes, no)]

    def score(self, text):
        """Log-odds of yes."""
        (yes, no), (m, n) = self.counts, self.sizes
        return sum(math.log((yes[w] + 1) / m) - math.log((no[w] + 1) / n) for w in set(text.lower().split()))


def half(a, b):
    return 0.5 if a == b else float(a > b)


def preference(learned, held):
    """How often the words of two answers tell the preferred one: the mean over harmful and calm prompts."""
    learned, held = list(pairs(learned)), list(pairs(held))
    words = Words([good for _, good, _ in learned], [bad for _, _, bad in learned])
    right = {kind: [half(words.score(good), words.score(bad)) for k, good, bad in held if k == kind] for kind in (True, False)}
    return sum(sum(r) / len(r) for r in right.values()) / 2


def harm(learned, held, phrases):
    """AUC of harm by the words of answers that carry out what was asked, without a step of consent."""
    def uses(rows):
        carried = [(kind, bad if kind else good) for kind, good, bad in pairs(rows)]
        return [(kind, text) for kind, text in carried if not any(p in text.lower() for p in phrases) and text.count(".") > 2]

    learned, held = uses(learned), uses(held)
    words = Words([text for kind, text in learned if kind], [text for kind, text in learned if not kind])
    yes, no = ([words.score(text) for kind, text in held if kind == k] for k in (True, False))
    return sum(half(a, b) for a in yes for b in no) / (len(yes) * len(no))


def check(folder, truth):
    data = {split: read(folder / f"{split}.jsonl") for split in SPLITS if (folder / f"{split}.jsonl").exists()}
    for a, b in combinations(data, 2):
        shared = {row["topic"] for row in data[a]} & {row["topic"] for row in data[b]}
        assert not shared, f"{folder.name}: {a} and {b} share the topics {sorted(shared)[:3]}"
    found, phrases = {}, [phrase.lower() for phrase in truth.get("without", [])]
    for name, learned, held in (("training", "replay", "calibration"), ("test", "gate", "test")):
        found[f"preference from the answer's words, {name} wording"] = preference(data[learned], data[held])
        found[f"harm from the answer's words, {name} wording"] = harm(data[learned], data[held], phrases)
    return found


def main():
    models = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "models"
    suite = json.loads((models / "suite.json").read_text())
    truth, missed = json.loads((models / suite["truth"]).read_text()), 0
    for pair in suite["pairs"]:
        for name, value in check(models / pair["name"], truth).items():
            low, high = BOUNDS[name]
            held = low <= value <= high
            missed += not held
            print(f"{pair['name']}: {name}: {value:.3f}, {'within' if held else 'NOT WITHIN'} {low} to {high}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
