"""How sequences become tensors: padded as the framework does it, in buckets of similar length, or packed."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from .rows import Sequence


@dataclass
class Batch:
    """One forward: what the trunk takes, tensors of (B, T), and where each sequence lies in it."""

    inputs: dict
    rows: list  # (index in the caller's list, its Sequence, flat offset of its first token)

    def last(self) -> torch.Tensor:
        """Flat row of each sequence's last token, (N,)."""
        return torch.tensor([offset + len(s.tokens) - 1 for _, s, offset in self.rows])

    def targets(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per answer token: the flat row that predicts it, the token, and the number of its sequence in `rows`."""
        at, label, owner = [], [], []
        for number, (_, s, offset) in enumerate(self.rows):
            at += range(offset + s.start - 1, offset + s.end - 1)
            label += s.tokens[s.start : s.end]
            owner += [number] * (s.end - s.start)
        return torch.tensor(at), torch.tensor(label), torch.tensor(owner)


def padded(numbered: list[tuple[int, Sequence]]) -> Batch:
    """One batch, padded on the right to its longest sequence."""
    ids = [torch.tensor(s.tokens) for _, s in numbered]
    tokens, mask = (pad_sequence(rows, batch_first=True) for rows in (ids, [torch.ones_like(row) for row in ids]))
    rows = [(i, s, n * tokens.shape[1]) for n, (i, s) in enumerate(numbered)]
    return Batch({"input_ids": tokens, "attention_mask": mask}, rows)


def packed(numbered: list[tuple[int, Sequence]], width: int) -> Batch:
    """First-fit decreasing into rows of `width` tokens. Positions tell the sequences apart (transformers makes the mask);
    what remains of a row is a sequence nobody reads."""
    width = max([width] + [len(s.tokens) for _, s in numbered])
    bins: list[list] = []
    for item in sorted(numbered, key=lambda item: -len(item[1].tokens)):
        room = (b for b in bins if sum(len(s.tokens) for _, s in b) + len(item[1].tokens) <= width)
        home = next(room, None)
        bins.append([item]) if home is None else home.append(item)
    width = max(sum(len(s.tokens) for _, s in b) for b in bins)
    tokens, positions, rows = [], [], []
    for line, content in enumerate(bins):
        ids, places = [], []
        for index, s in content:
            rows.append((index, s, line * width + len(ids)))
            ids += s.tokens
            places += range(len(s.tokens))
        rest = width - len(ids)
        tokens.append(ids + [0] * rest)
        positions.append(places + list(range(rest)))
    return Batch({"input_ids": torch.tensor(tokens), "position_ids": torch.tensor(positions)}, rows)


def lay_out(sequences: list[Sequence], layout: str, limit: int, pack_width: int) -> list[Batch]:
    """All sequences as batches of at most `limit` tokens, padding included (one sequence may be longer)."""
    numbered = list(enumerate(sequences))
    if layout != "padded":
        numbered.sort(key=lambda item: len(item[1].tokens))
    groups, widest, total = [], 0, 0
    for item in numbered:
        length = len(item[1].tokens)
        widest, total = max(widest, length), total + length
        count = len(groups[-1]) + 1 if groups else 1
        full = (total if layout == "packed" else widest * count) > limit
        # A bucket also ends where padding would exceed an eighth: one more kernel launch is cheaper.
        wasteful = layout == "bucketed" and count > 4 and widest * count > total * 1.125
        if not groups or full or wasteful:
            groups.append([])
            widest, total = length, length
        groups[-1].append(item)
    return [packed(group, pack_width) if layout == "packed" else padded(group) for group in groups]
