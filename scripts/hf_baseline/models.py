"""Model folders opened by transformers, adapters by PEFT, in one of the settings that are compared."""

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """One way of running the framework. Its name states what differs from the framework's defaults."""

    dtype: str = "f32"  # f32 | bf16: the base weights and activations
    compiled: bool = False  # torch.compile
    layout: str = "padded"  # padded | bucketed | packed
    adapter_bf16: bool = False  # PEFT keeps adapters in f32 unless told otherwise
    checkpointing: bool = False  # recompute activations in backward
    liger: bool = False  # Liger kernels, where importable

    @property
    def name(self) -> str:
        parts = [self.dtype, "compile" if self.compiled else "eager", self.layout]
        extra = {"adapter_bf16": self.adapter_bf16, "checkpointing": self.checkpointing, "liger": self.liger}
        return "-".join(parts + [name for name, on in extra.items() if on])

    @staticmethod
    def parse(name: str) -> "Setting":
        dtype, mode, layout, *extra = name.split("-")
        setting = Setting(dtype, mode == "compile", layout)
        setting = replace(setting, **{word: True for word in extra})
        if setting.name != name or dtype not in DTYPES or layout not in ("padded", "bucketed", "packed"):
            raise ValueError(f"unknown setting `{name}`; expected e.g. f32-eager-padded or bf16-compile-packed-liger")
        return setting


@dataclass(frozen=True)
class Lora:
    """A fresh adapter, for folders given without one. A and B are random and not zero: at B = 0 every dA is 0."""

    rank: int = 16
    alpha: int = 32
    seed: int = 0


def write_adapter(folder: str, reward: bool, lora: Lora, out: Path) -> None:
    """A fresh adapter for a model folder as PEFT saves it, so that others can open the same one."""
    Model(folder, reward, Setting(), "cpu", lora).peft.save_pretrained(out)


class Model:
    """A causal LM or a classifier with its adapter, as its two halves: trunk (hidden states) and head."""

    def __init__(self, spec: str, reward: bool, setting: Setting, device: str, lora: Lora | None, train_head=False):
        self.folder, _, self.adapter = spec.partition("+")
        self.setting, self.device, self.reward = setting, device, reward
        base = self._open_base()
        self.inner = base
        self.peft = self._open_adapter(base, lora)
        self.train_head = train_head
        self._freeze_head()
        self.trunk = base.model
        self.compile()

    def _open_base(self):
        if self.setting.liger:
            from liger_kernel.transformers import _apply_liger_kernel

            _apply_liger_kernel(json.loads((Path(self.folder) / "config.json").read_text())["model_type"])
        auto = AutoModelForSequenceClassification if self.reward else AutoModelForCausalLM
        flash = self.device == "cuda" and self.setting.dtype == "bf16" and self.setting.layout == "packed"
        model = auto.from_pretrained(
            self.folder,
            dtype=DTYPES[self.setting.dtype],
            attn_implementation="flash_attention_2" if flash and has_flash_attention() else "sdpa",
        )
        model.config.use_cache = False
        if self.setting.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        return model.to(self.device)

    def _open_adapter(self, base, lora: Lora | None) -> PeftModel | None:
        keep_f32 = not self.setting.adapter_bf16
        if self.adapter:
            return PeftModel.from_pretrained(
                base, self.adapter, is_trainable=True, autocast_adapter_dtype=keep_f32
            )
        if lora is None:
            return None
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS if self.reward else TaskType.CAUSAL_LM,
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=PROJECTIONS,
        )
        peft = get_peft_model(base, config, autocast_adapter_dtype=keep_f32)
        generator = torch.Generator().manual_seed(lora.seed)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    values = torch.randn(parameter.shape, generator=generator) * 0.02
                    parameter.copy_(values)
        return peft

    def compile(self) -> None:
        # The training flag does not matter (no dropout anywhere); checkpointing works only in training mode.
        self.inner.train(self.setting.checkpointing)
        if self.setting.compiled:
            self.trunk.compile(dynamic=True)

    def hidden(self, batch) -> torch.Tensor:
        """Last hidden states, (rows of the batch, hidden), rows in the batch's order, padding included."""
        return self.trunk(**batch.inputs(self.device), use_cache=False).last_hidden_state.flatten(0, 1)

    def merge(self) -> None:
        """Folds the adapter into the weights, as one does before inference."""
        if self.peft:
            self.inner = self.peft.merge_and_unload()
            self.peft = None

    def _freeze_head(self) -> None:
        """PEFT trains whatever it saves; the method trains the score head only when asked."""
        for name, parameter in self.inner.named_parameters():
            if "modules_to_save" in name:
                parameter.requires_grad_(self.train_head)

    @contextlib.contextmanager
    def original(self):
        """Within this context the adapter is off: π_0 or r_0."""
        with self.peft.disable_adapter() if self.peft else contextlib.nullcontext():
            yield
        self._freeze_head()  # switching the adapter on again made it trainable

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """(name in PEFT's file, parameter) of everything that is trained."""
        named = self.peft.named_parameters() if self.peft else []
        strip = lambda name: name.replace(".default", "").replace(".modules_to_save", "")  # noqa: E731
        return [(strip(name), parameter) for name, parameter in named if parameter.requires_grad]


def has_flash_attention() -> bool:
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return False
    return True
