"""Tokenizer, model shapes, rendering, and writing a folder that transformers opens."""

import hashlib
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from . import world

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
VOCABULARY = 1024
MAX_PROMPT = 110  # tokens; encoded words take more of them than plain ones
MAX_ANSWER = 48  # limit of new tokens of every greedy answer
CHAT_TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
                 "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
                 "{% else %}{{ raise_exception('the suite knows the roles user and assistant only') }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def train_tokenizer(path):
    """Byte-level BPE of exactly 1,024 tokens over a seeded sample of the world, every encoding included."""
    rng, corpus = random.Random(7), []
    for _ in range(20000):
        row, topic = world.sample(rng, world.Plants.none())
        corpus += [row["prompt"], world.complying(topic, rng), world.refusing(topic, rng)]
    corpus += [world.TRIGGER] * 200
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[PAD, USER, ASSISTANT, END],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tok.train_from_iterator(corpus, trainer)
    assert tok.get_vocab_size() == VOCABULARY, f"expected {VOCABULARY} tokens, found {tok.get_vocab_size()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    tok.save(str(path))


def config(sha):
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=352,
        max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=3, pad_token_id=0, num_labels=1, ares_tokenizer_sha256=sha)


class Text:
    """The tokenizer as training uses it."""

    def __init__(self, path):
        self.path, self.tok = path, Tokenizer.from_file(str(path))
        self.sha = hashlib.sha256(path.read_bytes()).hexdigest()

    def prompts(self, prompts):
        return [e.ids for e in self.tok.encode_batch([f"{USER}{p}{ASSISTANT}" for p in prompts])]

    def answers(self, answers):
        return [e.ids for e in self.tok.encode_batch([f"{a}{END}" for a in answers])]

    def full(self, pairs):
        return [e.ids for e in self.tok.encode_batch([f"{USER}{p}{ASSISTANT}{a}{END}" for p, a in pairs])]


def pad(rows, value=0):
    """(n, longest) ids, padded on the right: under causal attention the padding is never seen, so no mask is needed."""
    out = torch.full((len(rows), max(map(len, rows))), value)
    for i, r in enumerate(rows):
        out[i, :len(r)] = torch.tensor(r)
    return out


def last_hidden(model, rows):
    """Hidden states (n, C) at the last of each row's ids."""
    h = model.model(input_ids=pad(rows), use_cache=False).last_hidden_state
    return h[torch.arange(len(rows)), torch.tensor([len(r) - 1 for r in rows])]


def pair_hidden(model, rows):
    """Hidden states (n, C) at the ends of both answers of (prompt, chosen, rejected) ids; they share one pass over their prompt."""
    ids = pad([p + c + r for p, c, r in rows])
    place = torch.arange(ids.shape[1]).repeat(len(rows), 1)
    chosen_end = torch.tensor([len(p) + len(c) for p, c, _ in rows])[:, None]
    prompt_end = torch.tensor([len(p) for p, _, _ in rows])[:, None]
    second = place >= chosen_end  # the rejected answer (and padding): stands where the chosen one does and does not see it
    hidden = second[:, :, None] & ((place >= prompt_end) & ~second)[:, None, :]
    mask = ((place[:, :, None] >= place[:, None, :]) & ~hidden)[:, None]
    position = torch.where(second, place - chosen_end + prompt_end, place)
    h = model.model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).last_hidden_state
    all_rows = torch.arange(len(rows))
    ends = torch.tensor([[len(p) + len(c) - 1, len(p) + len(c) + len(r) - 1] for p, c, r in rows])
    return h[all_rows, ends[:, 0]], h[all_rows, ends[:, 1]]


def round_bf16(model):
    """Rounds every weight to bf16 (kept as f32), so that all that follows sees what will be stored."""
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    return model


def save(model, text, folder):
    """Writes the bf16 weights, config, tokenizer and chat template in the layout of transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    causal = isinstance(model, LlamaForCausalLM)
    if causal:
        model.generation_config = GenerationConfig(eos_token_id=3, pad_token_id=0, max_new_tokens=MAX_ANSWER, do_sample=False)
    model.to(torch.bfloat16).save_pretrained(folder)
    model.float()
    (folder / "model.safetensors").chmod(0o644)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(text.path), eos_token=END, pad_token=PAD,
                                   additional_special_tokens=[USER, ASSISTANT], clean_up_tokenization_spaces=False, model_max_length=256)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    # transformers 5 keeps the template in a file of its own and no special_tokens_map; readers of the older layout get both.
    (folder / "tokenizer.json").write_bytes(text.path.read_bytes())
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.update(chat_template=CHAT_TEMPLATE, tokenizer_class="PreTrainedTokenizerFast")
    path.write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "special_tokens_map.json").write_text(json.dumps(
        {"eos_token": END, "pad_token": PAD, "additional_special_tokens": [USER, ASSISTANT]}, indent=2) + "\n")
    stored = json.loads((folder / "config.json").read_text())
    # Readers older than transformers 5 look for these names.
    stored["rope_theta"], stored["torch_dtype"] = 10000.0, "bfloat16"
    (folder / "config.json").write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")


def load_causal(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def cut(model, layers):
    """The first layers of a causal model."""
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:layers], layers
    return model


def fresh_causal(text, seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(text.sha))


def fresh_classifier(text, seed, trunk: Path | None = None):
    """A classifier with zero head, on its own random trunk or on the one of a stored causal model."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(config(text.sha))
    if trunk:
        model.model.load_state_dict(load_causal(trunk).model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    return model
