"""A LoRA adapter merged into its base model as it is read: W + alpha / r * B A.

The sum over the rank is taken in one order, in float64, where each product is exact: every slice has the
bits of the whole, at any layout.

Source: peft 0.17 `tuners/lora/{config,layer}.py` (Linear.get_delta_weight).
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mqat.checkpoints.huggingface import read_json
from mqat.checkpoints.stored_tensors import finite
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.hf_keys import hf_shapes

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS, _PREFIX = "adapter_model.safetensors", "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
# Value of a plain adapter of linears, where a key is there at all; none and false are never more.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (), "fan_in_fan_out": (),
    "modules_to_save": (), "rank_pattern": (), "alpha_pattern": (), "layer_replication": (),
    "target_parameters": (), "trainable_token_indices": (), "use_qalora": (), "lora_bias": (),
    "megatron_config": (), "eva_config": (), "corda_config": (), "loftq_config": (),
    "alora_invocation_tokens": (), "arrow_config": (),
    "init_lora_weights": (True, "gaussian", "orthogonal"),
}  # fmt: skip


class Base(Protocol):
    """What an adapter is merged into."""

    path: Path
    config: DecoderConfig

    @property
    def tokenizer_source(self) -> Path:
        """Where `load_tokenizer` finds the tokenizer."""

    def read(self, name: str, rows: slice, cols: slice | None = None) -> Tensor:
        """A part of a tensor by its Hugging Face name."""


class MergedAdapter:
    """Lazy view of a base model with an adapter; same interface as `HuggingFaceCheckpoint`.

    Attributes:
        path: Of the adapter.
        config: The base model's.
        tokenizer_source: The base model's.

    Args:
        path: Directory with `adapter_config.json` and `adapter_model.safetensors`.
        base: The model that it was trained on.

    Raises:
        UserError: It is no plain LoRA adapter of linears, or of another model.
    """

    def __init__(self, path: Path, base: Base) -> None:
        self.path, self.config, self._base = path, base.config, base
        self.tokenizer_source = base.tokenizer_source
        family = base.config.architecture
        if any(linear.is_transposed_in_hf for linear in family.linears):
            raise UserError(
                f"{path}: adapters of {family.name} models, whose weights are stored transposed, are "
                "not merged here; merge it with peft (merge_and_unload, then save_pretrained) and "
                "import that."
            )
        said = read_json(path / ADAPTER_CONFIG)
        rank = _check(path, said)
        alpha = said.get("lora_alpha", 8)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise UserError(f"{path}: lora_alpha={alpha!r} is no number.")
        self._scale = alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)
        self._merged = self._check_tensors(rank)

    def _check_tensors(self, rank: int) -> frozenset[str]:
        """Names of the base model's weights that change."""
        try:
            with safe_open(self.path / _WEIGHTS, framework="pt") as handle:
                found = {n: tuple(handle.get_slice(n).get_shape()) for n in handle.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.path / _WEIGHTS}: missing, truncated or not safetensors ({error}); pickled "
                "adapters (*.bin) are not read: save the adapter with safe_serialization=True."
            ) from error
        shapes = hf_shapes(self.config)
        names = {
            n.removeprefix(_PREFIX).removesuffix(end)
            for n in found
            for end in (_A, _B)
            if n.endswith(end)
        }
        wanted = {}
        for name in names:
            if len(shape := shapes.get(f"{name}.weight", ())) != 2:
                raise UserError(
                    f"{self.path}: adapts {name!r}, which {self._base.path} does not have."
                )
            wanted[f"{_PREFIX}{name}{_A}"] = (rank, shape[1])
            wanted[f"{_PREFIX}{name}{_B}"] = (shape[0], rank)
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise UserError(
                    f"{self.path}: tensor {name!r} has shape {found.get(name, 'none: it is missing')}, "
                    f"but r={rank} and {self._base.path} imply {wanted.get(name, 'no such tensor')}."
                )
        if not names:
            raise UserError(f"{self.path}: {_WEIGHTS} adapts nothing.")
        return frozenset(f"{name}.weight" for name in names)

    def read(self, name: str, rows: slice, cols: slice | None = None) -> Tensor:
        """A part of a tensor by its Hugging Face name; a merged one in float32.

        Raises:
            UserError: An element is NaN or infinite.
        """
        weight = self._base.read(name, rows, cols)
        if cols is None or name not in self._merged:
            return weight
        module = _PREFIX + name.removesuffix(".weight")
        with safe_open(self.path / _WEIGHTS, framework="pt") as handle:
            a = finite(self.path, module + _A, handle.get_slice(module + _A)[:, cols]).double()
            b = finite(self.path, module + _B, handle.get_slice(module + _B)[rows, :]).double()
        change = torch.zeros(weight.shape, dtype=torch.float64)
        for k in range(a.shape[0]):
            change += b[:, k, None] * a[k]
        return (weight.double() + self._scale * change).float()


def _check(path: Path, said: Any) -> int:
    """The rank of a plain LoRA adapter."""
    if not isinstance(said, dict):
        raise UserError(f"{path / ADAPTER_CONFIG}: expected a JSON object.")
    for key, plain in _PLAIN.items():
        value = said.get(key)
        is_off = not value and key != "init_lora_weights"
        if key in said and not is_off and value is not None and value not in plain:
            raise UserError(
                f"{path}: {key}={value!r} in {ADAPTER_CONFIG} is not merged here; merge it with peft "
                "(merge_and_unload, then save_pretrained) and import that."
            )
    rank = said.get("r", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"{path}: r={rank!r} in {ADAPTER_CONFIG} must be an integer of at least 1.")
    named = said.get("base_model_name_or_path")
    if named:
        warnings.warn(
            f"{path}: was trained on {named!r}; whether the base that is given is that model cannot be "
            "seen from its tensors alone.",
            stacklevel=4,
        )
    return rank
