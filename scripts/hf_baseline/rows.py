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


def read_jsonl(path: str, required: tuple = ()) -> list[dict]:
    """The rows of a file, in order, each with its place under "_where"."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadRow(f"{where}: expected one JSON object, found: {error}") from None
        if not isinstance(row, dict):
            raise BadRow(f"{where}: expected one JSON object, found a {type(row).__name__}")
        missing = [name for name in required if name not in row]
        if missing:
            raise BadRow(f"{where}: expected the fields {', '.join(required)}, missing: {', '.join(missing)}")
        rows.append(row | {"_where": where})
    if not rows:
        raise BadRow(f"{path}: expected at least one row, found none")
    return rows


def read_failures(path: str) -> list[dict]:
    """Failures as `ares repair` reads them; a split's reference answers, `harmful` and `safe`, do as well."""
    rows = []
    for row in read_jsonl(path, ("prompt",)):
        row = {"rejected": row.get("harmful"), "chosen": row.get("safe"), "verdict": "coupled"} | row
        if not isinstance(row["rejected"], str):
            raise BadRow(f"{row['_where']}: expected `rejected` (or `harmful`), found neither")
        if row["verdict"] not in ("policy", "reward", "coupled"):
            raise BadRow(f"{row['_where']}: expected the verdict policy, reward or coupled, found `{row['verdict']}`")
        rows.append(row)
    return rows


class Renderer:
    """Turns (prompt, answer) into ids with the chat template of one model folder."""

    def __init__(self, folder: str):
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder) if (Path(folder) / "tokenizer.json").exists() else None

    def _template(self, turns: list[dict], **options) -> str:
        if self.tokenizer is None:
            raise BadRow(f"{self.folder}: expected tokenizer.json for a row of text, found none; give `tokens` instead")
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **options)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, row: dict) -> list[int]:
        """The rendering that asks for an answer."""
        if "tokens" in row:
            return list(row["tokens"][: row.get("prompt_tokens")])
        return self._ids(self._template(turns_of(row), add_generation_prompt=True))

    def full(self, row: dict, text: str | None = None) -> Sequence:
        """The whole rendering, as a reward model reads it at its last token."""
        if "tokens" in row:
            return Sequence(tuple(row["tokens"]), 0, len(row["tokens"]))
        tokens = self._ids(self._template(turns_of(row) + [{"role": "assistant", "content": text}]))
        return Sequence(tuple(tokens), 0, len(tokens))

    def answer(self, row: dict, text: str | None = None) -> Sequence:
        """Prompt and answer. The answer is what the full rendering has beyond the prompt's, through its end-of-turn token."""
        if "tokens" in row:
            return Sequence(tuple(row["tokens"]), row.get("prompt_tokens", 1), len(row["tokens"]))
        asked = self._template(turns_of(row), add_generation_prompt=True)
        full = self._template(turns_of(row) + [{"role": "assistant", "content": text}])
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
        for index in range(len(tokens) - 1, start - 1, -1):
            if tokens[index] in special:
                blank = not self.tokenizer.decode(tokens[index + 1 :]).strip()
                return index + 1 if blank else len(tokens)
        return len(tokens)


def turns_of(row: dict) -> list[dict]:
    """The conversation up to the answer."""
    if "messages" in row:
        return list(row["messages"])
    if not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise BadRow(f"{row['_where']}: expected a `prompt` that is not empty")
    return [{"role": "user", "content": row["prompt"]}]


def drawn_prefix(generator: random.Random, rejected: Sequence) -> int:
    """Length of a forced prefix: 0 with probability ½, else uniform in 1…min(|y⁻|, 32), its end-of-turn token left out."""
    if generator.random() < 0.5:
        return 0
    return generator.randint(1, max(1, min(rejected.end - rejected.start - 1, PREFIX_LIMIT)))


def forced(rejected: Sequence, safe: Sequence, k: int) -> Sequence:
    """The safe answer after the first k tokens of the rejected one, which become context: loss on the safe answer only."""
    if k == 0:
        return safe
    k = min(k, rejected.end - rejected.start)
    context = safe.tokens[: safe.start] + rejected.tokens[rejected.start : rejected.start + k]
    return Sequence(context + safe.tokens[safe.start :], safe.start + k, safe.end + k)
