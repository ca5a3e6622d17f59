"""The framework baseline: ARES's joint step, scoring, log-probabilities and generation with torch, transformers and PEFT.

`rows` reads the same JSONL as `ares`, `models` opens the same folders, `batches` lays sequences out, `objective` is the
joint objective term for term, `tasks` is what gets timed. `scripts/baseline_hf.py` is the command.
"""
