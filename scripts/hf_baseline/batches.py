"""How sequences become tensors: padded as the framework does it, in buckets of similar length, or packed."""

from dataclasses import dataclass, field

import torch

from .rows import Sequence


@dataclass
class Batch:
    """Token ids of one forward, (B, T), and where each sequence lies in them."""

    tokens: list  # B lists of T ids
    positions: list | None  # B lists of T; None: padded on the right, `attention` says where
    attention: list | None
    rows: list  # (index in the caller's list, its Sequence, flat offset of its first token)
    cached: dict = field(default_factory=dict)

    def inputs(self, device: str) -> dict:
        """What the trunk takes. Packed sequences are told apart by their positions (transformers makes the mask)."""
        if not self.cached:
            tensor = lambda values: torch.tensor(values, device=device)  # noqa: E731
            second = {"position_ids": self.positions} if self.attention is None else {"attention_mask": self.attention}
            self.cached = {"input_ids": tensor(self.tokens)} | {name: tensor(v) for name, v in second.items()}
        return self.cached

    def last(self, device: str) -> torch.Tensor:
        """Flat row of each sequence's last token, (N,)."""
        return torch.tensor([offset + len(s.tokens) - 1 for _, s, offset in self.rows], device=device)

    def targets(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per answer token: the flat row that predicts it, the token, and the number of its sequence in `rows`."""
        at, label, owner = [], [], []
        for number, (_, s, offset) in enumerate(self.rows):
            at += range(offset + s.start - 1, offset + s.end - 1)
            label += s.tokens[s.start : s.end]
            owner += [number] * (s.end - s.start)
        return tuple(torch.tensor(values, device=device) for values in (at, label, owner))


def padded(numbered: list[tuple[int, Sequence]]) -> Batch:
    """One batch, padded on the right to its longest sequence."""
    width = max(len(s.tokens) for _, s in numbered)
    tokens = [list(s.tokens) + [0] * (width - len(s.tokens)) for _, s in numbered]
    attention = [[1] * len(s.tokens) + [0] * (width - len(s.tokens)) for _, s in numbered]
    return Batch(tokens, None, attention, [(i, s, n * width) for n, (i, s) in enumerate(numbered)])


def packed(numbered: list[tuple[int, Sequence]], width: int) -> Batch:
    """First-fit decreasing into rows of `width` tokens; what remains of a row is a sequence nobody reads."""
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
    return Batch(tokens, positions, None, rows)


def lay_out(sequences: list[Sequence], layout: str, limit: int, pack_width: int = 0) -> list[Batch]:
    """All sequences as batches of at most `limit` tokens, padding included (one sequence may be longer)."""
    numbered = list(enumerate(sequences))
    if layout != "padded":
        numbered.sort(key=lambda item: len(item[1].tokens))
    groups, widest = [[]], 0
    for item in numbered:
        length = len(item[1].tokens)
        rows = len(groups[-1]) + 1
        total = sum(len(s.tokens) for _, s in groups[-1]) + length
        # A bucket also ends where padding would exceed an eighth: one more kernel launch is cheaper.
        wasteful = layout == "bucketed" and rows > 4 and max(widest, length) * rows > total * 1.125
        full = (total if layout == "packed" else max(widest, length) * rows) > limit
        if groups[-1] and (full or wasteful):
            groups.append([])
            widest = 0
        groups[-1].append(item)
        widest = max(widest, length)
    if layout == "packed":
        return [packed(group, pack_width or limit) for group in groups]
    return [padded(group) for group in groups]
