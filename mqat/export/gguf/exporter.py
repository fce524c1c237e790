"""The exporter of GGUF: a directory with one file for llama.cpp, which holds the tokenizer, too."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.data.gguf_words import gguf_tokenizer_keys
from mqat.errors import UserError
from mqat.export.decoder_tensors import DecoderTensors, Naming
from mqat.export.exporter import PRODUCER, DirectoryContents, ExportOptions
from mqat.export.gguf.container import FILE_TYPES, BlockPlan, write_gguf
from mqat.export.gguf.forms import CACHE, FORMS
from mqat.export.reshard import InferenceRank
from mqat.export.special_tokens import special_tokens
from mqat.export.stream import TensorPlan
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme, kv_cache_schemes, linear_schemes
from mqat.models.structure import GGUF_LAYER, QKV, Linear, split_name

# Of which llama.cpp computes what mqat trains, with the keys below.
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_QUERY, _KEY, _ = (part.gguf for part in QKV.parts)


def _linears(linear: Linear) -> dict[str, list[int]]:
    return {part.gguf: [number] for number, part in enumerate(linear.parts)}


TENSORS = DecoderTensors(
    Naming(
        lambda family: GGUF_LAYER, attrgetter("gguf"), _linears, writes_tied_head=False, adds_one=True,
        transposes=False,
    ),
    FORMS,
    CACHE,
)  # fmt: skip


class GgufExporter:
    """For llama.cpp."""

    format = "gguf"
    style = None
    output_name = "gguf"
    is_served = False  # llama.cpp rounds inputs in its own way, which no reader here has

    def check(
        self, model: DecoderConfig, schemes: Mapping[str, Scheme], options: ExportOptions
    ) -> None:
        """As `Exporter.check`."""
        options.refuse_parts(self.format, "is one file, whole")
        _check_model(model)
        for name, cache in kv_cache_schemes(schemes).items():
            raise UserError(
                f"{name}: {cache.name} caches have no place in a GGUF file: llama.cpp is told when it "
                "starts what its cache holds. Use quantization.kv_cache=null, or another export.format."
            )
        TENSORS.check(model, schemes)
        for name, scheme in linear_schemes(schemes).items():
            FORMS.check_groups(name, scheme, model.linear_shape(split_name(name)[1])[1])

    def warning(self, schemes: Mapping[str, Scheme]) -> str | None:
        """As `Exporter.warning`."""
        is_shifted = any(
            scheme.weight is not None and scheme.weight.is_asymmetric
            for scheme in linear_schemes(schemes).values()
        )
        if not is_shifted:
            return None
        return (
            "Q4_1 stores step x zero point in float16, which rounds it by 1/2048 at most; codes and "
            "steps are the trained ones."
        )

    def contents(
        self, reader: CheckpointReader, tokenizer: Path, options: ExportOptions
    ) -> DirectoryContents:
        """As `Exporter.contents`."""
        model = reader.model
        dtype = options.torch_dtype
        special = special_tokens(tokenizer, model)
        plans = [
            _as_llama_cpp_has_it(model, plan)
            for plan in TENSORS.plan(reader, InferenceRank(), dtype)
        ]
        keys = _model_keys(model) | {"general.file_type": _file_type(plans, dtype)}
        keys |= gguf_tokenizer_keys(tokenizer, special, model.vocab_size)
        return DirectoryContents(
            {"model.gguf": lambda: plans},
            {"config.json": model.to_hf(options.dtype) | special | {"producer": PRODUCER}},
            write=partial(write_gguf, keys=keys),
        )


def _check_model(model: DecoderConfig) -> None:
    """Refuses what llama.cpp computes otherwise, or with keys that are not written here."""
    if model.family not in _FAMILIES:
        raise UserError(
            f"export.format=gguf: {model.family} models are not written; {', '.join(_FAMILIES)} are. "
            "Use export.format=hf, which llama.cpp's own converter reads where nothing is quantized."
        )
    told = {
        "rope_scaling": model.rope_scaling, "sliding_window": model.sliding_window,
        "attention_scale": model.attention_scale,
    }  # fmt: skip
    for key, value in told.items():
        if value is not None:
            raise UserError(
                f"export.format=gguf: {key}={value} of this model has no keys in the files that mqat "
                "writes. Use export.format=hf."
            )


def _model_keys(model: DecoderConfig) -> dict[str, Any]:
    """What the inverse of `checkpoints.gguf_metadata` reads."""
    name = model.architecture.gguf_architecture
    found = {
        "vocab_size": model.vocab_size,
        "context_length": model.max_position_embeddings,
        "embedding_length": model.hidden_size,
        "block_count": model.num_layers,
        "feed_forward_length": model.intermediate_size,
        "attention.head_count": model.num_attention_heads,
        "attention.head_count_kv": model.num_query_groups,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": float(model.rms_norm_eps),
        "rope.dimension_count": model.head_dim,
        "rope.freq_base": float(model.rope_theta),
    }
    general = {
        "general.architecture": name, "general.type": "model", "general.quantization_version": 2
    }  # fmt: skip
    return general | {f"{name}.{key}": value for key, value in found.items()}


def _file_type(plans: list[TensorPlan], dtype: torch.dtype) -> int:
    """That of most blocks; it is for people, every tensor says its own type."""
    blocks = Counter(plan.block for plan in plans if isinstance(plan, BlockPlan))
    return blocks.most_common(1)[0][0].file_type if blocks else FILE_TYPES[dtype]


def _as_llama_cpp_has_it(model: DecoderConfig, plan: TensorPlan) -> TensorPlan:
    """Vectors in float32; rows of query and key in the order in which its Llama turns them."""
    module = plan.name.split(".")[-2]
    heads = {_QUERY: model.num_attention_heads, _KEY: model.num_query_groups}.get(module)
    if heads is not None and model.architecture.is_interleaved_in_gguf:
        plan = replace(plan, chunks=partial(_interleaved, plan, heads))
    if len(plan.shape) == 1:
        plan = replace(plan, dtype=torch.float32, chunks=partial(_as_float32, plan))
    return plan


def _interleaved(plan: TensorPlan, heads: int) -> Iterator[Tensor]:
    """Row `i` of the first half of each head, then row `i` of the second."""
    rows = torch.cat(list(plan.chunks()))
    yield rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _as_float32(plan: TensorPlan) -> Iterator[Tensor]:
    return (chunk.float() for chunk in plan.chunks())
