"""Memory of a rank that imports a Hugging Face directory: its shard, and how much more at the most.

    torchrun --nproc-per-node 2 tools/bench_import.py --gib 2
    torchrun --nproc-per-node 2 tools/bench_import.py --gib 2 --experts 16

Writes random bf16 weights of a synthetic model of that size (with experts in the fused 3-D tensors of
transformers 5), builds the model over all processes as tensor-parallel ranks, and samples the resident
memory that belongs to no file while `load_pretrained_` fills it. A line a rank, in MiB.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mqat.config import ModelConfig
from mqat.models.decoder import DecoderConfig
from mqat.models.hf_keys import hf_shapes
from mqat.models.structure import FUSED_EXPERTS
from mqat.runtime import groups
from mqat.runtime.groups import command_line

_MIB = 1 << 20


def synthetic(gib: float, experts: int) -> DecoderConfig:
    """A model with layers enough for so many GiB in bf16."""
    sizes = {
        "vocab_size": 32000, "hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 8,
        "head_dim": 128, "intermediate_size": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    of_experts = {
        "family": "qwen3_moe", "num_experts": experts, "experts_per_token": 2,
        "expert_intermediate_size": 1024, "windowed_layers": (),
    }  # fmt: skip

    def model(layers: int) -> DecoderConfig:
        return DecoderConfig(num_layers=layers, **sizes, **(of_experts if experts else {}))

    one, two = (sum(torch.Size(s).numel() for s in hf_shapes(model(n)).values()) for n in (1, 2))
    return model(max(round(gib * (1 << 29) / (two - one)), 1))


def layer_tensors(model: DecoderConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a layer as transformers 5 computes with them."""
    prefix = model.architecture.hf_layer.format(i=layer)
    mixture = model.architecture.mixture
    inside = prefix + mixture.experts.hf.split("{e}")[0] if mixture else None
    for name, shape in hf_shapes(model).items():
        if name.startswith(prefix) and not (inside and name.startswith(inside)):
            yield name, shape
    if mixture is not None:
        count, hidden = model.num_experts, model.hidden_size
        gate_up, down = (prefix + name for name in FUSED_EXPERTS)
        yield gate_up, (count, 2 * model.expert_intermediate_size, hidden)
        yield down, (count, hidden, model.expert_intermediate_size)


def write(model: DecoderConfig, path: Path) -> None:
    """The directory, a file a layer."""
    every = hf_shapes(model)
    rest = {n: s for n, s in every.items() if ".layers." not in n}
    files = {"model-rest.safetensors": rest}
    for layer in range(model.num_layers):
        files[f"model-{layer:05d}.safetensors"] = dict(layer_tensors(model, layer))
    for file, shapes in files.items():
        tensors = {n: (0.02 * torch.randn(s)).bfloat16() for n, s in shapes.items()}
        save_file(tensors, path / file, {"format": "pt"})
    places = {name: file for file, shapes in files.items() for name in shapes}
    index = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(model.to_hf("bfloat16")))


def anonymous_bytes() -> int:
    """Resident memory that belongs to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def growth(work: Callable[[], None]) -> int:
    """Most that was resident during `work`, beyond what was before."""
    ctypes.CDLL(None).malloc_trim(0)
    before = peak = anonymous_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    work()
    done.set()
    sampler.join()
    return peak - before


def main() -> None:
    """Prints a line a rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--experts", type=int, default=0, help="of a layer; 0: a dense model")
    parser.add_argument("--folder", type=Path, help="where the directory is written for a while")
    args = parser.parse_args()
    groups.initialize(tensor_parallel=groups.world_size())
    from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.specs.model import build_model

    model = synthetic(args.gib, args.experts)
    holder = tempfile.TemporaryDirectory(dir=args.folder)
    shared = [holder.name]
    dist.broadcast_object_list(shared, src=0)
    path = Path(shared[0])
    if groups.is_main():
        write(model, path)
    dist.barrier()
    settings = ModelConfig(
        tensor_model_parallel_size=groups.world_size(),
        sequence_parallel=bool(args.experts) and groups.world_size() > 1,
    )
    chunks = build_model(model, settings, {}, torch.bfloat16)
    for parameter in chunks[0].parameters():
        parameter.data.fill_(1.0)  # pages that are there
    # Tensors get pages of their own, so that what is freed is not kept for later by malloc.
    ctypes.CDLL(None).mallopt(-3, 1 << 18)
    grown = growth(lambda: load_pretrained_(chunks, HuggingFaceCheckpoint(path)))
    shard = [2 * p.numel() for p in chunks[0].parameters()]
    stored = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    found = (
        f"rank {dist.get_rank()}: stored {stored / _MIB:.0f}, shard {sum(shard) / _MIB:.0f}, largest "
        f"tensor {max(shard) / _MIB:.1f}, at most {grown / _MIB:.1f} more while it was filled"
    )
    print(found, flush=True)
    dist.barrier()
    holder.cleanup()
    groups.finalize()


if __name__ == "__main__":
    with command_line():
        main()
