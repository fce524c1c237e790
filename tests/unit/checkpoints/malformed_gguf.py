"""Models as they should not come: seeded changes of good GGUF files."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path
from typing import Any

import torch

from mqat.checkpoints.gguf import gguf_names
from mqat.checkpoints.hf_config import decoder_config
from mqat.models.decoder import DecoderConfig
from tests.unit.checkpoints.malformed_families import EXPECTED_NEWER, family_case
from tests.unit.checkpoints.malformed_sources import (
    EXPECTED,
    Case,
    change_tensors,
    good,
    huggingface_case,
    outcome,
    write_directory,
)  # fmt: skip

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2"}
GGUF_EXTRA: dict[str, list[Any]] = {
    "attention.sliding_window": [8, 4096], "rope.scaling.type": ["linear", "yarn", "none", 3],
    # Others scale positions, as llama.cpp does; transformers would overlook them.
    "rope.scaling.factor": [0.0, 1.0], "attention.key_length": [8, 16], "attention.value_length": [8,
    4],
    "rope.dimension_count": [8, 4], "expert_count": [0, 8], "attention.causal": [True, False],
    "vocab_size": [40, 41],
    "logit_scale": [2.0], "attention.scale": [0.5], "pooling_type": [1], "rope.scale_linear": [2.0],
}  # fmt: skip


def gguf_case(seed: int) -> tuple[str, Case]:
    """Architecture and case of a seed."""
    draw = random.Random(seed)
    family = draw.choice(list(ARCHITECTURES))
    arch = ARCHITECTURES[family]
    case = good(family)
    config = decoder_config(case.config)
    case.tensors = gguf_tensors(config, case.tensors)
    case.config = gguf_keys(arch, config)
    for _ in range(draw.choice([1, 1, 2])):
        change = draw.choice(["keys", "keys", "tensors", "files"])
        if change == "keys":
            change_gguf_keys(case, draw, arch)
        elif change == "tensors":
            change_tensors(
                case,
                draw,
                {"rope_freqs.weight": None, "blk.0.attn_q.bias": None, "output.weight": None},
            )
        else:
            what, at = draw.choice(["cut", "garble", "name"]), draw.random()
            case.kind = f"file: {what}"
            case.spoil = lambda path, what=what, at=at: spoil_gguf(path, what, at)
    return family, case


def gguf_keys(arch: str, config: DecoderConfig) -> dict[str, Any]:
    """Metadata as llama.cpp's converter writes them."""
    tokens = [f"t{i}" for i in range(config.vocab_size)]
    return {
        "general.name": "a model", "general.type": "model", "general.file_type": 0,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_query_groups,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6, f"{arch}.rope.freq_base": config.rope_theta,
        f"{arch}.rope.dimension_count": config.head_dim, f"{arch}.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.eos_token_id": 0,
    }  # fmt: skip


def gguf_tensors(
    config: DecoderConfig, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Under llama.cpp's names; rows of query and key interleaved, where the architecture has it so."""
    names = gguf_names(config)
    found = {}
    for name, tensor in tensors.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_query_groups}
        count = next((n for part, n in heads.items() if part in name), None)
        if count is not None and config.family == "llama":
            halves = tensor.reshape(count, 2, len(tensor) // count // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape).contiguous()
        found[names[name]] = tensor
    return found


def change_gguf_keys(case: Case, draw: random.Random, arch: str) -> None:
    """Drop, retype, rename, duplicate, resize or add one key of the metadata."""
    key = draw.choice(list(case.config))
    what = draw.choice(["drop", "retype", "rename", "duplicate", "resize", "add"])
    case.kind = f"key: {what}"
    value = case.config[key]
    if what == "drop":
        del case.config[key]
    elif what == "retype":
        case.config[key] = draw.choice(
            [True, 0, -1, 1.5, float("nan"), "x", "", [4, 4], ["a"], str(value)]
        )
    elif what == "rename":
        case.config[key + "_x"] = case.config.pop(key)
    elif what == "duplicate":
        case.twice[key] = draw.choice([1, 2, "x", value])
    elif what == "resize":
        numbers = [
            k
            for k, v in case.config.items()
            if isinstance(v, int | float) and not isinstance(v, bool)
        ]
        key = draw.choice(numbers)
        case.config[key] = draw.choice(
            [case.config[key] * 2, case.config[key] // 2, case.config[key] + 1]
        )
    else:
        inside = draw.choice(list(GGUF_EXTRA))
        case.config[f"{arch}.{inside}"] = draw.choice(GGUF_EXTRA[inside])


def spoil_gguf(path: Path, what: str, at: float) -> None:
    """Cut or garble the file, or call it the first of several."""
    data = path.read_bytes()
    if what == "cut":
        path.write_bytes(data[: int(at * len(data))])
    elif what == "garble":
        place = int(at * min(len(data), 600))
        path.write_bytes(data[:place] + bytes([255 - data[place]]) + data[place + 1 :])
    else:
        path.rename(path.with_name("model-00001-of-00002.gguf"))


def write_gguf(case: Case, arch: str, path: Path) -> Path:
    """The file of a case, in a directory of its own."""
    from gguf import GGUFWriter

    path.mkdir()
    writer = GGUFWriter(path / "model.gguf", arch)

    def add(key: str, value: Any) -> None:
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value:
            writer.add_array(key, value)

    for key, value in case.config.items():
        add(key, value)
    for (
        key,
        value,
    ) in case.twice.items():  # the writer refuses; a key of the same length becomes it below
        add(key[:-1] + "\x01", value)
    for name, tensor in case.tensors.items():
        is_plain = tensor.dtype in (
            torch.float32,
            torch.float16,
            torch.float64,
            torch.int8,
            torch.int32,
        )
        writer.add_tensor(name, (tensor if is_plain else tensor.float().half()).numpy())
    with contextlib.redirect_stderr(io.StringIO()):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    file = path / "model.gguf"
    for key in case.twice:
        data = file.read_bytes()
        file.write_bytes(data.replace((key[:-1] + "\x01").encode(), key.encode()))
    case.spoil(file)
    return path


def run_case(reader: str, seed: int, directory: Path) -> tuple[str, str]:
    """Kind and outcome of one case; `directory` must not exist.

    Args:
        reader: `huggingface`, `gguf`, or `families` (directories of those least like Llama).
        seed: Of the case.
        directory: Where its files are written.
    """
    if reader in ("huggingface", "families"):
        is_newer = reader == "families"
        family, case = family_case(seed) if is_newer else huggingface_case(seed)
        expected = EXPECTED_NEWER if is_newer else EXPECTED
        return case.kind, outcome(write_directory(case, directory), expected.of(family))
    family, case = gguf_case(seed)
    path = write_gguf(case, ARCHITECTURES[family], directory)
    names = sorted(file.name for file in path.glob("*.gguf"))
    return case.kind, outcome(path, EXPECTED.of(family), names[0])
