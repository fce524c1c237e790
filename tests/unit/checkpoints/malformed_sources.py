"""Models as they should not come: seeded changes of good Hugging Face directories.

A case is drawn from a seed alone. What it may lead to: the numbers of transformers on the same files (of
the unchanged model, where transformers refuses them), or one line of UserError.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mqat.checkpoints.hf_config import decoder_config
from mqat.checkpoints.pretrained import load_pretrained_
from mqat.checkpoints.source import open_pretrained
from mqat.config import ModelConfig
from mqat.errors import UserError
from mqat.evaluation.forward import logits
from mqat.models.decoder import DecoderConfig
from mqat.models.hf_keys import hf_shapes
from mqat.specs.model import build_model
from tests.unit.models.hf_models import ChatGlm

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
FAMILIES = {
    "llama": {"tie_word_embeddings": False, "rope_theta": 5000.0, "eos_token_id": [0, 2]},
    "llama-3": {"model_type": "llama", "tie_word_embeddings": True, "rope_scaling": LLAMA3},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True,
    "dtype": "float16"},
    "mistral": {"sliding_window": None, "rope_parameters": {"rope_type": "default",
    "rope_theta": 5000.0}},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": False, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 16, "layer_types": ["full_attention"] * 2},
}  # fmt: skip
TOKENS = torch.randint(0, 40, (1, 12), generator=torch.Generator().manual_seed(1))
LIMIT = 1e-3  # float32, other summation order; logits are of order 1
# Values of any key, as files come.
ODD = [None, True, False, 0, -1, 1, 2, 3, 1 << 40, 0.5, 1.0, float("nan"), float("inf"), "", "64",
       "silu", [], [2, 2], {}, {"a": 1}]  # fmt: skip
EXTRA: dict[str, list[Any]] = {
    "sliding_window": [None, 8, 4096], "use_sliding_window": [True], "max_window_layers": [0, 1],
    "attention_bias": [True, False], "mlp_bias": [True, False], "hidden_act": ["gelu", "relu", "silu"],
    "rope_scaling": [{"type": "llama3", **LLAMA3}, LLAMA3, {"type": "linear", "factor": 2.0},
                     {"rope_type": "yarn", "factor": 4.0}, {**LLAMA3, "truncate": True},
                     {"factor": 4.0},
                     {**LLAMA3, "partial_rotary_factor": 0.5}, {"rope_type": "default",
                     "rope_theta": 7.0}],
    "rope_parameters": [LLAMA3, {"rope_type": "default", "rope_theta": 1e6}],
    "rope_theta": [1e6, 10000], "partial_rotary_factor": [0.5, 1.0], "head_dim": [8, 16, 4],
    "quantization_config": [{"quant_method": "fp8"}], "auto_map": [{"AutoModelForCausalLM": "m.M"}],
    "architectures": [["LlamaModel"], ["LlamaForSequenceClassification"], []],
    "layer_types": [["sliding_attention"] * 2, ["full_attention"] * 2, ["full_attention"]],
    "per_layer_config": [{"1": {"intermediate_size": 24}}], "pretraining_tp": [2],
    "transformers_weights": ["x"],
    "attention_dropout": [0.1], "logit_scale": [0.5], "temperature": [0.6],
    "tie_word_embeddings": [True, False],
    "embedding_multiplier": [2.0], "model_type": ["gemma", "mistral", "llama", "qwen2", "qwen3"],
    "num_experts": [8], "pad_token_id": [-1, 39, 40], "eos_token_id": [[1, 2], 40],
    "rope_interleaved": [True],
}  # fmt: skip


@dataclass
class Case:
    """Files in memory.

    Attributes:
        kind: What was done, for the table of outcomes.
        config: `config.json`, or metadata of a GGUF file.
        tensors: Of one file or several.
        twice: Keys that are written a second time, with their other values.
        spoil: What is done to the written files last.
        shards: In how many files the tensors lie.
    """

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Any]
    twice: dict[str, Any] = field(default_factory=dict)
    spoil: Callable[[Path], None] = lambda path: None
    shards: int = 1


def weights(model: DecoderConfig) -> dict[str, torch.Tensor]:
    """Random weights of a size at which every one matters for the logits."""
    generator = torch.Generator().manual_seed(0)
    found = {n: 0.2 * torch.randn(s, generator=generator) for n, s in hf_shapes(model).items()}
    return {n: t + 1 if "norm" in n else t for n, t in found.items()}


def good(family: str) -> Case:
    """A directory as it should be."""
    config = {"model_type": family, **SIZES, **FAMILIES[family]}
    return Case("unchanged", config, weights(decoder_config(config)))


def retype(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """In another dtype, or with other codes."""
    kinds = [
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int8,
        torch.int32,
        torch.bool,
        torch.float8_e4m3fn,
    ]
    return tensor.to(draw.choice(kinds))


def resize(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """A dimension longer, shorter, gone or new; or transposed."""
    dim = draw.randrange(tensor.dim())
    half = tensor.shape[dim] // 2
    changes: list[Callable[[], torch.Tensor]] = [
        lambda: tensor.narrow(dim, 0, half), lambda: torch.cat([tensor, tensor], dim),
        lambda: tensor[None],
        lambda: tensor.narrow(dim, 0, tensor.shape[dim] - 1), lambda: tensor.flatten(),
        lambda: tensor.t() if tensor.dim() == 2 else tensor[:, None],
        lambda: tensor.narrow(dim, 0, 0), lambda: tensor.reshape(*tensor.shape[:-1], -1, 2),
    ]  # fmt: skip
    return draw.choice(changes)().contiguous()


def break_numbers(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """One element is no number."""
    tensor = tensor.clone()
    tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice(
        [float("nan"), float("inf"), -float("inf")]
    )
    return tensor


def change_tensors(case: Case, draw: random.Random, others: dict[str, Any]) -> None:
    """Drop, rename, duplicate, resize, retype or break one tensor."""
    name = draw.choice(list(case.tensors))
    what = draw.choice(["drop", "rename", "duplicate", "resize", "retype", "break"])
    case.kind = f"tensor: {what}"
    if what == "drop":
        del case.tensors[name]
    elif what in ("rename", "duplicate"):
        new = draw.choice(
            [name + "_x", name.replace(".1.", ".2."), name.removeprefix("model."), *others]
        )
        case.tensors[new] = (
            case.tensors[name].clone() if what == "duplicate" else case.tensors.pop(name)
        )
    else:
        change = {"resize": resize, "retype": retype, "break": break_numbers}[what]
        case.tensors[name] = change(case.tensors[name], draw)


def change_keys(case: Case, draw: random.Random, extra: dict[str, list[Any]] = EXTRA) -> None:
    """Drop, null, retype, rename, duplicate, resize or add one key of config.json."""
    key = draw.choice(list(case.config))
    what = draw.choice(["drop", "null", "retype", "rename", "duplicate", "resize", "add", "add"])
    case.kind = f"key: {what}"
    value = case.config[key]
    if what == "drop":
        del case.config[key]
    elif what == "null":
        case.config[key] = None
    elif what == "retype":
        odd = [*ODD, str(value), [value], {"value": value}]
        if isinstance(value, dict):
            inner = draw.choice(list(value))
            odd += [{**value, inner: v} for v in ODD] + [
                {k: v for k, v in value.items() if k != inner}
            ] * 5
        case.config[key] = draw.choice(odd)
    elif what == "rename":
        case.config[draw.choice([f"{key}_", key.upper(), "n_layer", "rope_scaling", "type"])] = (
            case.config.pop(key)
        )
    elif what == "duplicate":
        case.twice[key] = draw.choice([value, *ODD])
    elif what == "resize":
        numbers = [
            k
            for k, v in case.config.items()
            if isinstance(v, int | float) and not isinstance(v, bool)
        ]
        key = draw.choice(numbers)
        value = case.config[key]
        case.config[key] = draw.choice(
            [value * 2, value // 2, value + 1, value - 1, -value, value * 1.0]
        )
    else:
        key = draw.choice(list(extra))
        case.config[key] = draw.choice(extra[key])


def spoil_files(case: Case, draw: random.Random) -> None:
    """Cut, garble, remove or contradict a file."""
    what = draw.choice(["cut", "garble", "remove", "index", "config", "stray", "adapter"])
    case.kind = f"file: {what}"
    case.shards = draw.choice([1, 3])
    number, at = draw.randrange(3), draw.random()

    def spoil(path: Path) -> None:
        files = sorted(path.glob("*.safetensors"))
        file = files[number % len(files)]
        index = path / "model.safetensors.index.json"
        data = file.read_bytes()
        if what == "cut":
            file.write_bytes(data[: int(at * len(data))])
        elif what == "garble":
            place = int(at * min(len(data), 400))
            file.write_bytes(data[:place] + b"\xff}" + data[place + 2 :])
        elif what == "remove":
            draw.choice([file, path / "config.json"]).unlink()
        elif what == "index":
            old = (
                json.loads(index.read_text())
                if index.exists()
                else {"weight_map": {"a": file.name}}
            )
            names = old["weight_map"]
            name = draw.choice(list(names))
            odd = [
                [], {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {"a": 1}}, None,
                {"weight_map": {**names, name: "other.safetensors"}}, {"weight_map": {**names,
                name: files[0].name}},
                {"weight_map": {k: v for k, v in names.items() if k != name}},
                {"weight_map": {name: "../x"}},
                {"weight_map": {**names, "new": file.name}}, {"weight_map": {**names, name: "."}},
            ]  # fmt: skip
            index.write_text(json.dumps(draw.choice(odd)))
        elif what == "config":
            texts = ["", "[]", "null", "{", '{"a"', "\xff", "[" * 100_000, "3"]
            (path / "config.json").write_bytes(draw.choice(texts).encode("latin-1"))
        elif what == "stray":
            (path / draw.choice(["model.gguf", "x.safetensors", "model.safetensors"])).write_bytes(
                data
            )
        else:
            (path / "adapter_config.json").write_text("{}")

    case.spoil = spoil


def huggingface_case(seed: int) -> tuple[str, Case]:
    """Family and case of a seed: one change, sometimes two."""
    draw = random.Random(seed)
    family = draw.choice(list(FAMILIES))
    case = good(family)
    others = {name: None for name in good(draw.choice(list(FAMILIES))).tensors}
    case.shards = draw.choice([1, 1, 2])
    kinds = []
    for _ in range(draw.choice([1, 1, 1, 2])):
        change = draw.choice(["keys", "keys", "keys", "tensors", "tensors", "files"])
        if change == "keys" and case.config:
            change_keys(case, draw)
        elif change == "files":
            spoil_files(case, draw)
        elif case.tensors:
            change_tensors(case, draw, others)
        kinds.append(case.kind)
    case.kind = kinds[0] if len(kinds) == 1 else "two of these"
    return family, case


def write_directory(case: Case, path: Path) -> Path:
    """The files of a case."""
    path.mkdir()
    text = json.dumps(case.config)
    for key, value in case.twice.items():
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(value)}}}"
    (path / "config.json").write_text(text)
    if case.shards == 1:
        save_file(case.tensors, path / "model.safetensors", {"format": "pt"})
    else:
        names = list(case.tensors)
        files = {
            n: f"model-{i % case.shards + 1:05d}-of-{case.shards:05d}.safetensors"
            for i, n in enumerate(names)
        }
        for file in sorted(set(files.values())):
            save_file(
                {n: case.tensors[n] for n in names if files[n] == file},
                path / file,
                {"format": "pt"},
            )
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": files})
        )
    case.spoil(path)
    return path


def our_logits(path: Path) -> torch.Tensor:
    """Of mqat; process groups of one process must exist.

    Raises:
        UserError: The source is refused.
    """
    source = open_pretrained(path)
    chunks = build_model(source.config, ModelConfig(), {}, torch.float32)
    load_pretrained_(chunks, source)
    for chunk in chunks:
        chunk.eval()
    return logits(chunks, TOKENS % source.config.vocab_size)


def transformers_logits(path: Path, gguf: str | None = None) -> torch.Tensor | None:
    """Of transformers; None: it refuses the files, or fills in what they lack."""
    from transformers import AutoModelForCausalLM

    told = {} if gguf is None else {"gguf_file": gguf}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=torch.float32, local_files_only=True, output_loading_info=True, **told
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            return None
        with torch.no_grad():
            return model.eval()(TOKENS % model.config.vocab_size).logits
    except Exception:
        return None


def judged_logits(path: Path, gguf: str | None = None) -> torch.Tensor | None:
    """Of transformers, or for ChatGLM, whose code it does not have, of the tests' own formulas."""
    if gguf is None and (found := chatglm_logits(path)) is not None:
        return found
    return transformers_logits(path, gguf)


def chatglm_logits(path: Path) -> torch.Tensor | None:
    """None: of another family, or files that these formulas do not fit."""
    try:
        config = json.loads((path / "config.json").read_text())
        if config["model_type"] != "chatglm":
            return None
        model = ChatGlm(config)
        tensors = [load_file(file) for file in path.glob("*.safetensors")]
        model.load_state_dict({name: t for found in tensors for name, t in found.items()})
        with torch.no_grad():
            found = model.float()(TOKENS % config["padded_vocab_size"]).logits
        return found if found.isfinite().all() else None
    except Exception:
        return None


def outcome(path: Path, expected: torch.Tensor, gguf: str | None = None) -> str:
    """What mqat does with a source.

    `expected`: logits of the unchanged model.

    Returns:
        `refused`, `same numbers`, `same numbers,
        which transformers does not read`; or what must not be:
        `DIFFERENT NUMBERS ...`, `TRACEBACK ...`, `SEVERAL LINES ...`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ours = our_logits(path)
        except UserError as error:
            return "refused" if "\n" not in str(error) else f"SEVERAL LINES {error}"
        except Exception as error:
            return f"TRACEBACK {type(error).__name__}: {error}"
        theirs = judged_logits(path, gguf)
    wanted = expected if theirs is None else theirs
    if ours.shape != wanted.shape or not (ours - wanted).abs().max() <= LIMIT:
        return f"DIFFERENT NUMBERS, transformers {'refuses' if theirs is None else 'reads it'}"
    return (
        "same numbers" if theirs is not None else "same numbers, which transformers does not read"
    )


class Expected:
    """Logits of the unchanged models, by transformers, computed once.

    `good` makes the models.
    """

    def __init__(self, good: Callable[[str], Case]) -> None:
        self._good = good
        self._found: dict[str, torch.Tensor] = {}

    def of(self, family: str) -> torch.Tensor:
        """float32 [1, s, V]."""
        if family not in self._found:
            import tempfile

            with tempfile.TemporaryDirectory() as folder:
                found = judged_logits(write_directory(self._good(family), Path(folder) / "good"))
            assert found is not None, f"transformers does not read the unchanged {family}"
            self._found[family] = found
        return self._found[family]


EXPECTED = Expected(good)
