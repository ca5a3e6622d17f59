#!/usr/bin/env python3
"""Golden values for `tests/golden.rs`: what transformers + PEFT compute on tiny random checkpoints.

    python -m pip install -r scripts/requirements.txt
    python scripts/golden.py            # writes tests/golden/<name>/, about a minute; `git diff` says what moved

One folder per architecture and head. Each holds

    config.json, model.safetensors      the checkpoint, laid out and spelled as on the Hub
                                        (one is sharded, some spell their config as transformers 4)
    adapter/                            a LoRA adapter as PEFT saves it: all seven projections, A and B random and
                                        not zero; a classifier's carries its own score head
    golden.json                         token sequences, logits, log-probabilities or rewards, greedy continuations,
                                        each without ("base") and with the adapter ("adapted"), and a scalar loss
    grads.safetensors                   its gradient with respect to every A and B (and the score head), PEFT names

The loss is, over sequences i with the fixed weights c that golden.json gives,

    causal           L = sum_i c_i * mean_t log p(answer token t of i)
    classification   L = sum_i sum_k c_ik * logit_k at the last token of i

Weights are random but sizeable (norm weights are not 1, biases are not 0), so that a dropped term shows. Everything
is computed in float64 from the stored weights, one sequence at a time, without padding; transformers itself keeps the
statistics of RMSNorm and the table of rotations in float32. Values are stored with nine digits. What
this script prints is how far the same computation in float32 lies from that: the noise of a correct f32 engine.
"""

import importlib.metadata
import json
import math
import shutil
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.utils import logging

from hf_baseline.models import Model, Setting, auto_class, fresh_adapter, save_adapter

OUT = Path(__file__).resolve().parent.parent / "tests" / "golden"
RANK, ALPHA = 4, 12
GREEDY_TOKENS = 12
# Two tokens closer than this would make a greedy continuation depend on rounding.
GREEDY_MARGIN = 2e-3

# (prompt tokens, all tokens). The first two share their prompt; a prompt of one token has no row of its own before
# the answer; the fourth is longer than the windows (7, 9).
LENGTHS = [(5, 9), (5, 12), (1, 4), (11, 23)]


@dataclass
class Case:
    """One folder: which architecture, which head, and how its files are written."""

    name: str
    architecture: str
    config: dict
    labels: int = 0  # 0: causal language model
    dtype: str = "float32"
    shard_size: str = "1GB"
    lengths: list = field(default_factory=lambda: LENGTHS)

    @property
    def folder(self) -> Path:
        return OUT / self.name

    @property
    def reward(self) -> bool:
        return self.labels > 0

    def open(self, dtype: str, adapter: str = "") -> Model:
        return Model(f"{self.folder}{adapter}", self.reward, Setting(dtype), train_head=True)


def spelled(v5: bool, theta: float, scaling: dict | None, dtype: str = "float32") -> dict:
    """The keys that transformers 5 renamed: rotation and dtype, in either spelling."""
    if v5:
        return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"} | (scaling or {}), "dtype": dtype}
    return {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": dtype}


def cases() -> list[Case]:
    """All folders. Sizes are ragged, nothing is square that need not be, and the norms' eps is large enough to show."""
    common = {"hidden_act": "silu", "vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    common |= {"max_position_embeddings": 256, "attention_dropout": 0.0, "initializer_range": 0.02}
    one, two = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}, {}  # two labels are the unwritten default

    llama = common | {"model_type": "llama", "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3,
                      "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 0.03,
                      "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
    # Head size 16 and an original context of 32 put frequencies into all three bands of Llama 3's rule.
    llama3 = llama | {"hidden_size": 44, "intermediate_size": 68, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "head_dim": 16, "tie_word_embeddings": True}
    bands = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 32}
    mistral = common | {"model_type": "mistral", "hidden_size": 40, "intermediate_size": 92, "num_hidden_layers": 2,
                        "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 0.03,
                        "sliding_window": 7, "tie_word_embeddings": False}
    # As published for Qwen 2.5: a window is named, and switched off.
    qwen2 = common | {"model_type": "qwen2", "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2,
                      "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 0.02, "sliding_window": 7,
                      "use_sliding_window": False, "max_window_layers": 2, "tie_word_embeddings": True}
    # Only the layers from `max_window_layers` on look through the window.
    windowed = {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}
    qwen3 = common | {"model_type": "qwen3", "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2,
                      "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 0.02,
                      "attention_bias": False, "sliding_window": None, "use_sliding_window": False,
                      "max_window_layers": 2, "tie_word_embeddings": False}
    # `gelu` is what the first release said and never meant. √C and 1/√e are no powers of two.
    gemma = common | {"model_type": "gemma", "hidden_size": 44, "intermediate_size": 72, "num_hidden_layers": 2,
                      "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24, "rms_norm_eps": 0.02,
                      "hidden_act": "gelu", "attention_bias": False}
    # Caps that bend what they cap; every other layer looks through the window.
    gemma2 = common | {"model_type": "gemma2", "hidden_size": 44, "intermediate_size": 72, "num_hidden_layers": 3,
                       "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 0.02,
                       "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "sliding_window": 7,
                       "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.5, "final_logit_softcapping": 4.0}
    # Two rotations: another base through the window, and a stretched one beyond it; every third layer sees all.
    gemma3 = gemma | {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 4,
                      "num_key_value_heads": 2, "sliding_window": 7, "query_pre_attn_scalar": 20, "sliding_window_pattern": 3}
    del gemma3["hidden_act"]
    local = {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "torch_dtype": "float32",
             "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    # Every third layer does not rotate.
    smollm3 = common | {"model_type": "smollm3", "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3,
                        "num_attention_heads": 5, "num_key_value_heads": 1, "rms_norm_eps": 0.02,
                        "no_rope_layer_interval": 3, "attention_bias": False, "mlp_bias": False}
    granite = llama | {"model_type": "granite", "num_hidden_layers": 2, "embedding_multiplier": 5.5, "residual_multiplier": 0.22,
                       "attention_multiplier": 0.3, "logits_scaling": 1.7}
    # Fused matrices; three quarters of each head turn, stretched one by one (the long list is for contexts that are not computed).
    phi3 = common | {"model_type": "phi3", "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2,
                     "num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 0.02, "tie_word_embeddings": False}
    long = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 128}
    short = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.9, 2.4, 3.0], "long_factor": [1.5, 2.0, 3.0, 5.0, 7.0, 9.0]}
    # Norms after both halves alone, over all of q and all of k; the third of them with a window on three layers of four, YaRN on the others.
    olmo2 = common | {"model_type": "olmo2", "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6,
                      "num_key_value_heads": 2, "rms_norm_eps": 0.02, "attention_bias": False, "tie_word_embeddings": False}
    olmo3 = olmo2 | {"model_type": "olmo3", "num_hidden_layers": 4, "sliding_window": 7, "num_attention_heads": 4, "head_dim": 16}
    yarn = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 8, "beta_slow": 1, "original_max_position_embeddings": 32}
    v4, v5 = False, True
    return [
        Case("llama-causal", "LlamaForCausalLM", llama | spelled(v4, 10000.0, None)),
        Case("llama-reward", "LlamaForSequenceClassification",
             llama | {"num_hidden_layers": 2} | one | spelled(v4, 10000.0, None), 1),
        Case("llama3-causal", "LlamaForCausalLM", llama3 | spelled(v5, 10000.0, bands),
             lengths=LENGTHS + [(70, 150)]),
        Case("llama3-reward", "LlamaForSequenceClassification", llama3 | one | spelled(v4, 10000.0, bands), 1,
             lengths=LENGTHS + [(70, 150)]),
        Case("mistral-causal", "MistralForCausalLM", mistral | spelled(v5, 10000.0, None)),
        Case("mistral-reward", "MistralForSequenceClassification",
             mistral | one | spelled(v4, 10000.0, None, "float16"), 1, dtype="float16"),
        Case("qwen2-causal", "Qwen2ForCausalLM", qwen2 | spelled(v4, 1000000.0, None), shard_size="110KB"),
        Case("qwen2-reward", "Qwen2ForSequenceClassification", qwen2 | two | spelled(v5, 1000000.0, None), 2),
        Case("qwen3-causal", "Qwen3ForCausalLM", qwen3 | windowed | spelled(v5, 1000000.0, None)),
        Case("qwen3-reward", "Qwen3ForSequenceClassification",
             qwen3 | one | spelled(v5, 1000000.0, None, "bfloat16"), 1, dtype="bfloat16"),
        Case("gemma-causal", "GemmaForCausalLM", gemma | spelled(v4, 10000.0, None)),
        Case("gemma-reward", "GemmaForSequenceClassification",
             gemma | {"hidden_act": "gelu_pytorch_tanh"} | one | spelled(v5, 10000.0, None, "bfloat16"), 1, dtype="bfloat16"),
        Case("gemma2-causal", "Gemma2ForCausalLM", gemma2 | spelled(v5, 10000.0, None)),
        Case("gemma2-reward", "Gemma2ForSequenceClassification", gemma2 | one | spelled(v4, 10000.0, None), 1),
        Case("gemma3-causal", "Gemma3ForCausalLM", gemma3 | local),
        Case("gemma3-reward", "Gemma3TextForSequenceClassification",
             gemma3 | one | {"dtype": "float32", "rope_parameters": {
                 "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                 "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}}}, 1),
        Case("smollm3-causal", "SmolLM3ForCausalLM", smollm3 | spelled(v4, 2000000.0, None)),
        Case("smollm3-reward", "SmolLM3ForSequenceClassification",
             smollm3 | one | spelled(v5, 2000000.0, None, "bfloat16"), 1, dtype="bfloat16"),
        Case("granite-causal", "GraniteForCausalLM", granite | spelled(v4, 10000.0, None)),
        Case("phi3-causal", "Phi3ForCausalLM", phi3 | long | spelled(v4, 10000.0, short)),
        Case("phi3-reward", "Phi3ForSequenceClassification",
             phi3 | {"sliding_window": 7} | one | spelled(v5, 10000.0, None, "bfloat16"), 1, dtype="bfloat16"),
        Case("olmo2-causal", "Olmo2ForCausalLM", olmo2 | spelled(v4, 500000.0, None)),
        Case("olmo2-reward", "Olmo2ForSequenceClassification", olmo2 | one | spelled(v5, 10000.0, None, "bfloat16"), 1, dtype="bfloat16"),
        Case("olmo3-causal", "Olmo3ForCausalLM", olmo3 | spelled(v4, 10000.0, yarn)),
        Case("olmo3-reward", "Olmo3ForSequenceClassification", olmo3 | one | {"dtype": "float32", "rope_parameters": {
            "full_attention": yarn | {"rope_theta": 20000.0, "attention_factor": 1.3},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0}}}, 1),
    ]


# ---------------------------------------------------------------------------------------------------- writing


def random_for(label: str) -> torch.Generator:
    """A generator that depends on the label alone: no value moves when a case or a tensor is added."""
    return torch.Generator().manual_seed(zlib.crc32(label.encode()))


def random_parameter(case: Case, name: str, like: torch.Tensor) -> torch.Tensor:
    """Values large enough that every term of the model matters, small enough that no softmax saturates."""
    generator = random_for(f"{case.name}/{name}")
    if like.dim() == 1:
        uniform = torch.rand(like.shape, generator=generator)
        # Gemma's gains are 1 + w.
        return uniform - 0.5 if name.endswith("bias") or "Gemma" in case.architecture else uniform + 0.5
    tied = case.config.get("tie_word_embeddings", True) and not case.labels
    # Gemma's embedding comes out √C times as large.
    small = 0.15 if "Gemma" in case.architecture else 0.4 if tied else 1.0
    scale = {"embed_tokens": small, "lm_head": 1.5 / math.sqrt(like.shape[1])}
    scale |= {"lora_A": 1.0 / math.sqrt(like.shape[1]), "lora_B": 0.1}
    part = next((part for part in scale if part in name), None)
    return torch.randn(like.shape, generator=generator) * scale.get(part, 1.2 / math.sqrt(like.shape[1]))


@torch.no_grad()
def randomise(case: Case, parameters) -> None:
    for name, parameter in parameters:
        parameter.copy_(random_parameter(case, name, parameter))


def write_checkpoint(case: Case) -> None:
    """Base model: files by transformers, then config.json in the spelling that the case asks for."""
    case.folder.mkdir(parents=True)
    config_file = case.folder / "config.json"
    text = json.dumps({"architectures": [case.architecture]} | case.config, indent=2, sort_keys=True) + "\n"
    config_file.write_text(text)
    config, dtype = AutoConfig.from_pretrained(case.folder), getattr(torch, case.dtype)
    model = auto_class(case.reward).from_config(config, dtype=dtype)
    randomise(case, model.named_parameters())
    model.save_pretrained(case.folder, max_shard_size=case.shard_size)
    config_file.write_text(text)
    (case.folder / "generation_config.json").unlink(missing_ok=True)


def write_adapter(case: Case) -> None:
    """The adapter as PEFT saves it; PEFT itself adds a classifier's score head to what is saved."""
    model = fresh_adapter(case.open("f32").inner, case.reward, RANK, ALPHA)
    randomise(case, ((name, p) for name, p in model.named_parameters() if p.requires_grad))
    model.peft_config["default"].base_model_name_or_path = f"tests/golden/{case.name}"
    save_adapter(model, case.folder / "adapter")


def sequences(case: Case) -> list[dict]:
    """Random tokens; ids 0 to 2 (padding, begin, end) never occur."""
    generator = random_for(f"{case.name}/tokens")
    rows = []
    for prompt_tokens, total in case.lengths:
        tokens = torch.randint(3, case.config["vocab_size"], (total,), generator=generator).tolist()
        if len(rows) == 1:
            tokens[:prompt_tokens] = rows[0]["tokens"][:prompt_tokens]
        # Different sizes, both signs; rounded, so that the JSON holds them exactly.
        c = (torch.rand(max(case.labels, 1), generator=generator) + 0.5) * (-1) ** len(rows)
        c = [round(x, 3) for x in c.tolist()]
        rows.append({"tokens": tokens, "prompt_tokens": prompt_tokens, "c": c})
    return rows


# -------------------------------------------------------------------------------------------------- computing


def answer_logprobs(logits: torch.Tensor, row: dict) -> torch.Tensor:
    """log p of each answer token, (n,), from the (T, V) logits of its sequence."""
    start, tokens = row["prompt_tokens"], torch.tensor(row["tokens"])
    logprobs = logits[start - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, tokens[start:, None])[:, 0]


def logit_rows(row: dict) -> list[int]:
    """Positions whose logits are stored whole: the prompt's last, one inside the answer, the last."""
    start, last = row["prompt_tokens"] - 1, len(row["tokens"]) - 1
    return sorted({start, (start + last) // 2, last})


@torch.no_grad()
def greedy(model, prompt: list[int]) -> list[int]:
    """Greedy continuation without a cache: each token from a whole new forward. Stops before a near tie."""
    tokens = list(prompt)
    for _ in range(GREEDY_TOKENS):
        best = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
        if not (best.values[0] - best.values[1]).item() > GREEDY_MARGIN:
            break
        tokens.append(best.indices[0].item())
    return tokens[len(prompt) :]


def evaluate(case: Case, model, rows: list[dict]) -> tuple[list[dict], torch.Tensor]:
    """What the model says of each sequence, and the loss (with its graph)."""
    results, loss = [], torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = model(input_ids=torch.tensor([row["tokens"]]), use_cache=False).logits[0]
        if case.labels:
            loss = loss + (torch.tensor(row["c"], dtype=logits.dtype) * logits).sum()
            results.append({"reward": logits.tolist()})
            continue
        logprobs = answer_logprobs(logits, row)
        loss = loss + row["c"][0] * logprobs.mean()
        result = {"logprobs": logprobs.tolist(), "positions": logit_rows(row)}
        result["logits"] = logits[logit_rows(row)].tolist()
        result["greedy"] = greedy(model, row["tokens"][: row["prompt_tokens"]])
        results.append(result)
    return results, loss


def compute(case: Case, rows: list[dict], dtype: str) -> tuple[dict, dict]:
    """(golden values, gradients) from the files in the case's folder."""
    model = case.open(dtype, f"+{case.folder}/adapter")
    with torch.no_grad(), model.original():
        base, _ = evaluate(case, model.inner, rows)
    adapted, loss = evaluate(case, model.inner, rows)
    loss.backward()
    grads = {name: p.grad.float() for name, p in model.trainable()}
    saved = load_file(case.folder / "adapter" / "adapter_model.safetensors")
    assert grads.keys() == saved.keys(), f"{case.name}: gradients {grads.keys()}, adapter {saved.keys()}"
    for name, grad in grads.items():
        assert grad.shape == saved[name].shape and grad.abs().max() > 1e-4, f"{case.name}: gradient of {name}"
    return {"sequences": rows, "base": base, "adapted": adapted, "loss": loss.item()}, grads


def noise(values: dict, grads: dict, other: dict, other_grads: dict) -> str:
    """Largest absolute difference of the values; of the gradients relative to the largest of their tensor."""
    value = max(abs(a - b) for a, b in zip(numbers(values), numbers(other), strict=True))
    relative = [(grads[n] - other_grads[n]).abs().max() / grads[n].abs().max() for n in grads]
    return f"values {value:.1e}  gradients {max(relative).item():.1e}"


def numbers(tree) -> list:
    """All numbers of a tree of golden values, in order."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [number for part in tree for number in numbers(part)] if isinstance(tree, list) else [tree]


def render(document: dict) -> str:
    """JSON with one row of numbers per line: readable, and a small diff when one changes. Nine digits are what f32 can
    tell apart."""
    document = json.loads(json.dumps(document), parse_float=lambda digits: float(f"{float(digits):.9g}"))
    lines = []
    for key, value in document.items():
        nested = isinstance(value, list) and isinstance(value[0], dict)
        value = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if nested else json.dumps(value)
        lines.append(f"{json.dumps(key)}: {value}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write(case: Case) -> None:
    shutil.rmtree(case.folder, ignore_errors=True)
    write_checkpoint(case)
    write_adapter(case)
    values, grads = compute(case, sequences(case), "f64")
    made_with = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    head = {"schema": 1, "made_with": made_with, "architecture": case.architecture, "labels": case.labels}
    (case.folder / "golden.json").write_text(render(head | values))
    save_file(grads, case.folder / "grads.safetensors", metadata={"format": "pt"})
    print(f"{case.name:16}", noise(values, grads, *compute(case, values["sequences"], "f32")), flush=True)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()
    # Names on the command line: these folders alone.
    for each in cases():
        if not sys.argv[1:] or each.name in sys.argv[1:]:
            write(each)
