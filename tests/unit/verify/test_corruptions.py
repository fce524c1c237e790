"""Every exported form x a generated list of corruptions: all found, and the tensor is named.

The list is made from the tensors of the directory itself: one of each kind (a layer, and what stands
outside of layers) is changed in every way that could happen to it, and put back. The untouched directory
passes before and after, so that it is the change that is found. The model has a bias on every linear.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mqat.export.export import export_hf, export_trtllm
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import DENSE_LINEARS
from mqat.quant.algorithm import named_scheme
from mqat.verify.verify import verify_export
from tests.unit.export.checkpoints import all_caches, write_checkpoint
from tests.unit.verify.test_matrix import FORMATS, REFUSED

LINEARS = tuple(linear.name for linear in DENSE_LINEARS)

# As small as INT4 kernels allow with groups of 64 on two ranks.
MODEL = DecoderConfig(
    vocab_size=45, hidden_size=128, intermediate_size=256, num_layers=2, num_attention_heads=4,
    num_query_groups=2, head_dim=32, max_position_embeddings=64, biases=LINEARS,
)  # fmt: skip
Tensors = dict[str, Tensor]
Change = Callable[[Tensors], None]


@dataclass(frozen=True)
class Corruption:
    """A change of a directory's tensors, and the names of which a problem must hold one."""

    label: str
    names: tuple[str, ...]
    change: Change


def layers_of(algorithm: str, cache: str | None) -> dict[str, object]:
    """Schemes of every linear; of `mixed`, three formats and unquantized ones side by side."""
    size = 128 if algorithm == "w4a8_awq" else 64
    names = [f"decoder.layers.{i}.{linear}" for i in range(MODEL.num_layers) for linear in LINEARS]
    algorithms = dict.fromkeys(names, algorithm)
    if algorithm == "mixed":
        kinds = ("int4", "fp8", "int8", "null")
        algorithms = {name: kinds[index % 4] for index, name in enumerate(names)}
    schemes = {name: named_scheme(kind, group_size=size) for name, kind in algorithms.items()}
    caches = {} if cache is None else all_caches(cache, model=MODEL)
    return {name: scheme for name, scheme in schemes.items() if scheme is not None} | caches


_CASES = [
    *((name, target, None) for name in FORMATS for target in ("trtllm", "compressed-tensors", "modelopt")
      if (name, {"trtllm": "TensorRT-LLM TP 1 x PP 1", "modelopt": "ModelOpt style"}.get(target, target))
      not in REFUSED),
    ("mixed", "trtllm", None), ("mixed", "compressed-tensors", None),
    ("int8", "trtllm", "int8"), ("null", "trtllm", "fp8"), ("fp8", "trtllm", "fp8"),
    ("int4", "compressed-tensors", "fp8"), ("fp8", "modelopt", "fp8"),
]  # fmt: skip
_NAMES = ["-".join(filter(None, case)) for case in _CASES]
CASES = [
    pytest.param(case, id=name, marks=pytest.mark.slow)
    for name, case in zip(_NAMES, _CASES, strict=True)
]


def export(checkpoint: Path, out: Path, target: str, **layout: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # int8_wo: the loader rounds again
        if target == "trtllm":
            layout = {"tensor_parallel": 1} | layout
            export_trtllm(checkpoint, out, dtype="float32", allow_requantization=True, **layout)
        else:
            export_hf(checkpoint, out, style=target, dtype="float32")


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    algorithm, target, cache = request.param
    checkpoint = write_checkpoint(tmp_path / "in", MODEL, layers_of(algorithm, cache), cuts=2)
    export(checkpoint, tmp_path / "out", target)
    return algorithm, target, checkpoint, tmp_path / "out"


# Of one layer: a fused linear and a part of one, a column- and a row-parallel one, norms, caches.
_KINDS = tuple(f".layers.1.{part}" for part in (
    "attention.qkv.", "self_attn.k_proj.", "mlp.gate", "mlp.proj.", "mlp.down_proj.", "input_layernorm.",
    "attention.kv_cache", "self_attn.k_scale", "self_attn.v_scale", "self_attn.v_proj.v_scale",
))  # fmt: skip


def flip(name: str) -> Change:
    def change(tensors: Tensors) -> None:
        bits = tensors[name].reshape(-1).view(torch.uint8)
        bits[bits.numel() // 2 & ~7] ^= 1

    return change


def apply(name: str, function: Callable[[Tensor], Tensor]) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name] = function(tensors[name]).to(tensors[name].dtype)

    return change


def nibbles_swapped(tensor: Tensor) -> Tensor:
    bits = tensor.view(torch.uint8)
    return (bits >> 4 | bits << 4).view(tensor.dtype)


def offset_exchanged(tensor: Tensor) -> Tensor:
    """Two's complement for offset binary, or the other way round."""
    return (tensor.view(torch.uint8) ^ 0x88).view(tensor.dtype)


def bytes_reversed(tensor: Tensor) -> Tensor:
    words = tensor.view(torch.uint8).unflatten(-1, (-1, 4))
    return words.flip(-1).flatten(-2).view(tensor.dtype)


def of_each_tensor(tensors: Tensors, packed: set[str]) -> Iterator[Corruption]:
    """What can happen to one tensor alone."""
    kinds = [n for n in tensors if ".layers." not in n or any(part in n for part in _KINDS)]
    for name in kinds:
        tensor = tensors[name]
        yield Corruption("bit", (name,), flip(name))
        yield Corruption("missing", (name,), lambda t, name=name: t.pop(name))
        if tensor.dim() == 2:
            yield Corruption("transposed", (name,), apply(name, torch.t))
        if tensor.dim() and tensor.shape[-1] > 1:
            yield Corruption("off by one", (name,), apply(name, lambda t: t.roll(1, -1)))
        if tensor.dim() and tensor.shape[0] > 1:
            yield Corruption("rows off by one", (name,), apply(name, lambda t: t.roll(1, 0)))
        if "scal" in name:
            yield Corruption("x 2", (name,), apply(name, lambda t: t.float() * 2))
            yield Corruption("/ 2", (name,), apply(name, lambda t: t.float() / 2))
            yield Corruption("inverted", (name,), apply(name, lambda t: 1 / t.float()))
        if tensor.dtype == torch.float32:
            yield Corruption("dtype", (name,), lambda t, n=name: t.update({n: t[n].half()}))
        if name in packed:
            yield Corruption("nibbles", (name,), apply(name, nibbles_swapped))
            yield Corruption("offset", (name,), apply(name, offset_exchanged))
        if tensor.dtype == torch.int32:
            yield Corruption("words", (name,), apply(name, bytes_reversed))


def exchange(first: str, second: str) -> Change:
    """All tensors of two modules; of unequal height, as many rows as both have."""

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(f"{first}.")]:
            other = second + name.removeprefix(first)
            if other not in tensors or not tensors[name].dim() or name.endswith("_shape"):
                continue
            rows = min(len(tensors[name]), len(tensors[other]))
            kept = tensors[name][:rows].clone()
            tensors[name][:rows] = tensors[other][:rows]
            tensors[other][:rows] = kept

    return change


def blocks_of_qkv(order: tuple[int, ...]) -> Change:
    """Reorders the head-high blocks of everything that belongs to the rows of a fused qkv."""

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("transformer.layers.1.attention.qkv.")]:
            if not name.endswith("prequant_scaling_factor") and len(tensors[name]) % 8 == 0:
                blocks = tensors[name].chunk(8)
                tensors[name] = torch.cat([blocks[index] for index in order])

    return change


def interleaved(name: str) -> Change:
    """Rows of the query in the order of GPT-J and llama.cpp."""

    def change(tensors: Tensors) -> None:
        half = len(tensors[name]) // 8 if "qkv" in name else len(tensors[name]) // 4
        head = tensors[name][:half]
        tensors[name][:half] = head.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1).clone()

    return change


def of_modules(tensors: Tensors, target: str) -> Iterator[Corruption]:
    """Modules taken for one another."""
    if target == "trtllm":
        prefix, gate, up = "transformer.layers.1.", "mlp.fc", "mlp.gate"
        query, down = "attention.qkv", "mlp.proj"
        # Four query heads, two keys, two values, in blocks of half a head where rows are paired.
        orders = {"query and key": (4, 5, 2, 3, 0, 1, 6, 7), "key and value": (0, 1, 2, 3, 6, 7, 4, 5),
                  "heads by group": (0, 1, 4, 6, 2, 3, 5, 7)}  # fmt: skip
        for label, order in orders.items():
            yield Corruption(label, (f"{prefix}{query}.",), blocks_of_qkv(order))
    else:
        prefix, gate, up = "model.layers.1.", "mlp.gate_proj", "mlp.up_proj"
        query, down = "self_attn.q_proj", "mlp.down_proj"
        key, value = (prefix + query.replace("q_", f"{p}_") for p in "kv")
        yield Corruption("query and key", (prefix + query, key), exchange(prefix + query, key))
        yield Corruption("key and value", (key, value), exchange(key, value))
    gate, up = prefix + gate, prefix + up
    other = prefix.replace("1", "0")
    yield Corruption("gate and up", (gate, up), exchange(gate, up))
    for module in (query, down):
        first, second = prefix + module, other + module
        yield Corruption("layers", (first, second), exchange(first, second))
    suffix = "weight" if f"{prefix}{query}.weight" in tensors else "weight_packed"
    name = f"{prefix}{query}.{suffix}"
    yield Corruption("rotation order", (name,), interleaved(name))
    norms = [n for n in tensors if n.startswith(prefix) and "norm" in n]
    yield Corruption(
        "norms",
        tuple(norms),
        lambda t: t.update(zip(norms, [t[n] for n in norms[::-1]], strict=True)),
    )


def save(tensors: Tensors, file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def missed(
    out: Path, checkpoint: Path, corruptions: list[Corruption]
) -> tuple[list[object], set[str]]:
    """Corruptions that no problem names, and the kinds that changed anything."""
    (file,) = out.glob("*.safetensors")
    original, found, labels = file.read_bytes(), [], set()
    for corruption in corruptions:
        tensors = load_file(file)
        corruption.change(tensors)
        save(tensors, file)
        if (
            file.read_bytes() != original
        ):  # some leave what they meet as it is: ones inverted, zeros
            labels.add(corruption.label)
            problems = verify_export(out, reference=checkpoint).problems
            if not any(name in problem for name in corruption.names for problem in problems):
                found.append((corruption.label, corruption.names, problems[:3]))
        file.write_bytes(original)
    return found, labels


def test_every_corruption_is_found_and_named(case):
    _, target, checkpoint, out = case
    (file,) = out.glob("*.safetensors")
    save(load_file(file), file)  # the package's own order of bytes, so that changes show
    assert verify_export(out, reference=checkpoint).problems == []  # control
    tensors = load_file(file)
    packed = {n for n, t in tensors.items() if t.dtype in (torch.int32, torch.uint8)}
    if target == "trtllm":  # row pairs
        packed |= {n for n, t in tensors.items() if t.dtype == torch.int8
                   and n.endswith(".weight") and len(t) < len(tensors[n[:-6] + "bias"])}  # fmt: skip
    corruptions = [*of_each_tensor(tensors, packed), *of_modules(tensors, target)]
    found, labels = missed(out, checkpoint, corruptions)
    assert not found
    expected = {"bit", "missing", "transposed", "off by one", "gate and up", "query and key",
                "key and value", "layers", "rotation order", "norms", "dtype"}  # fmt: skip
    expected |= {"nibbles", "offset"} if packed else set()
    expected |= {"x 2", "/ 2", "inverted"} if any("scal" in name for name in tensors) else set()
    assert labels >= expected
    assert verify_export(out, reference=checkpoint).problems == []  # control: all was put back


@pytest.mark.parametrize(
    "algorithm", ["null", "int8", "int4", "w4a8_awq", "fp8", "fp8_pc_pt", "nvfp4", "mixed"]
)
def test_wrong_ranks_and_mappings_are_found(algorithm, tmp_path):
    """Two tensor-parallel ranks, and two stages."""
    checkpoint = write_checkpoint(tmp_path / "in", MODEL, layers_of(algorithm, None))
    layout = {"tensor_parallel": 2} if algorithm != "w4a8_awq" else {}
    stages = {} if algorithm == "mixed" else {"pipeline_parallel": 2}
    export(checkpoint, tmp_path / "out", "trtllm", **layout, **stages)
    ranks = sorted(f.name for f in (tmp_path / "out").glob("rank*"))
    assert verify_export(tmp_path / "out", reference=checkpoint).problems == []  # control

    def problems(change: Callable[[Path], object]) -> list[str]:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        change(Path(shutil.copytree(tmp_path / "out", copy)))
        return verify_export(copy, reference=checkpoint).problems

    def exchange_files(first: str, second: str) -> Callable[[Path], object]:
        def change(copy: Path) -> None:
            a, b = (copy / first).read_bytes(), (copy / second).read_bytes()
            (copy / first).write_bytes(b)
            (copy / second).write_bytes(a)

        return change

    def edit(**mapping: int) -> Callable[[Path], object]:
        def change(copy: Path) -> None:
            config = json.loads((copy / "config.json").read_text())
            config["mapping"] |= mapping
            (copy / "config.json").write_text(json.dumps(config))

        return change

    last = ranks[-1]
    assert f"{last}: missing" in problems(lambda copy: (copy / last).unlink())
    stale = f"rank{len(ranks)}.safetensors"
    found = problems(lambda copy: shutil.copy(copy / ranks[0], copy / stale))
    assert f"{stale}: stale file of another layout" in found
    assert any(".weight" in p for p in problems(exchange_files(ranks[0], ranks[1])))
    if len(ranks) == 4:
        assert any("vocab_embedding" in p for p in problems(exchange_files(ranks[0], ranks[2])))
    tp, pp = (2, 1) if algorithm == "mixed" else (1, 2) if algorithm == "w4a8_awq" else (2, 2)
    for mapping in ({"tp_size": pp, "pp_size": tp}, {"tp_size": tp * pp, "pp_size": 1}):
        if (mapping["tp_size"], mapping["pp_size"]) != (tp, pp):
            assert problems(edit(**mapping)), mapping
    assert any("world_size" in p for p in problems(edit(world_size=8)))
    headless = problems(lambda copy: drop(copy / last, "lm_head.weight"))
    assert f"{last}: lm_head.weight is missing" in headless
    padding = problems(lambda copy: pad(copy / last))
    assert any("lm_head.weight" in p for p in padding)


def drop(file: Path, name: str) -> None:
    tensors = load_file(file)
    del tensors[name]
    save(tensors, file)


def pad(file: Path) -> None:
    tensors = load_file(file)
    tensors["lm_head.weight"][-1] = 1.0
    save(tensors, file)


def test_tied_heads_are_written_whole_for_engines_and_left_out_otherwise(tmp_path):
    tied = replace(MODEL, tie_word_embeddings=True)
    checkpoint = write_checkpoint(tmp_path / "in", tied, {})
    export(checkpoint, tmp_path / "trtllm", "trtllm")
    tensors = load_file(tmp_path / "trtllm" / "rank0.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["transformer.vocab_embedding.weight"])
    export(checkpoint, tmp_path / "hf", "compressed-tensors")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    (problem,) = verify_export(tmp_path / "hf", reference=checkpoint).problems
    assert "lm_head.weight is not expected" in problem
