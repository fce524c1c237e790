"""Every exported tensor, compared bit for bit with what the checkpoint says it must be.

Ranks are joined back into whole tensors (the inverse of what an exporter does), so a swapped,
shifted, mis-scaled or mis-packed tensor cannot pass: codes must be those of the trained weight on
its frozen grid, and every scale the frozen one. The rounding is done again here, in its own lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.quant.scheme import LinearScheme
from mqat.verify.expected import CACHE_SCALE, EMBEDDING, FINAL_NORM, LM_HEAD, ROW_PARALLEL
from mqat.verify.layout import INT4_ALGORITHMS, ServedConfig
from mqat.verify.operands import fp4_unpacked, w4a8_factor
from mqat.verify.trained import TrainedLinear
from mqat.verify.values import int4_codes, same_bytes

# TensorRT-LLM module -> Megatron linear, and which of its row blocks the module is (None: all).
_OWNERS: dict[str, tuple[str, int | None]] = {
    "attention.qkv": ("self_attention.linear_qkv", None),
    "attention.dense": ("self_attention.linear_proj", None),
    "mlp.fc": ("mlp.linear_fc1", 0),
    "mlp.gate": ("mlp.linear_fc1", 1),
    "mlp.proj": ("mlp.linear_fc2", None),
}
_NORMS = {"input_layernorm": "self_attention.linear_qkv", "post_layernorm": "mlp.linear_fc1"}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
# What may have been trained behind what is served.
_SCHEMES = {
    "W8A8_SQ_PER_CHANNEL": {"int8", "int8_sq"},
    "W8A16": {"int8_wo"},
    "W4A16_AWQ": {"int4", "int4_awq", "w_int4_sym"},
    "W4A8_AWQ": {"w4a8_awq"},
    "FP8": {"fp8"},
    "FP8_PER_CHANNEL_PER_TOKEN": {"fp8_pc_pt"},
    "NVFP4": {"nvfp4"},
}


def compare_with_checkpoint(
    directory: Path, config: ServedConfig, checkpoint: CheckpointReader
) -> list[str]:
    """Problems, each naming the tensor; the directory must have passed the static checks."""
    problems = list(_compare_config(config, checkpoint))
    if problems:
        return problems
    handles = [
        safe_open(directory / f"rank{rank}.safetensors", framework="pt")
        for rank in range(config.tp * config.pp)
    ]
    problems += _compare_top(handles, config, checkpoint)
    for layer in range(checkpoint.model.num_layers):
        stage, local = divmod(layer, config.layers_per_stage)
        ranks = handles[stage * config.tp : (stage + 1) * config.tp]
        prefix = f"transformer.layers.{local}."
        found = list(_compare_norms(ranks, checkpoint, prefix, layer))
        found += _compare_cache(ranks, config, checkpoint, prefix, layer)
        for module, (linear, _) in _OWNERS.items():
            trained = TrainedLinear(checkpoint, layer, linear)
            found += _Linear(ranks, config, trained, prefix, module).compare()
        problems += [f"stage {stage}: {problem}" for problem in found]
    return problems


def _compare_config(config: ServedConfig, checkpoint: CheckpointReader) -> Iterator[str]:
    """`config.json` must describe the trained model and its schemes."""
    model = checkpoint.model
    scaling = None
    if model.rope_scaling is not None:
        scaling = {k: v for k, v in model.rope_scaling.items() if k not in ("type", "rope_type")}
        scaling["type"] = "llama3"
    expected = {
        "architecture": _ARCHITECTURES[model.family],
        "attn_bias": checkpoint.has("decoder.layers.self_attention.linear_qkv.bias"),
        "mlp_bias": checkpoint.has("decoder.layers.mlp.linear_fc1.bias"),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_size": model.head_dim,
        "norm_epsilon": model.rms_norm_eps,
        "rotary_base": model.rope_theta,
        "rotary_scaling": scaling,
        "max_position_embeddings": model.max_position_embeddings,
    }
    for key, value in expected.items():
        if config.raw.get(key) != value:
            yield f"config.json: {key}={config.raw.get(key)!r}, but the checkpoint has {value!r}"
    caches = {scheme.name.upper() for scheme in checkpoint.kv_cache.values()}
    if caches != ({config.kv_cache} if config.kv_cache else set()):
        yield (
            f"config.json: kv_cache_quant_algo={config.kv_cache}, but the checkpoint has "
            f"{sorted(caches)}"
        )
    if config.algorithm == "MIXED_PRECISION":
        return
    names = {scheme.name for scheme in checkpoint.layers.values()}
    served = _SCHEMES[config.algorithm] if config.algorithm else set()
    if not names <= served or bool(names) != bool(served):
        yield f"config.json: quant_algo={config.algorithm}, but the checkpoint has {sorted(names)}"


def _compare_top(
    handles: list[safe_open], config: ServedConfig, checkpoint: CheckpointReader
) -> Iterator[str]:
    vocab = checkpoint.model.vocab_size
    head = "embedding.word_embeddings" if checkpoint.model.tie_word_embeddings else "output_layer"
    tables = (
        (EMBEDDING, "embedding.word_embeddings", handles[: config.tp]),
        (LM_HEAD, head, handles[-config.tp :]),
    )
    for name, module, ranks in tables:
        joined = torch.cat([handle.get_tensor(name) for handle in ranks])[:vocab]
        wanted = checkpoint.read(f"{module}.weight", (slice(0, vocab),)).to(joined.dtype)
        if not same_bytes(joined, wanted):
            yield f"{name} is not the checkpoint's"
    served = handles[-1].get_tensor(FINAL_NORM)
    wanted = checkpoint.read("decoder.final_layernorm.weight").to(served.dtype)
    if not same_bytes(served, wanted):
        yield f"{FINAL_NORM} is not the checkpoint's"


def _compare_norms(
    ranks: list[safe_open], checkpoint: CheckpointReader, prefix: str, layer: int
) -> Iterator[str]:
    for name, owner in _NORMS.items():
        key = f"decoder.layers.{owner}.layer_norm_weight"
        wanted = checkpoint.read(key, (slice(layer, layer + 1),))[0]
        served = ranks[0].get_tensor(f"{prefix}{name}.weight")
        if not same_bytes(served, wanted.to(served.dtype)):
            yield f"{prefix}{name}.weight is not the checkpoint's"


def _compare_cache(
    ranks: list[safe_open],
    config: ServedConfig,
    checkpoint: CheckpointReader,
    prefix: str,
    layer: int,
) -> Iterator[str]:
    if config.kv_cache is None:
        return
    name = prefix + CACHE_SCALE
    frozen = checkpoint.read(
        f"quantizers.decoder.layers.{layer}.self_attention.core_attention.kv_scale"
    )
    if not all(same_bytes(handle.get_tensor(name), frozen) for handle in ranks):
        yield f"{name} is not the frozen scale"


@dataclass(frozen=True)
class _Linear:
    """One exported module over its ranks, and the trained linear it came from."""

    ranks: list[safe_open]
    config: ServedConfig
    trained: TrainedLinear
    prefix: str
    module: str

    def compare(self) -> Iterator[str]:
        """What differs, bit for bit."""
        full, trained = self.prefix + self.module, self.trained
        scheme, algorithm = trained.scheme, self.config.algorithm_of(full)
        if (algorithm is not None) != (scheme is not None):
            yield f"{full}: quantized in only one of checkpoint and export"
            return
        bias = trained.bias()
        # The static checks have seen that there are as many as there should be.
        if bias is not None:
            biases = [handle.get_tensor(f"{full}.bias") for handle in self.ranks]
            if not self._matches(biases, bias.to(biases[0].dtype)):
                yield f"{full}.bias is not the checkpoint's"
        served = [handle.get_tensor(f"{full}.weight") for handle in self.ranks]
        if scheme is None:
            if not self._matches(served, trained.weight().to(served[0].dtype)):
                yield f"{full}.weight is not the checkpoint's"
            return
        if scheme.name not in _SCHEMES.get(algorithm or "", ()):
            yield f"{full}: served as {algorithm}, trained as {scheme.name}"
            return
        codes = trained.codes()
        if scheme.name == "int8_wo":
            values = codes.float() * trained.steps(codes.shape[1])
            if not self._matches(served, values.to(served[0].dtype)):
                yield f"{full}.weight is not the checkpoint's weight on its grid"
            return
        if algorithm in INT4_ALGORITHMS:
            served = [int4_codes(tensor) for tensor in served]
        if algorithm == "NVFP4":
            served = [fp4_unpacked(tensor) for tensor in served]
        if not self._matches(served, codes):
            yield f"{full}.weight is not the checkpoint's weight on its grid"
        yield from self._compare_scales(full, scheme, algorithm or "")

    def _compare_scales(self, full: str, scheme: LinearScheme, algorithm: str) -> Iterator[str]:
        trained, scale = self.trained, self.trained.scale()
        suffix = "per_channel_scale" if algorithm.startswith("FP8_") else "weights_scaling_factor"
        factors = [r.get_tensor(f"{full}.{suffix}").float() for r in self.ranks]
        if algorithm == "NVFP4":
            factors = [f * trained.frozen("weight_global_scale") for f in factors]
        if algorithm == "FP8":
            same = all(same_bytes(factor, scale) for factor in factors)
        else:
            same = self._matches(factors, scale)
        if not same:
            yield f"{full}.{suffix} is not the frozen scale"
        wanted = {}
        if algorithm == "NVFP4":
            wanted["weights_scaling_factor_2"] = trained.frozen("weight_global_scale")
            wanted["activation_scaling_factor"] = trained.frozen("input_global_scale")
        elif scheme.input is not None and not scheme.input.is_dynamic:
            wanted["activation_scaling_factor"] = trained.frozen("input_scale")
        if algorithm == "W4A8_AWQ":
            wanted["weights_scaling_factor_2"] = w4a8_factor(scale)
        for name, frozen in wanted.items():
            if not all(same_bytes(r.get_tensor(f"{full}.{name}"), frozen) for r in self.ranks):
                yield f"{full}.{name} is not the frozen scale"

    def _matches(self, served: list[Tensor], trained: Tensor) -> bool:
        """Whether the ranks' tensors are the trained one, cut over TP along rows or columns."""
        joined, wanted = self._join(served), self._split(trained)
        return all(
            a.shape == b.shape and same_bytes(a, b) for a, b in zip(joined, wanted, strict=True)
        )

    def _split(self, tensor: Tensor) -> list[Tensor]:
        """Row blocks of a trained tensor that are served apart: [q, k, v], [gate], [up], [all]."""
        _, part = _OWNERS[self.module]
        blocks = self.trained.blocks(tensor)
        return blocks if part is None else [blocks[part]]

    def _join(self, tensors: list[Tensor]) -> list[Tensor]:
        """The ranks' tensors as the same row blocks, each key/value head once."""
        if self.module in ROW_PARALLEL:
            return [torch.cat(tensors, dim=1) if tensors[0].dim() == 2 else tensors[0]]
        if self.module != "attention.qkv":
            return [torch.cat(tensors)]
        config = self.config
        d = int(config.raw["head_size"])
        kept = config.key_value_heads_per_rank
        split = [t.split([config.heads_per_rank * d, kept * d, kept * d]) for t in tensors]
        query = torch.cat([part[0] for part in split])
        stride = config.key_value_copies
        key, value = (torch.cat([part[i] for part in split[::stride]]) for i in (1, 2))
        return [query, key, value]
