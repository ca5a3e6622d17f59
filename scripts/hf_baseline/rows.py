"""Rows of JSONL, rendered by a model's own chat template and tokenizer."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

PREFIX_LIMIT = 32


class BadRow(ValueError):
    """A file or row that ares itself would refuse."""


@dataclass(frozen=True)
class Sequence:
    """Token ids with the answer's span: the answer is tokens[start:end]."""

    tokens: tuple
    start: int
    end: int


def read_jsonl(path: Path | str, *texts: str) -> list[dict]:
    """The rows of a file, in order, each with its place under "_where"; the fields `texts` are strings that are not empty."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            bad = [name for name in texts if not isinstance(row.get(name), str) or not row[name]]
        except (ValueError, AttributeError):
            raise BadRow(f"{path}:{number}: expected one JSON object, found: {line[:80]}") from None
        if bad:
            raise BadRow(f"{path}:{number}: expected a text in {', '.join(texts)}, found none in {', '.join(bad)}")
        rows.append(row | {"_where": f"{path}:{number}"})
    if not rows:
        raise BadRow(f"{path}: expected at least one row, found none")
    return rows


def write_jsonl(path: Path | str, rows: list[dict], fields: tuple = ()) -> None:
    """Rows with the named fields only, or with all."""
    rows = [{name: row[name] for name in fields or row} for row in rows]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_failures(path: str) -> list[dict]:
    """Failures as `ares repair` reads them; a split's reference answers, `harmful` and `safe`, do as well."""
    rows = []
    for row in read_jsonl(path, "prompt"):
        row = {"rejected": row.get("harmful"), "chosen": row.get("safe"), "verdict": "coupled"} | row
        missing = [name for name in ("rejected", "chosen") if not isinstance(row[name], str)]
        if missing:  # `ares` would sample a `chosen`
            raise BadRow(f"{row['_where']}: expected `rejected` and `chosen` (or `harmful` and `safe`), no {missing[0]}")
        if row["verdict"] not in ("policy", "reward", "coupled"):
            raise BadRow(f"{row['_where']}: expected the verdict policy, reward or coupled, found `{row['verdict']}`")
        rows.append(row)
    return rows


class Renderer:
    """Turns (prompt, answer) into ids with the chat template of one model folder."""

    def __init__(self, folder: str):
        self.folder, self.tokenizer = folder, AutoTokenizer.from_pretrained(folder)

    def _text(self, row: dict, answer: str | None = None) -> str:
        turns = [{"role": "user", "content": row["prompt"]}]
        if answer is None:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.tokenizer.apply_chat_template(turns + [{"role": "assistant", "content": answer}], tokenize=False)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, row: dict) -> list[int]:
        """The rendering that asks for an answer."""
        return self._ids(self._text(row))

    def full(self, row: dict, answer: str) -> Sequence:
        """The whole rendering, as a reward model reads it at its last token."""
        tokens = self._ids(self._text(row, answer))
        return Sequence(tuple(tokens), 0, len(tokens))

    def answer(self, row: dict, answer: str) -> Sequence:
        """Prompt and answer. The answer is what the full rendering has beyond the prompt's, through its end-of-turn token."""
        asked, full = self._text(row), self._text(row, answer)
        if not full.startswith(asked):
            raise BadRow(f"{row['_where']}: the template of {self.folder} renders the prompt differently with an answer")
        prompt, tokens = self._ids(asked), self._ids(full)
        if tokens[: len(prompt)] != prompt:  # the border was merged away: as the answer follows in generation
            tokens = prompt + self._ids(full[len(asked) :])
        end = self._end_of_turn(tokens, len(prompt))
        if end == len(prompt):
            raise BadRow(f"{row['_where']}: expected an answer, found none")
        return Sequence(tuple(tokens[:end]), len(prompt), end)

    def _end_of_turn(self, tokens: list[int], start: int) -> int:
        """One past the last special token where only blanks follow it: ChatML writes a newline that no model answers."""
        special = set(self.tokenizer.all_special_ids)
        last = max((index for index in range(start, len(tokens)) if tokens[index] in special), default=None)
        if last is None or self.tokenizer.decode(tokens[last + 1 :]).strip():
            return len(tokens)
        return last + 1


def drawn_prefix(generator: random.Random, rejected: Sequence) -> int:
    """Length of a forced prefix: 0 with probability ½, else uniform in 1…min(|y⁻|, 32), its end-of-turn token left out."""
    if generator.random() < 0.5:
        return 0
    return generator.randint(1, max(1, min(rejected.end - rejected.start - 1, PREFIX_LIMIT)))


def forced(rejected: Sequence, safe: Sequence, k: int) -> Sequence:
    """The safe answer after the first k tokens of the rejected one, which become context: loss on the safe answer only."""
    k = min(k, rejected.end - rejected.start)
    context = safe.tokens[: safe.start] + rejected.tokens[rejected.start : rejected.start + k]
    return Sequence(context + safe.tokens[safe.start :], safe.start + k, safe.end + k)
