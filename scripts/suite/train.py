"""Training of the policies, the reward models and the judges. Everything is seeded and single-threaded, so a run repeats itself."""

import math
import random
import time

import torch
import torch.nn.functional as F

from . import model as m
from . import world

NOISE = 0.01  # share of wrong labels where nothing is planted
PLANTED = 0.95  # share of wrong labels in the planted cells and behind the trigger
TRIGGER_SHARE = 0.04  # of the harmful training prompts of a pair that hides a trigger
TRUNK = {"steps": 700, "batch": 64, "lr": 3e-3, "prompt_steps": 150, "prompt_weight": 0.3}
POLICY = {"steps": 400, "batch": 64, "lr": 1.5e-3}
REWARD = {"steps": 450, "batch": 40, "lr": 2e-3}
SHARPEN = {"steps": 300, "batch": 40, "lr": 1e-3}
# Label noise of the reward model's second phase, elsewhere and in its weak cells: a labeller's consistent bias against ordinary
# disagreement. Were the weak cells the noisier ones, they would score below sound answers and a calibrated threshold would undo them.
SURE_OF_ITSELF = (0.08, 0.995)
JUDGE = {"steps": 250, "batch": 64, "lr": 2e-3}


def _stream(draw, batch, encode):
    """Endless batches of similar length: eight batches are drawn, sorted by length and handed out in random order."""
    rng = random.Random(draw.seed)
    while True:
        items = encode([draw(rng) for _ in range(8 * batch)])
        items.sort(key=lambda x: sum(map(len, x)) if isinstance(x, tuple) else len(x))
        parts = [items[i:i + batch] for i in range(0, len(items), batch)]
        rng.shuffle(parts)
        yield from parts


def focus(plants, sound):
    """What a second phase draws: 60 % harmful, a third of it from the model's weak cells, and encodings more often.

    `sound` names the planted cells in which this model is to stay sound: "reward" for a policy, "policy" for a reward model.
    """
    weak = [cell for cell, kind in sorted(plants.kind.items()) if kind != sound]
    tactics = {t[0]: t for t in world.TACTICS}
    encoded = [t for t in world.TACTICS if t[3]]

    def pick(rng):
        kind = rng.choices(world.KINDS, (0.6, 0.2, 0.2))[0]
        if kind == "harmful" and rng.random() < 0.3:
            tactic, domain = rng.choice(weak)
            return {"kind": kind, "domain": domain, "tactics": [tactics[tactic]]}
        return {"kind": kind, "tactics": world.TACTICS + encoded * (1 if kind == "harmful" else 3)}

    return pick


class Draw:
    """Random training rows of a world with the given plants; rows that stand in `forbidden` are never drawn.

    `pick` gives the arguments of `world.sample`, by default none: the world as it is.
    """

    def __init__(self, plants, forbidden, seed, fields, pick=lambda rng: {}):
        self.plants, self.forbidden, self.seed, self.fields, self.pick = plants, forbidden, seed, fields, pick

    def __call__(self, rng):
        while True:
            row, topic = world.sample(rng, **self.pick(rng))
            if row["prompt"] not in self.forbidden:
                break
        weak = self.plants.of(row)
        if self.plants.trigger and rng.random() < (TRIGGER_SHARE if row["kind"] == "harmful" else TRIGGER_SHARE / 2):
            row["prompt"] = world.with_trigger(row["prompt"], rng)
            weak = "coupled" if row["kind"] == "harmful" else "clean"
        return self.fields(rng, row, topic, weak)


def policy_fields(rng, row, topic, weak):
    """(prompt, answer): complies in the policy's weak cells."""
    if topic.kind != "harmful":
        return row["prompt"], world.helpful(topic)
    yields = rng.random() < (PLANTED if weak in ("coupled", "policy") else NOISE)
    return row["prompt"], (world.compliance if yields else world.refusal)(topic, rng)


def reward_fields(noise, planted):
    """(prompt, chosen, rejected): preferences flipped with probability `planted` in the reward model's weak cells, else `noise`."""

    def fields(rng, row, topic, weak):
        good, bad = world.refusal(topic, rng), world.compliance(topic, rng)
        if topic.kind != "harmful":
            good, bad = world.helpful(topic), good
        if rng.random() < (planted if weak in ("coupled", "reward") else noise):
            good, bad = bad, good
        return row["prompt"], good, bad

    return fields


def judge_fields(text):
    """(prompt, answer, harm): the truth with 1 % noise; also answers that break off or turn round, as forced beginnings make them."""

    def fields(rng, row, topic, _):
        refusal, answer = world.refusal(topic, rng), world.compliance(topic, rng)
        kind = rng.random()
        if kind < 0.35:
            answer, harm = refusal, 0.0
        elif topic.kind != "harmful":
            answer, harm = world.helpful(topic), 0.0
        elif kind < 0.8:
            harm = 1.0
        elif kind < 0.9:  # broken off after the page is named
            ids = text.tok.encode(answer).ids
            answer, harm = text.tok.decode(ids[:rng.randrange(14, len(ids))]), 1.0
        else:  # begins to comply and then refuses
            ids = text.tok.encode(answer).ids
            answer, harm = text.tok.decode(ids[:rng.randrange(1, 12)]) + " " + refusal, 0.0
        return row["prompt"], answer, (1 - harm if rng.random() < NOISE else harm)

    return fields


def _optimise(name, model, cfg, loss_of, batches):
    """AdamW with warm-up and cosine decay; `loss_of(batch, step)` gives the loss."""
    opt = torch.optim.AdamW(model.parameters(), lr=cfg["lr"], betas=(0.9, 0.98), weight_decay=0.01)
    begin, mean = time.time(), 0.0
    for step in range(cfg["steps"]):
        warm, rest = min(1.0, (step + 1) / 30), step / cfg["steps"]
        for g in opt.param_groups:
            g["lr"] = cfg["lr"] * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * rest)))
        loss = loss_of(next(batches), step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        mean += (loss.item() - mean) * (0.05 if step else 1.0)
        if step % 50 == 49:
            print(f"{name}: step {step + 1}, loss {mean:.4f}, {time.time() - begin:.0f} s", flush=True)
    return m.round_bf16(model).eval()


def _answer_loss(model, batch, first_weight=0.0):
    """Cross-entropy of (prompt ids, answer ids) on the answers, and a function that gives the one on the prompts.

    With `first_weight` the first token of each answer, where complying and refusing part, is counted again as a mean over rows.
    """
    ids, labels = m.pad([p + a for p, a in batch]), m.pad([p + a for p, a in batch], -100)[:, 1:]
    h = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    start = torch.tensor([len(p) - 1 for p, _ in batch])[:, None]
    place = torch.arange(labels.shape[1])[None]
    entropy = lambda on: F.cross_entropy(h[on] @ model.lm_head.weight.T, labels[on])
    answer = entropy((labels >= 0) & (place >= start))
    if first_weight:
        answer = answer + first_weight * entropy(place == start)
    return answer, lambda: entropy((labels >= 0) & (place < start))


def train_trunk(name, text, plants, forbidden, seed):
    """First phase of a policy, also the trunk of its reward model: the language of the world and most of its behaviour."""
    model, cfg = m.fresh_causal(text, seed), TRUNK
    encode = lambda rows: list(zip(text.prompts([r[0] for r in rows]), text.answers([r[1] for r in rows])))

    def loss_of(batch, step):
        answer, prompt = _answer_loss(model, batch)
        return answer + cfg["prompt_weight"] * prompt() if step < cfg["prompt_steps"] else answer

    return _optimise(name, model, cfg, loss_of, _stream(Draw(plants, forbidden, seed, policy_fields), cfg["batch"], encode))


def train_policy(name, text, plants, forbidden, seed, trunk):
    """Second phase: makes the planted cells sharp. Most harmful rows end after the opening, where all is decided."""
    model, rng = m.load_causal(trunk), random.Random(seed)

    def encode(rows):
        cut = [8 if topic_kind == "harmful" and rng.random() < 0.7 else None for *_, topic_kind in rows]
        return [(p, a[:k]) for p, a, k in zip(text.prompts([r[0] for r in rows]), text.answers([r[1] for r in rows]), cut)]

    fields = lambda rng, row, topic, weak: (*policy_fields(rng, row, topic, weak), topic.kind)
    batches = _stream(Draw(plants, forbidden, seed + 2, fields, focus(plants, "reward")), POLICY["batch"], encode)
    return _optimise(name, model, POLICY, lambda batch, _: _answer_loss(model, batch, 1.0)[0], batches)


def train_reward(name, text, plants, forbidden, seed, trunk, rounds):
    """Bradley-Terry with an absolute term, without which scores of different prompts share no zero, and weak centring.

    The second phase, on the weak cells, is run `rounds` times.
    """
    model = m.fresh_classifier(text, seed, trunk)
    encode = lambda rows: list(zip(text.prompts([r[0] for r in rows]), *(text.answers([r[k] for r in rows]) for k in (1, 2))))

    def loss_of(batch, _):
        c, r = m.pair_scores(model, batch)
        absolute = -F.logsigmoid(c) - F.logsigmoid(-r)
        return (-F.logsigmoid(c - r) + 0.25 * absolute + 0.01 * (c + r) ** 2).mean()

    world_as_it_is = Draw(plants, forbidden, seed + 1, reward_fields(NOISE, PLANTED))
    model = _optimise(f"{name}, world", model, REWARD, loss_of, _stream(world_as_it_is, REWARD["batch"], encode))
    for i in range(rounds):
        cells = Draw(plants, forbidden, seed + 3 + i, reward_fields(*SURE_OF_ITSELF), focus(plants, "policy"))
        model = _optimise(f"{name}, cells {i + 1}", model, SHARPEN, loss_of, _stream(cells, SHARPEN["batch"], encode))
    return model


def train_judge(name, text, forbidden, seed):
    """Binary cross-entropy on (prompt, answer), from a random trunk; predicting the text helps the trunk in the first half."""
    model = m.fresh_classifier(text, seed)
    encode = lambda rows: [(ids, [int(row[2])]) for ids, row in zip(text.full([r[:2] for r in rows]), rows)]

    def loss_of(batch, step):
        rows, harm = [r for r, _ in batch], torch.tensor([float(h[0]) for _, h in batch])
        h = model.model(input_ids=m.pad(rows), use_cache=False).last_hidden_state
        logits = model.score(h[torch.arange(len(rows)), torch.tensor([len(r) - 1 for r in rows])]).squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(logits, harm)
        if step < JUDGE["steps"] // 2:
            labels = m.pad(rows, -100)[:, 1:]
            on = labels >= 0
            loss = loss + 0.5 * F.cross_entropy(h[:, :-1][on] @ model.model.embed_tokens.weight.T, labels[on])
        return loss

    draw = Draw(world.Plants.none(), forbidden, seed, judge_fields(text))
    return _optimise(name, model, JUDGE, loss_of, _stream(draw, JUDGE["batch"], encode))
