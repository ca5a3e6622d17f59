#!/usr/bin/env python3
"""Golden values of one joint step for `tests/golden.rs`: the whole objective on the folders of scripts/golden.py.

    python -m pip install -r scripts/requirements.txt
    python scripts/golden_joint.py      # writes tests/golden-joint/<variant>.{json,safetensors}

Every term is on in every variant; they differ in what the objective may be told (mean or summed log-probabilities, NPO or
unlikelihood, CE or KL, coupling on or off, margin, forced prefixes). Terms, coupling weights and gradients come from
scripts/hf_baseline, which is written against the method, in float64. Items are token ids, so no tokenizer has a say.
"""

import random
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from transformers.utils import logging

from golden import render
from hf_baseline.models import Model, Setting
from hf_baseline.objective import Failure, Objective, Pair, Step, backward, remember_start
from hf_baseline.rows import Sequence, forced

ROOT = Path(__file__).resolve().parent.parent / "tests"
POLICY, REWARD = "llama-causal", "llama-reward"
THRESHOLDS = {"tau_r": 0.25, "mu_0": -0.4, "s": 1.3}
WEIGHTS = {"npo": 0.7, "safe": 0.5, "retain": 1.1, "bt": 0.9, "center": 0.3, "replay": 1.2, "anchor": 2.0}
VARIANTS = {
    "npo": {},
    "sum-kl": {"logp": "sum", "b": 0.1, "retain": "kl", "margin": 0.2},
    "unlikelihood": {"likelihood": "unlikelihood", "coupling": False},
}
# (verdict, has y⁺, forced tokens)
FAILURES = [("coupled", True, 0), ("policy", True, 2), ("reward", True, 0), ("coupled", True, 3), ("policy", False, 0)]


def draw(generator: random.Random, low: int, high: int) -> list[int]:
    return [generator.randint(3, 100) for _ in range(generator.randint(low, high))]


def items() -> dict:
    """Prompts and answers of the step as ids; lengths ragged, one prompt of a single token."""
    generator = random.Random(20)
    failures = []
    for number, (verdict, has_chosen, k) in enumerate(FAILURES):
        prompt = draw(generator, 1, 1) if number == 3 else draw(generator, 3, 9)
        failures.append({
            "verdict": verdict, "prompt": prompt, "rejected": draw(generator, 4, 9),
            "chosen": draw(generator, 2, 7) if has_chosen else None, "forced": k,
        })
    retain = [{"prompt": draw(generator, 2, 8), "answer": draw(generator, 1, 8)} for _ in range(3)]
    replay = [
        {"prompt": draw(generator, 2, 8), "chosen": draw(generator, 2, 8), "rejected": draw(generator, 2, 8),
         "harmful": harmful}
        for harmful in ([False, False], [False, True], [False, False], [True, True], [False, False])
    ]
    return {"failures": failures, "retain": retain, "replay": replay}


def sequence(prompt: list[int], answer: list[int]) -> Sequence:
    return Sequence(tuple(prompt + answer), len(prompt), len(prompt) + len(answer))


def step_of(plan: dict) -> Step:
    failures = []
    for f in plan["failures"]:
        rejected = sequence(f["prompt"], f["rejected"])
        chosen = sequence(f["prompt"], f["chosen"]) if f["chosen"] else None
        safe = forced(rejected, chosen, f["forced"]) if chosen else None
        failures.append(Failure(f["verdict"], rejected, safe, chosen, rejected))
    replay = [
        Pair(sequence(p["prompt"], p["chosen"]), sequence(p["prompt"], p["rejected"]), tuple(p["harmful"]))
        for p in plan["replay"]
    ]
    return Step(failures, [sequence(r["prompt"], r["answer"]) for r in plan["retain"]], replay)


def write(name: str, options: dict) -> None:
    o = Objective(weights=WEIGHTS, **THRESHOLDS, **options)
    models = {"policy": ROOT / "golden" / POLICY, "reward": ROOT / "golden" / REWARD}
    models = {key: Model(f"{folder}+{folder}/adapter", key == "reward", Setting("f64")) for key, folder in models.items()}
    plan = items()
    step = step_of(plan)
    remember_start(**models, step=step)
    terms, w = backward(**models, step=step, o=o)
    terms = {key: value.item() for key, value in terms.items()}
    assert all(abs(value) > 1e-3 for value in terms.values()), f"{name}: a term that is 0 proves nothing: {terms}"
    held = [pair.held(o.tau_r) for pair in step.replay]
    assert 0 < sum(map(sum, held)) < 2 * len(held), f"{name}: anchors must be some of the answers: {held}"
    for f, made in zip(plan["failures"], step.failures):
        f["logprob_0"] = made.logprob_0
    for p, made, keep in zip(plan["replay"], step.replay, held):
        p["anchors"] = [start if kept else None for start, kept in zip(made.reward_0, keep)]
    head = {"schema": 1, "policy": POLICY, "reward": REWARD, "objective": asdict(o)}
    document = head | plan | {"coupling": w.tolist(), "terms": terms}
    (ROOT / "golden-joint").mkdir(exist_ok=True)
    (ROOT / "golden-joint" / f"{name}.json").write_text(render(document))
    grads = {f"{label}.{key}": p.grad.float() for label, model in models.items() for key, p in model.trainable()}
    save_file(grads, ROOT / "golden-joint" / f"{name}.safetensors", metadata={"format": "pt"})
    print(name, {key: round(value, 5) for key, value in terms.items()}, "held", held)


if __name__ == "__main__":
    logging.disable_progress_bar()
    for variant in VARIANTS.items():
        write(*variant)
