"""What gets timed. A task opens its models in one setting, says what it computes (for agreement), and runs."""

from argparse import Namespace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from .models import Model, Setting
from .objective import Failure, Objective, Pair, Step, backward, remember_start, rewards, token_logprobs
from .rows import BadRow, Renderer, forced, read_jsonl


class StepTask:
    """One joint step: reward model forward and backward, policy forward and backward, clipping, two AdamW updates."""

    def __init__(self, args: Namespace, setting: Setting, device: str, limits: tuple):
        self.objective = Objective(**args.objective)
        self.policy = Model(args.policy, False, setting, device, limits)
        self.reward = Model(args.reward, True, setting, device, limits)
        self.step = self._read(args)
        remember_start(self.policy, self.reward, self.step)
        self.optimizers = [
            torch.optim.AdamW([p for _, p in model.trainable()], lr=1e-4, weight_decay=0.0, fused=True)
            for model in (self.policy, self.reward)
        ]
        # Tokens that both models train on; no padding is counted, nor what only the coupling weight reads.
        policy = [s for f in self.step.of_policy for s in (f.rejected, f.safe)] + self.step.retain
        reward = [s for f in self.step.of_reward for s in (f.reward_chosen, f.reward_rejected)]
        reward += [s for p in self.step.replay for s in (p.chosen, p.rejected)]
        self.tokens = sum(len(s.tokens) for s in policy + reward)

    def _read(self, args: Namespace) -> Step:
        of_policy, of_reward = Renderer(self.policy.folder), Renderer(self.reward.folder)
        failures = []
        for row in read_jsonl(args.failures):
            rejected, chosen = (of_policy.answer(row, row[side]) for side in ("rejected", "chosen"))
            read = [of_reward.full(row, row[side]) for side in ("chosen", "rejected")]
            failures.append(Failure(row["verdict"], rejected, forced(rejected, chosen, row["forced"]), *read))
        replay = [
            Pair(of_reward.full(row, row["chosen"]), of_reward.full(row, row["rejected"]), tuple(row["harmful"]))
            for row in read_jsonl(args.replay)
        ]
        return Step(failures, [of_policy.answer(row, row["response"]) for row in read_jsonl(args.retain)], replay)

    def run(self, _: int) -> int:
        backward(self.policy, self.reward, self.step, self.objective)
        for model, optimizer in zip((self.policy, self.reward), self.optimizers):
            torch.nn.utils.clip_grad_norm_([p for _, p in model.trainable()], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self.tokens

    def values(self) -> dict:
        """Loss terms and gradients (before clipping) of the first step."""
        terms, _ = backward(self.policy, self.reward, self.step, self.objective)
        found = {f"term.{name}": value.detach().reshape(1).float().cpu() for name, value in terms.items()}
        for label, model in (("policy", self.policy), ("reward", self.reward)):
            for name, parameter in model.trainable():
                found[f"{label}.{name}"] = parameter.grad.float().cpu().clone()
                parameter.grad = None
        return found


class RowsTask:
    """Rows in, rows out: all rows of a file, adapter merged, no gradients."""

    reward = False

    def __init__(self, args: Namespace, setting: Setting, device: str, limits: tuple):
        self.args = args
        self.model = Model(args.reward if self.reward else args.policy, self.reward, setting, device, limits)
        self.model.merge()
        renderer = Renderer(self.model.folder)
        self.items = [self.read(renderer, row) for row in read_jsonl(args.rows)]

    @torch.inference_mode()
    def run(self, i: int) -> int:
        # Rotated: the same work, in another order, over other addresses.
        shift = i % len(self.items)
        values = self.compute(self.items[shift:] + self.items[:shift])
        return self.tokens(values)

    def tokens(self, _: dict) -> int:
        return sum(len(s.tokens) for s in self.items)

    @torch.inference_mode()
    def values(self) -> dict:
        return self.compute(self.items)


class ScoreTask(RowsTask):
    """`ares score`: the reward of each row."""

    reward = True

    def read(self, renderer: Renderer, row: dict):
        return renderer.full(row, row["response"])

    def compute(self, items: list) -> dict:
        return {"reward": rewards(self.model, items).cpu()}


class LogprobTask(RowsTask):
    """`ares logprob`: summed log-probability of each answer."""

    def read(self, renderer: Renderer, row: dict):
        return renderer.answer(row, row["response"])

    def compute(self, items: list) -> dict:
        values, owner = token_logprobs(self.model, items)
        # In f64: in f32 the last place of a sum over hundreds of tokens is as large as the tolerance.
        return {"logprob": values.new_zeros(len(items), dtype=torch.float64).index_add(0, owner, values.double()).cpu()}


class GenerateTask(RowsTask):
    """`ares generate --greedy`: one left-padded batch, `generate` with its cache."""

    def __init__(self, args: Namespace, setting: Setting, device: str, limits: tuple):
        if setting.layout != "padded":
            raise ValueError("generate batches by left padding only")
        super().__init__(args, setting, device, limits)
        inner = self.model.inner
        ends = None if args.ignore_eos else inner.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]
        self.config = GenerationConfig(
            do_sample=False, max_new_tokens=args.max_new_tokens, pad_token_id=inner.config.pad_token_id or 0,
            eos_token_id=ends, use_cache=True, cache_implementation="static" if setting.compiled else None,
        )

    def read(self, renderer: Renderer, row: dict):
        return torch.tensor(renderer.prompt(row))

    def compute(self, items: list) -> dict:
        left = {"batch_first": True, "padding_side": "left"}
        ids = pad_sequence(items, **left, padding_value=self.config.pad_token_id).to(self.model.device)
        mask = pad_sequence([torch.ones_like(p) for p in items], **left).to(self.model.device)
        out = self.model.inner.generate(input_ids=ids, attention_mask=mask, generation_config=self.config)
        return rows_of_tokens([self._until_end(row) for row in out[:, ids.shape[1] :].tolist()])

    def _until_end(self, tokens: list[int]) -> list[int]:
        stop = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens) - 1)
        return tokens[: stop + 1]

    def tokens(self, values: dict) -> int:
        return int((values["tokens"] >= 0).sum())


TASKS = {"step": StepTask, "score": ScoreTask, "logprob": LogprobTask, "generate": GenerateTask}


def rows_of_tokens(rows: list[list[int]]) -> dict:
    """Answers as one tensor; −1 stands where an answer has ended."""
    return {"tokens": pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)}


def read_values(task: str, path: Path) -> dict:
    """What `ares` computed: the dump of `repair --dump-gradients`, or the JSONL of score, logprob or generate."""
    if task == "step":
        return load_file(path)
    rows = read_jsonl(path)
    name = {"score": "reward", "logprob": "logprob", "generate": "tokens_out"}[task]
    for row in rows:
        if name not in row:
            raise BadRow(f"{row['_where']}: expected `{name}`, found {row.get('error', 'none')}")
    if task == "generate":
        return rows_of_tokens([row[name] for row in rows])
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64)}
