#!/usr/bin/env python3
"""Golden values of one Dr.GRPO step for `tests/golden.rs`, by TRL's own trainer on a folder of scripts/golden.py.

    python -m pip install -r scripts/requirements.txt trl==1.16.0
    python scripts/golden_grpo.py       # writes tests/golden-grpo/step.{json,safetensors}

TRL is given the answers, which are drawn here, and their rewards; advantages, reference log-probabilities (without the adapter),
loss and gradients are its own, of weights in float64; it keeps log-probabilities in float32. Groups are ragged: answers of one token and as long as is allowed.
"""

import random
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from golden import render
from hf_baseline.models import Model, Setting

ROOT = Path(__file__).resolve().parent.parent
POLICY, BETA, GROUP, LONGEST = "llama-causal", 0.04, 4, 12


def samples() -> list[dict]:
    """Answers of three prompts, a group each, with their rewards; in one group all rewards are equal."""
    generator = random.Random(7)
    draw = lambda n: [generator.randint(3, 100) for _ in range(n)]
    groups = [(draw(6), [3.0, 1.0, -1.5, 0.5]), (draw(2), [2.0] * GROUP), (draw(9), [-0.25, 0.75, 4.0, -2.0])]
    lengths = iter([1, 5, LONGEST, 3, 4, 2, 7, 1, LONGEST, 6, 2, 9])
    return [{"prompt": prompt, "tokens": draw(next(lengths)), "reward": reward} for prompt, rewards in groups for reward in rewards]


def main() -> None:
    logging.disable_progress_bar()
    folder, drawn = ROOT / "tests/golden" / POLICY, samples()
    model = Model(f"{folder}+{folder}/adapter", False, Setting("f64"))
    # TRL wants words and a tokenizer; neither has a say.
    words = [str(number) for number in range(len(drawn))]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/framing/policy")
    options = GRPOConfig(
        output_dir="/tmp/golden-grpo", use_cpu=True, bf16=False, report_to=[], loss_type="dr_grpo", scale_rewards="none", beta=BETA,
        num_generations=GROUP, per_device_train_batch_size=len(drawn), max_completion_length=LONGEST, gradient_checkpointing=False,
        use_bias_correction_kl=False)
    trainer = GRPOTrainer(
        model=model.inner, reward_funcs=lambda completions, **_: [sample["reward"] for sample in drawn], args=options,
        train_dataset=Dataset.from_dict({"prompt": words}), processing_class=tokenizer)
    prompts, answers = [sample["prompt"] for sample in drawn], [sample["tokens"] for sample in drawn]
    trainer._generate = lambda _: (prompts, answers, None, words, None, {}, None, None)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions([{"prompt": word} for word in words])
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    advantages = inputs["advantages"].tolist()
    assert abs(loss.item()) > 1e-3 and advantages[4:8] == [0.0] * GROUP and all(advantages[:4]), (loss, advantages)
    out = ROOT / "tests/golden-grpo"
    out.mkdir(exist_ok=True)
    document = {"schema": 1, "policy": POLICY, "beta": BETA, "group": GROUP, "longest": LONGEST, "samples": drawn,
                "advantages": advantages, "loss": loss.item()}
    (out / "step.json").write_text(render(document))
    grads = {name: parameter.grad.float() for name, parameter in model.trainable()}
    save_file(grads, out / "step.safetensors", metadata={"format": "pt"})
    print("loss", loss.item(), "advantages", advantages)


if __name__ == "__main__":
    main()
