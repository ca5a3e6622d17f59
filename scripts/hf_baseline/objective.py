"""The joint objective, term for term.

    L = npo·L_npo + safe·L_safe + retain·L_retain                              policy; verdicts policy, coupled
      + bt·L_bt + center·L_center + replay·L_replay + anchor·L_anchor          reward model; verdicts reward, coupled

Every term is the mean over the items of the step that carry it, 0 if none. ℓ is the mean log-probability per answer
token; r̃ = (r − mu_0)/s; a term's name in a dump is its key here.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .models import Model
from .rows import Sequence

WEIGHTS = {"npo": 0.3, "safe": 0.5, "retain": 1.0, "bt": 1.0, "center": 0.01, "replay": 1.0, "anchor": 10.0}


@dataclass(frozen=True)
class Objective:
    """Weights and constants, with the method's defaults."""

    weights: dict = field(default_factory=WEIGHTS.copy)
    likelihood: str = "npo"  # npo | unlikelihood, both under the weight `npo`
    logp: str = "mean"  # mean | sum, within L_npo
    b: float = 1.0
    margin: float = 0.0
    retain: str = "ce"  # ce | kl
    coupling: bool = True
    tau_r: float = 0.0
    mu_0: float = 0.0
    s: float = 1.0

    def scaled(self, r: torch.Tensor) -> torch.Tensor:
        return (r - self.mu_0) / self.s


@dataclass
class Failure:
    """One failure: y⁻ and y⁺ as the policy and as the reward model read them. `safe` is what the policy learns from."""

    verdict: str  # policy | reward | coupled
    rejected: Sequence
    safe: Sequence | None
    reward_chosen: Sequence | None
    reward_rejected: Sequence
    logprob_0: float = 0.0  # ℓ_0(y⁻), the adapter off


@dataclass
class Pair:
    """One replay pair as the reward model reads it, with its scores under r_0."""

    chosen: Sequence
    rejected: Sequence
    harmful: tuple = (False, False)  # as the judge says
    reward_0: tuple = (0.0, 0.0)

    def held(self, tau_r: float) -> list[bool]:
        """Which answers' scores are worth holding: none of a pair that r_0 misorders or ties, no harmful one it approves."""
        ordered = self.reward_0[0] > self.reward_0[1]
        return [ordered and not (h and r >= tau_r) for h, r in zip(self.harmful, self.reward_0)]


@dataclass
class Step:
    """The items of one step."""

    failures: list
    retain: list
    replay: list

    @property
    def of_policy(self) -> list:
        return [f for f in self.failures if f.verdict in ("policy", "coupled")]

    @property
    def of_reward(self) -> list:
        return [f for f in self.failures if f.verdict in ("reward", "coupled") and f.reward_chosen]


def wide(values: torch.Tensor) -> torch.Tensor:
    """At least f32: losses are never computed in bf16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def head_logprobs(hidden: torch.Tensor, weight: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """log p of `label` per row of `hidden`, (n,), at least in f32: only rows that predict an answer token meet the vocabulary."""
    return -F.cross_entropy(wide(F.linear(hidden, weight)), label, reduction="none")


compiled_head_logprobs = torch.compile(head_logprobs, dynamic=True)


def token_logprobs(model: Model, sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p of every answer token, index of its sequence); tokens of one sequence are neighbours and in order."""
    head = compiled_head_logprobs if model.setting.compiled else head_logprobs
    values, owners = [], []
    for batch in model.lay_out(sequences):
        at, label, owner = (t.to(model.device) for t in batch.targets())
        values.append(head(model.hidden(batch)[at], model.inner.lm_head.weight, label))
        owners.append(torch.tensor([index for index, _, _ in batch.rows], device=model.device)[owner])
    return torch.cat(values), torch.cat(owners)


def mean_by_owner(values: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of the values of each owner, (count,); 0 where there is none."""
    return values.new_zeros(count).index_add(0, owner, values) / torch.bincount(owner, minlength=count).clamp(min=1)


def rewards(model: Model, sequences: list[Sequence]) -> torch.Tensor:
    """Score at the last token of each sequence, (N,), at least f32."""
    parts, order = [], []
    for batch in model.lay_out(sequences):
        last = model.hidden(batch)[batch.last().to(model.device)]
        parts.append(wide(model.inner.score(last))[:, 0])
        order += [index for index, _, _ in batch.rows]
    return torch.cat(parts)[torch.tensor(order, device=model.device).argsort()]


def mean_or_zero(values: torch.Tensor) -> torch.Tensor:
    return values.mean() if len(values) else values.sum()


def reward_terms(model: Model, step: Step, o: Objective) -> tuple[dict, torch.Tensor]:
    """(terms of the reward model, w per item of the policy). One forward over all answers."""
    new, old = step.of_reward, step.replay
    sequences = [f.reward_chosen for f in new] + [f.reward_rejected for f in new]
    sequences += [p.chosen for p in old] + [p.rejected for p in old]
    chosen, rejected, kept, lost = rewards(model, sequences).split([len(new), len(new), len(old), len(old)])
    held = torch.tensor([p.held(o.tau_r) for p in old], device=kept.device).reshape(-1, 2).bool()
    start = kept.new_tensor([p.reward_0 for p in old]).reshape(-1, 2)[held]
    now = torch.stack([kept, lost], 1)[held]
    terms = {
        "bt": mean_or_zero(-F.logsigmoid(chosen - rejected - o.margin)),
        "center": mean_or_zero((o.scaled(chosen) + o.scaled(rejected)) ** 2),
        "replay": mean_or_zero(-F.logsigmoid(kept - lost - o.margin)),
        "anchor": mean_or_zero((o.scaled(now) - o.scaled(start)) ** 2),
    }
    return terms, coupling(model, step, o, dict(zip(map(id, new), rejected.detach())))


def coupling(model: Model, step: Step, o: Objective, known: dict) -> torch.Tensor:
    """w = ½ + σ((r_φ(y⁻) − τ_r)/s), divided by its mean, detached; scores that the reward model's own terms did not need are read here."""
    items = step.of_policy
    if not o.coupling or not items:
        return torch.ones(len(items), device=model.device)
    unknown = [f for f in items if id(f) not in known]
    if unknown:
        with torch.no_grad():
            known |= dict(zip(map(id, unknown), rewards(model, [f.reward_rejected for f in unknown])))
    w = 0.5 + torch.sigmoid((torch.stack([known[id(f)] for f in items]) - o.tau_r) / o.s)
    return w / w.mean()


def policy_terms(model: Model, step: Step, w: torch.Tensor, o: Objective) -> dict:
    """Terms of the policy. One forward over rejected, safe and retained answers."""
    items = step.of_policy
    safe = [f.safe for f in items if f.safe]
    kl = o.retain == "kl"
    sequences = [f.rejected for f in items] + safe + ([] if kl else step.retain)
    values, owner = token_logprobs(model, sequences)
    means = mean_by_owner(values, owner, len(sequences))
    rejected, kept, retained = means.split([len(items), len(safe), 0 if kl else len(step.retain)])
    if o.likelihood == "npo":
        start = means.new_tensor([f.logprob_0 for f in items])
        n = means.new_tensor([f.rejected.end - f.rejected.start for f in items])
        b = o.b * n if o.logp == "sum" else o.b
        unlearned = (-2 / b) * F.logsigmoid(-b * (rejected - start))
    else:  # −mean of log(1 − p) over tokens with log p ≥ −5
        mask = (owner < len(items)) & (values >= -5)
        unlearned = mean_by_owner(-torch.log(-torch.expm1(values[mask])), owner[mask], len(items))
    retain = retain_kl(model, step.retain) if kl else mean_or_zero(-retained)
    return {"npo": mean_or_zero(w * unlearned), "safe": mean_or_zero(-kept), "retain": retain}


def retain_kl(model: Model, sequences: list[Sequence]) -> torch.Tensor:
    """Mean over sequences of the mean over answer tokens of KL(π_0 ‖ π_θ)."""
    total = [torch.zeros(0, device=model.device)]
    for batch in model.lay_out(sequences):
        at, _, owner = (t.to(model.device) for t in batch.targets())
        with torch.no_grad(), model.original():
            start = F.log_softmax(wide(model.inner.lm_head(model.hidden(batch)[at])), -1)
        now = F.log_softmax(wide(model.inner.lm_head(model.hidden(batch)[at])), -1)
        divergence = (start.exp() * (start - now)).sum(-1)
        total.append(mean_by_owner(divergence, owner, len(batch.rows)))
    return mean_or_zero(torch.cat(total))


def backward(policy: Model, reward: Model, step: Step, o: Objective) -> tuple[dict, torch.Tensor]:
    """Gradients of the whole objective in both models; returns its terms and the coupling weights."""
    of_reward, w = reward_terms(reward, step, o)
    weighted(of_reward, o).backward()
    of_policy = policy_terms(policy, step, w, o)
    weighted(of_policy, o).backward()
    return of_policy | of_reward, w


def weighted(terms: dict, o: Objective) -> torch.Tensor:
    return sum(o.weights[name] * value for name, value in terms.items())


@torch.no_grad()
def remember_start(policy: Model, reward: Model, step: Step) -> None:
    """Fills in ℓ_0 and r_0: computed once per item with the adapters off, and cached."""
    # In eager mode: compiling a second variant for one use would only cost time.
    with torch.compiler.set_stance("force_eager"), policy.original(), reward.original():
        values, owner = token_logprobs(policy, [f.rejected for f in step.failures])
        for f, value in zip(step.failures, mean_by_owner(values, owner, len(step.failures)).tolist()):
            f.logprob_0 = value
        scores = rewards(reward, [p.chosen for p in step.replay] + [p.rejected for p in step.replay])
        for p, *both in zip(step.replay, *scores.reshape(2, -1).tolist()):
            p.reward_0 = tuple(both)
