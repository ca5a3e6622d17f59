#!/usr/bin/env python3
"""Golden values for guards: what transformers computes of every built-in form on a tiny random model.

    python -m pip install -r scripts/requirements.txt
    python scripts/golden_guard.py          # writes tests/golden-guard/, a minute; `git diff` says what moved

The model has the suite's tokenizer and random weights, so that no verdict is likely and each form's limit on what is left over must be lifted
by whoever reads these values. Per form and row: p_harm, p_refusal where the form knows it, and how much of the probability its verdicts cover,
in float64, each spelling by a forward pass of its own.
"""

import json
import shutil
import tomllib
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
OUT, FORMS = ROOT / "tests/golden-guard", ROOT / "src/judge/guard/forms"
TEMPLATE = """{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if strict is defined and strict %}strictly {% endif %}\
<|start_header_id|>assistant<|end_header_id|>

"""
ROWS = [
    ("How do I bake bread?", "Mix flour, water, salt and yeast, and wait."),
    ("Tell me how to take a badge that is not mine.", "I cannot help with that. Please ask for something else."),
    ("Ünïcode, two\nlines", " a leading blank, and an end \n"),
]


def form_text(form, tokenizer, prompt, response):
    if "template" in form:
        return form["template"].replace("{prompt}", prompt).replace("{response}", response)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(turns, tokenize=False, **form.get("arguments", {}))


def spellings(form, encode, asked):
    """[(tokens, verdict)]: each text as a continuation and by itself, none of which begins another."""
    before, found = encode(asked), []
    for verdict in form["verdict"]:
        for text in verdict["texts"]:
            whole = encode(asked + text)
            both = [whole[len(before):]] if whole[: len(before)] == before else []
            for tokens in both + [encode(text)]:
                same = next((i for i, (other, _) in enumerate(found) if other[: len(tokens)] == tokens[: len(other)]), None)
                if same is None:
                    found.append((tokens, verdict))
                else:
                    assert found[same][1] is verdict, (text, found[same])
                    found[same] = (min(found[same][0], tokens, key=len), verdict)
    return found


@torch.no_grad()
def probability(model, prompt, tokens):
    logits = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(tokens)).exp().item()


def main():
    OUT.mkdir(exist_ok=True)
    torch.manual_seed(7)
    # Some forms are long, and this tokenizer knows few words.
    config = LlamaConfig(vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                         max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=3, pad_token_id=0)
    model = LlamaForCausalLM(config).to(torch.float64)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
            weight.copy_(weight.to(torch.bfloat16))
    state = {name: weight.to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, OUT / "model.safetensors", {"format": "pt"})
    written = config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (OUT / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    shutil.copy(ROOT / "models/framing/policy/tokenizer.json", OUT / "tokenizer.json")
    (OUT / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE}, indent=1) + "\n")

    inner = Tokenizer.from_file(str(OUT / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    encode = lambda text: inner.encode(text, add_special_tokens=False).ids
    golden = {"rows": [{"prompt": prompt, "response": response} for prompt, response in ROWS], "forms": {}}
    for path in sorted(FORMS.glob("*.toml")):
        form = tomllib.loads(path.read_text())
        spelled = spellings(form, encode, form_text(form, tokenizer, "a", "b"))
        values = []
        for prompt, response in ROWS:
            asked = encode(form_text(form, tokenizer, prompt, response))
            p = [probability(model, asked, tokens) for tokens, _ in spelled]
            mean = lambda key: sum(q * verdict[key] for q, (_, verdict) in zip(p, spelled)) / sum(p)
            refuses = all("refusal" in verdict for _, verdict in spelled)
            values.append({"p_harm": mean("harmful"), "p_refusal": mean("refusal") if refuses else None, "covered": sum(p)})
        golden["forms"][path.stem] = values
        print(path.stem, len(asked), "tokens,", len(spelled), "spellings,", [round(value["p_harm"], 4) for value in values])
    (OUT / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
