"""Export speed and memory on a model of real width, against copying the same bytes; prints JSON.

Writes a checkpoint of 7B shape (hidden 4096) with a few layers, exports it in each format in a process
of its own, and copies the result with the `safetensors` package. Memory is the growth of anonymous
pages (`RssAnon`): checkpoint files are mapped, and mapped pages can be dropped at any time.

    python tools/bench_export.py --layers 8 --out bench.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mqat.checkpoints.manifest import DESCRIPTION, FORMAT_VERSION, describe_files
from mqat.export.export import export_hf, export_trtllm
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import DENSE_LINEARS
from mqat.quant.algorithm import named_scheme
from mqat.quant.scales import compute_amax, compute_scale
from mqat.quant.scheme import LinearScheme

LINEARS = tuple(linear.name for linear in DENSE_LINEARS)

DATA = "__0_0.distcp"


class CheckpointWriter:
    """Writes tensors one at a time in the layout of a `torch_dist` checkpoint."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True)
        self.path = path
        self._file = (path / DATA).open("wb")
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._records: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, key: str, size: tuple[int, ...], offsets: tuple[int, ...], chunk: Tensor) -> None:
        """One chunk of a tensor of global `size`."""
        start = self._file.tell()
        torch.save(chunk.clone(), self._file)
        where = ChunkStorageMetadata(torch.Size(offsets), chunk.shape)
        if key not in self._tensors:
            properties = TensorProperties.create_from_tensor(chunk)
            self._tensors[key] = TensorStorageMetadata(properties, torch.Size(size), [])
        self._tensors[key].chunks.append(where)
        index = MetadataIndex(key, where.offsets)
        self._records[index] = _StorageInfo(DATA, start, self._file.tell() - start)

    def close(self, model: DecoderConfig, layers: dict[str, LinearScheme]) -> None:
        """Writes the index and `mqat.json`."""
        self._file.close()
        index = Metadata(self._tensors, storage_data=self._records)
        (self.path / ".metadata").write_bytes(pickle.dumps(index))
        schemes = {name: scheme.to_dict() for name, scheme in layers.items()}
        description = {
            "format_version": FORMAT_VERSION,
            "model": model.to_dict(),
            "quantization": {"algorithm": "bench", "layers": schemes} if layers else None,
            "files": describe_files(self.path, [DATA, ".metadata"]),
        }
        (self.path / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")


def write_checkpoint(path: Path, model: DecoderConfig, algorithm: str) -> None:
    """Random bf16 weights, every layer a chunk, as Megatron saves them."""
    scheme = named_scheme(algorithm)
    writer = CheckpointWriter(path)
    generator = torch.Generator().manual_seed(0)
    layers = {}
    pool = torch.randn(1 << 24, generator=generator).mul_(0.02).bfloat16()
    for key, size in model.checkpoint_shapes().items():
        shape = size[1:] if key.startswith("decoder.layers.") else size
        for layer in range(size[0] if len(shape) < len(size) else 1):
            count = torch.Size(shape).numel()
            chunk = pool.repeat(-(-count // len(pool)))[:count].view(shape)
            offsets = (layer, *[0] * len(shape)) if len(shape) < len(size) else (0,) * len(size)
            writer.add(key, size, offsets, chunk[None] if len(shape) < len(size) else chunk)
            linear = key.removeprefix("decoder.layers.").removesuffix(".weight")
            if scheme is None or linear not in LINEARS:
                continue
            name = f"decoder.layers.{layer}.{linear}"
            layers[name] = scheme
            assert scheme.weight is not None
            scales = {"weight": compute_scale(
                compute_amax(chunk, scheme.weight.granularity), scheme.weight.format,
                scale_dtype=scheme.weight.scale_dtype,
            )}  # fmt: skip
            if scheme.input is not None:
                scales["input"] = torch.tensor([0.05]).bfloat16().float()
            for kind, scale in scales.items():
                scale_key = f"quantizers.{name}.{kind}_scale"
                writer.add(scale_key, tuple(scale.shape), (0,) * scale.dim(), scale)
    writer.close(model, layers)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; this tool needs Linux 4.5 or later.")


def measure(work: Callable[[], None]) -> dict[str, float]:
    """Wall and CPU seconds, and the largest growth of anonymous memory while `work` runs."""
    before = _anonymous_bytes()
    peak = before
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    sampler.join()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "extra_bytes": peak - before}


def _copy(source: Path, target: Path) -> None:
    """What moving the same bytes costs: read whole, write whole, flushed to disk."""
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        save_file(load_file(file), target / file.name)
        with (target / file.name).open("rb") as handle:
            os.fsync(handle.fileno())


def _in_child(queue: Any, name: str, checkpoint: Path, out: Path, tp: int) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if name == "copy":
        queue.put(measure(lambda: _copy(checkpoint, out)))
    elif name == "hf":
        queue.put(measure(lambda: export_hf(checkpoint, out)))
    else:
        queue.put(measure(lambda: export_trtllm(checkpoint, out, tensor_parallel=tp)))


def _run(name: str, checkpoint: Path, out: Path, tp: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")  # a fresh process: nothing cached, nothing held
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, name, checkpoint, out, tp))
    child.start()
    result: dict[str, float] = queue.get()
    child.join()
    return result


def main() -> None:
    """Runs every combination and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--algorithms", nargs="+", default=["null", "int8", "int4", "fp8"])
    parser.add_argument("--inference-tp", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="where to work; needs twice the model's size")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    width = args.hidden_size
    model = DecoderConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=width * 43 // 16,
        num_layers=args.layers, num_attention_heads=width // 128, num_query_groups=width // 128,
        head_dim=128,
    )  # fmt: skip
    shapes = {key: model.linear_shape(key) for key in LINEARS} | {"table": (32000, width)}
    largest = 2 * max(rows * cols for rows, cols in shapes.values())
    results = []
    for algorithm in args.algorithms:
        root = Path(tempfile.mkdtemp(dir=args.dir))
        try:
            write_checkpoint(root / "checkpoint", model, algorithm)
            for name, tp in (("hf", 1), ("trtllm", args.inference_tp)):
                run = _run(name, root / "checkpoint", root / "out", tp)
                size = sum(f.stat().st_size for f in (root / "out").glob("*.safetensors"))
                copy = _run("copy", root / "out", root / "copy", tp)
                results.append({
                    "algorithm": algorithm, "format": name, "tensor_parallel": tp, "bytes": size,
                    "seconds": round(run["seconds"], 2),
                    "copy_seconds": round(copy["seconds"], 2),
                    "cpu_seconds": round(run["cpu_seconds"], 2),
                    "copy_cpu_seconds": round(copy["cpu_seconds"], 2),
                    "speed_of_copy": round(copy["seconds"] / run["seconds"], 2),
                    "extra_bytes": int(run["extra_bytes"]),
                    "extra_of_largest_tensor": round(run["extra_bytes"] / largest, 2),
                    "copy_extra_bytes": int(copy["extra_bytes"]),
                })  # fmt: skip
                shutil.rmtree(root / "out")
                shutil.rmtree(root / "copy")
        finally:
            shutil.rmtree(root)
    report = {"layers": args.layers, "hidden_size": width, "largest_tensor_bytes": largest,
              "threads": int(os.environ.get("OMP_NUM_THREADS", "1")), "results": results}  # fmt: skip
    text = json.dumps(report, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
