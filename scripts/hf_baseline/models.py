"""Model folders opened by transformers, adapters by PEFT, in one of the settings that are compared."""

import contextlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from .batches import Batch, lay_out
from .rows import Sequence

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]
DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}
SETTING = "(f64|f32|bf16)-(eager|compile)-(padded|bucketed|packed)((?:-adapter_bf16|-checkpointing|-liger)*)"


@dataclass(frozen=True)
class Setting:
    """One way of running the framework. Its name states what differs from the framework's defaults."""

    dtype: str = "f32"  # of the base weights and activations
    compiled: bool = False  # torch.compile
    layout: str = "padded"  # padded | bucketed | packed
    # adapter_bf16: PEFT keeps adapters in f32 unless asked otherwise; checkpointing: activations are recomputed in backward
    extras: tuple = ()

    @staticmethod
    def parse(name: str) -> "Setting":
        found = re.fullmatch(SETTING, name)
        if not found:
            raise ValueError(f"unknown setting `{name}`; expected e.g. f32-eager-padded or bf16-compile-packed-liger")
        dtype, mode, layout, extras = found.groups()
        return Setting(dtype, mode == "compile", layout, tuple(extras.split("-")[1:]))


def auto_class(reward: bool):
    return AutoModelForSequenceClassification if reward else AutoModelForCausalLM


def fresh_adapter(base, reward: bool, rank: int, alpha: int) -> PeftModel:
    """All projections that there are; PEFT draws A from torch's random numbers, B is zero."""
    there = {name.rsplit(".")[-1] for name, _ in base.named_modules()}
    task = TaskType.SEQ_CLS if reward else TaskType.CAUSAL_LM
    config = LoraConfig(task_type=task, r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=[p for p in PROJECTIONS if p in there])
    return get_peft_model(base, config)


def save_adapter(peft: PeftModel, folder: Path) -> None:
    """As PEFT saves it, but equal in every run, and without its README."""
    peft.save_pretrained(folder)
    (folder / "README.md").unlink()
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["target_modules"].sort()  # PEFT writes a set
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_adapter(folder: Path | str, reward: bool, rank: int, alpha: int, seed: int, out: Path) -> None:
    """A random adapter for a model folder. B is not zero: at B = 0 every dA is 0."""
    torch.manual_seed(seed)
    peft = fresh_adapter(Model(str(folder), reward).inner, reward, rank, alpha)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    save_adapter(peft, out)


class Model:
    """A causal LM or a classifier with its adapter, as its two halves: trunk (hidden states) and head.

    `spec` is DIR or DIR+ADAPTER; `limits` are the tokens of one forward, padding included, and the width of a packed row.
    """

    def __init__(self, spec: str, reward: bool, setting=Setting(), device="cpu", limits=(4096, 64), train_head=False):
        self.folder, _, adapter = spec.partition("+")
        self.setting, self.device, self.limits, self.train_head = setting, device, limits, train_head
        self.inner = self._open(auto_class(reward))
        self.peft = adapter and PeftModel.from_pretrained(
            self.inner, adapter, is_trainable=True, autocast_adapter_dtype="adapter_bf16" not in setting.extras
        )
        self._freeze_head()
        self.trunk = self.inner.model
        # The training flag does not matter (no dropout anywhere); checkpointing works only in training mode.
        self.inner.train("checkpointing" in setting.extras)
        if setting.compiled:
            self.trunk.compile(dynamic=True)

    def _open(self, auto):
        setting = self.setting
        if "liger" in setting.extras:
            from liger_kernel.transformers import _apply_liger_kernel

            _apply_liger_kernel(json.loads((Path(self.folder) / "config.json").read_text())["model_type"])
        flash = self.device == "cuda" and setting.dtype == "bf16" and setting.layout == "packed"
        flash = flash and importlib.util.find_spec("flash_attn")
        # sdpa knows no cap of scores.
        capped = json.loads((Path(self.folder) / "config.json").read_text()).get("attn_logit_softcapping")
        model, info = auto.from_pretrained(
            self.folder, dtype=DTYPES[setting.dtype], output_loading_info=True,
            attn_implementation="flash_attention_2" if flash else "eager" if capped else "sdpa",
        )
        if info["missing_keys"]:
            raise ValueError(f"{self.folder}: expected all weights, found no {', '.join(sorted(info['missing_keys']))}")
        model.config.use_cache = False
        if "checkpointing" in setting.extras:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        return model.to(self.device)

    def lay_out(self, sequences: list[Sequence]) -> list[Batch]:
        return lay_out(sequences, self.setting.layout, *self.limits)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states, (rows of the batch, hidden), rows in the batch's order, padding included."""
        inputs = {name: value.to(self.device) for name, value in batch.inputs.items()}
        return self.trunk(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)

    def merge(self) -> None:
        """Folds the adapter into the weights, as one does before inference."""
        if self.peft:
            self.inner = self.peft.merge_and_unload()

    def _freeze_head(self) -> None:
        """PEFT trains whatever it saves; the method trains the score head only when asked."""
        for name, parameter in self.inner.named_parameters():
            if "modules_to_save" in name:
                parameter.requires_grad_(self.train_head)

    @contextlib.contextmanager
    def original(self):
        """Within this context the adapter is off: π_0 or r_0."""
        with self.peft.disable_adapter():
            yield
        self._freeze_head()  # switching the adapter on again made it trainable

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """(name in PEFT's file, parameter) of everything that is trained."""
        named = [(name, p) for name, p in self.peft.named_parameters() if p.requires_grad]
        return [(name.replace(".default", "").replace(".modules_to_save", ""), p) for name, p in named]
