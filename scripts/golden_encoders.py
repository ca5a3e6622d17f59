#!/usr/bin/env python3
"""Golden values for encoders as judges: what transformers says of texts by tiny random classifiers of every family.

    python scripts/golden_encoders.py          # writes tests/golden-encoders/, seconds; `git diff` says what moved

Each folder holds a model as transformers saves it (BERT's norms called gamma and beta, as checkpoints of the first years have them), a
tokenizer of one word per id that puts its special tokens around a text, and golden.json: texts and the logits of each, in float64.
"""

import json
import shutil
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging

OUT = Path(__file__).resolve().parent.parent / "tests" / "golden-encoders"
WORDS = 61
TEXTS = ["w20", "w21 w22 w23", "w24 w25 w26 w27 w28 w29 w30 w31 w32 w33 w34", "w40 w40 w41 unknown w42"]

SMALL = {"vocab_size": WORDS + 5, "max_position_embeddings": 40}
LABELS = {"id2label": {"0": "fine", "1": "toxic", "2": "other"}, "label2id": {"fine": 0, "toxic": 1, "other": 2}}
BERT = SMALL | {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 6, "num_hidden_layers": 3, "type_vocab_size": 2,
                "layer_norm_eps": 0.01, "pad_token_id": 0}
CASES = {
    "bert": {"model_type": "bert", "architectures": ["BertForSequenceClassification"]} | BERT | LABELS,
    "roberta": {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]} | BERT | LABELS
               | {"type_vocab_size": 1, "pad_token_id": 4, "bos_token_id": 2, "eos_token_id": 3, "hidden_act": "gelu_new"},
    "modernbert": {"model_type": "modernbert", "architectures": ["ModernBertForSequenceClassification"], "hidden_size": 48,
                   "intermediate_size": 56, "num_attention_heads": 6, "num_hidden_layers": 4, "norm_eps": 0.01, "local_attention": 6,
                   "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "pad_token_id": 0,
                   "classifier_pooling": "mean"} | SMALL | LABELS,
    "distilbert": {"model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"], "dim": 40, "hidden_dim": 88,
                   "n_heads": 5, "n_layers": 2, "pad_token_id": 0, "problem_type": "multi_label_classification"} | SMALL | LABELS,
}


def tokenizer():
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {name: at for at, name in enumerate(names)} | {f"w{at}": at for at in range(5, WORDS + 5)}
    added = [{"id": at, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for at, name in enumerate(names)]
    around = {name: {"id": name, "ids": [words[name]], "tokens": [name]} for name in ("[CLS]", "[SEP]")}
    special = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
               {"SpecialToken": {"id": "[SEP]", "type_id": 0}}]
    return words, {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "decoder": None, "added_tokens": added,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
        "post_processor": {"type": "TemplateProcessing", "single": special, "pair": special, "special_tokens": around},
    }


@torch.no_grad()
def write(name, config):
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder)).eval()
    for parameter_name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{parameter_name}".encode()))
        values = torch.randn(parameter.shape, generator=generator)
        # Gains about 1, biases that show, products that keep their inputs' size.
        norm = parameter.dim() == 1 and parameter_name.endswith("weight")
        scale = 1.2 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 and "embeddings" not in parameter_name else 0.4
        parameter.copy_(values * scale + (1.0 if norm else 0.0))
    model.save_pretrained(folder)
    if name == "bert":
        old = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
               for key, value in load_file(folder / "model.safetensors").items()}
        save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    words, file = tokenizer()
    (folder / "tokenizer.json").write_text(json.dumps(file) + "\n")
    model = model.double()
    rows = []
    for text in TEXTS:
        ids = [words["[CLS]"], *(words.get(word, words["[UNK]"]) for word in text.split()), words["[SEP]"]]
        mask = torch.ones((1, len(ids)), dtype=torch.long)
        rows.append({"text": text, "logits": model(input_ids=torch.tensor([ids]), attention_mask=mask).logits[0].tolist()})
    (folder / "golden.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(name, [[round(x, 3) for x in row["logits"]] for row in rows])


if __name__ == "__main__":
    logging.disable_progress_bar()
    for each, config in CASES.items():
        write(each, config)
