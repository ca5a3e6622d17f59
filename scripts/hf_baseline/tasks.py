"""What gets timed. A task opens its models in one setting, says what it computes (for agreement), and runs."""

import json
import random
from pathlib import Path

import torch
from transformers import GenerationConfig

from . import objective
from .models import Lora, Model, Setting
from .objective import Failure, Objective, Pair, Step
from .rows import BadRow, Renderer, drawn_prefix, forced, read_failures, read_jsonl


class StepTask:
    """One joint step: reward model forward and backward, policy forward and backward, clipping, two AdamW updates."""

    def __init__(self, args, setting: Setting, device: str):
        self.args, self.objective = args, args.objective
        lora = Lora(args.rank, args.alpha, args.seed)
        self.policy = Model(args.policy, False, setting, device, lora)
        self.reward = Model(args.reward, True, setting, device, lora, args.train_head)
        self.failures, self.retain, self.replay = self._read(args)
        self.sizes = [
            min(asked or len(rows), len(rows))
            for asked, rows in zip(args.items, (self.failures, self.retain, self.replay))
        ]
        limits = (args.batch_tokens, args.pack_width)
        objective.remember_start(self.policy, self.reward, self.failures, self.replay, *limits)
        self.optimizers = [self._optimizer(model) for model in (self.policy, self.reward)]

    def _read(self, args) -> tuple[list, list, list]:
        of_policy, of_reward = Renderer(self.policy.folder), Renderer(self.reward.folder)
        generator = random.Random(args.seed)
        failures = []
        for row in read_failures(args.failures):
            rejected = of_policy.answer(row, row["rejected"])
            verdict, chosen = row["verdict"], row.get("chosen")
            drawn = drawn_prefix(generator, rejected)
            k = row.get("forced", drawn) if args.forced_prefix else 0
            safe = forced(rejected, of_policy.answer(row, chosen), k) if chosen else None
            scored = of_reward.full(row, chosen) if chosen else None
            failures.append(Failure(verdict, rejected, safe, scored, of_reward.full(row, row["rejected"])))
        retain = [of_policy.answer(r, r["response"]) for r in read_jsonl(args.retain, ("prompt", "response"))]
        replay = [
            # A row may carry the judge's word: `harmful`: [chosen, rejected].
            Pair(of_reward.full(row, row["chosen"]), of_reward.full(row, row["rejected"]),
                 harmful=tuple(row.get("harmful", (False, False))))
            for row in read_jsonl(args.replay, ("prompt", "chosen", "rejected"))
        ]
        return failures, retain, replay

    def _optimizer(self, model: Model):
        parameters = [parameter for _, parameter in model.trainable()]
        return torch.optim.AdamW(parameters, lr=self.args.lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    def _step(self, i: int) -> Step:
        """Other rows in every step, so that no cache is flattered."""
        lists = (self.failures, self.retain, self.replay)
        return Step(*[[rows[(i * n + j) % len(rows)] for j in range(n)] for rows, n in zip(lists, self.sizes)])

    def _backward(self, step: Step) -> dict:
        """Gradients of the whole objective; returns its terms."""
        o, limits = self.objective, (self.args.batch_tokens, self.args.pack_width)
        terms, w = objective.reward_terms(self.reward, step, o, *limits)
        objective.weighted(terms, o).backward()
        of_policy = objective.policy_terms(self.policy, step, w, o, *limits)
        objective.weighted(of_policy, o).backward()
        return of_policy | terms

    def run(self, i: int) -> int:
        step = self._step(i)
        self._backward(step)
        for model, optimizer in zip((self.policy, self.reward), self.optimizers):
            torch.nn.utils.clip_grad_norm_([p for _, p in model.trainable()], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self._tokens(step)

    def _tokens(self, step: Step) -> int:
        """Tokens that both models train on; no padding is counted, nor what only the coupling weight reads."""
        policy = [s for f in step.of_policy for s in (f.rejected, f.safe) if s] + step.retain
        reward = [s for f in step.of_reward for s in (f.reward_chosen, f.reward_rejected)]
        reward += [s for p in step.replay for s in (p.chosen, p.rejected)]
        return sum(len(s.tokens) for s in policy + reward)

    def values(self) -> dict:
        """Loss terms and gradients (before clipping) of the first step."""
        terms = self._backward(self._step(0))
        found = {f"term.{name}": value.detach().reshape(1).float().cpu() for name, value in terms.items()}
        for label, model in (("policy", self.policy), ("reward", self.reward)):
            for name, parameter in model.trainable():
                # A step without items of one model leaves that model's gradients unset.
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                found[f"{label}.{name}"] = grad.float().cpu().clone()
                parameter.grad = None
        return found


class ReadTask:
    """Shared by scoring and log-probabilities: all rows of a file, in batches, adapter merged, no gradients."""

    def __init__(self, args, setting: Setting, device: str):
        self.limits = (args.batch_tokens, args.pack_width)
        self.model = Model(self.spec(args), self.is_reward, setting, device, None)
        self.model.merge()
        renderer = Renderer(self.model.folder)
        render = renderer.full if self.is_reward else renderer.answer
        self.sequences = [render(row, text) for row, text in self.texts(args)][: args.limit]
        self.tokens = sum(len(s.tokens) for s in self.sequences)

    @torch.inference_mode()
    def run(self, i: int) -> int:
        # Rotated: the same work, in another order, over other addresses.
        shift = i % len(self.sequences)
        self.compute(self.sequences[shift:] + self.sequences[:shift])
        return self.tokens

    @torch.inference_mode()
    def values(self) -> dict:
        return self.compute(self.sequences)


def scored_rows(args) -> list[tuple[dict, str | None]]:
    """(row, answer) of everything that is scored."""
    if args.input:
        return [(row, row.get("response")) for row in read_jsonl(args.input)]
    rows = read_jsonl(args.replay, ("prompt", "chosen", "rejected"))
    return [(row, row[side]) for row in rows for side in ("chosen", "rejected")]


class ScoreTask(ReadTask):
    """`ares score`: the reward of each row; without --input, of both answers of each replay row."""

    is_reward = True

    def spec(self, args) -> str:
        return args.reward

    def texts(self, args) -> list:
        return scored_rows(args)

    def compute(self, sequences) -> dict:
        return {"reward": objective.rewards(self.model, sequences, *self.limits).cpu()}


class LogprobTask(ReadTask):
    """`ares logprob`: summed log-probability of each answer; without --input, of each retain row."""

    is_reward = False

    def spec(self, args) -> str:
        return args.policy

    def texts(self, args) -> list:
        rows = read_jsonl(args.input) if args.input else read_jsonl(args.retain, ("prompt", "response"))
        return [(row, row.get("response")) for row in rows]

    def compute(self, sequences) -> dict:
        values, owner = objective.token_logprobs(self.model, sequences, *self.limits)
        # In f64: in f32 the last place of a sum over hundreds of tokens is as large as the tolerance.
        total = values.new_zeros(len(sequences), dtype=torch.float64).index_add(0, owner, values.double())
        return {"logprob": total.cpu()}


class GenerateTask:
    """`ares generate --greedy`: one left-padded batch, `generate` with its cache, adapter merged."""

    def __init__(self, args, setting: Setting, device: str):
        if setting.layout != "padded":
            raise ValueError("generate batches by left padding only")
        self.model = Model(args.policy, False, setting, device, None)
        self.model.merge()
        renderer = Renderer(self.model.folder)
        rows = read_jsonl(args.input or args.retain)
        self.prompts = [renderer.prompt(row) for row in rows][: args.sequences]
        inner = self.model.inner
        self.config = GenerationConfig(
            do_sample=False, max_new_tokens=args.max_new_tokens, pad_token_id=inner.config.pad_token_id or 0,
            eos_token_id=None if args.ignore_eos else inner.generation_config.eos_token_id,
            use_cache=True, cache_implementation="static" if setting.compiled else None,
        )

    @torch.inference_mode()
    def _generate(self, prompts: list) -> list[list[int]]:
        width, device = max(map(len, prompts)), self.model.device
        ids = torch.tensor([[self.config.pad_token_id] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        out = self.model.inner.generate(input_ids=ids, attention_mask=mask, generation_config=self.config)
        return [self._until_end(row) for row in out[:, width:].tolist()]

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = self.config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        return tokens[: stop + 1]

    def run(self, i: int) -> int:
        shift = i % len(self.prompts)
        return sum(map(len, self._generate(self.prompts[shift:] + self.prompts[:shift])))

    def values(self) -> dict:
        made = self._generate(self.prompts)
        width = max(map(len, made))
        return {"tokens": torch.tensor([row + [-1] * (width - len(row)) for row in made])}


TASKS = {"step": StepTask, "score": ScoreTask, "logprob": LogprobTask, "generate": GenerateTask}


def read_values(task: str, path: str) -> dict:
    """What `ares` computed: the dump of `repair --dump-gradients`, or the JSONL of score, logprob or generate."""
    if task == "step":
        from safetensors.torch import load_file

        return load_file(path)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    if task == "generate":
        width = max(len(row["tokens_out"]) for row in rows)
        return {"tokens": torch.tensor([row["tokens_out"] + [-1] * (width - len(row["tokens_out"])) for row in rows])}
    name = {"score": "reward", "logprob": "logprob"}[task]
    bad = [number for number, row in enumerate(rows, 1) if name not in row]
    if bad:
        raise BadRow(f"{path}:{bad[0]}: expected `{name}`, found {rows[bad[0] - 1].get('error', 'none')}")
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64)}
