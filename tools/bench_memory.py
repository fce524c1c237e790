"""Bytes kept for backward, and bytes of quantized weights, with microbatches in flight.

    python tools/bench_memory.py --tokens 256 --microbatches 4 --json
    python tools/bench_memory.py --tp 2 [--sequence-parallel], or --pp 2 --microbatches 8

Counted: the largest number of bytes of unique storages that autograd holds at one time (saved-tensor
hooks), parameters excluded; `linear_*` are those saved while one of the quantizable linears runs.
Without pipeline stages all microbatches run forward before the first backward; with them, Megatron's
schedule decides. Bytes are sums over ranks. Each system has processes of its own, for their peak memory.
Ratios are to `baseline`, Megatron's own layers (see bench_qat_step.py).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from typing import Any

import torch
from bench_model import arguments, batches, build, start, systems_of

from mqat.runtime import groups


class _Packed:
    """A saved tensor; autograd drops it when it has been used."""

    def __init__(self, tensor: torch.Tensor, saved: PeakSavedBytes, kinds: tuple[str, ...]) -> None:
        self.tensor, self.saved, self.kinds = tensor, saved, kinds
        saved.change(self, 1)

    def __del__(self) -> None:
        self.saved.change(self, -1)


class PeakSavedBytes:
    """Unique storages that autograd holds, by whether a linear saved them.

    Attributes:
        peak: Most bytes at one time: `all`, and `linear`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        from mqat.parallel.linear import quantized_linears

        # Parameters lie in one buffer, so their storage is known by any of them.
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.holders: Counter[tuple[str, int]] = Counter()
        self.held: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.inside = False
        for linear in quantized_linears(model).values():
            linear.register_forward_pre_hook(lambda *_: self._enter(True))
            linear.register_forward_hook(lambda *_: self._enter(False))

    def _enter(self, inside: bool) -> None:
        self.inside = inside

    def pack(self, tensor: torch.Tensor) -> _Packed | torch.Tensor:
        """Saved-tensor hook."""
        if tensor.untyped_storage().data_ptr() in self.parameters:
            return tensor
        return _Packed(tensor, self, ("all", "linear") if self.inside else ("all",))

    @staticmethod
    def unpack(packed: _Packed | torch.Tensor) -> torch.Tensor:
        """Saved-tensor hook."""
        return packed.tensor if isinstance(packed, _Packed) else packed

    def change(self, packed: _Packed, by: int) -> None:
        """One holder of a storage more or less."""
        storage = packed.tensor.untyped_storage()
        for kind in packed.kinds:
            key = (kind, storage.data_ptr())
            before = self.holders[key]
            self.holders[key] += by
            if bool(before) != bool(before + by):
                self.held[kind] += by * storage.nbytes()
                self.peak[kind] = max(self.peak[kind], self.held[kind])


def _forward_passes(chunk: Any, data: list[dict[str, Any]]) -> None:
    alive = [
        chunk(b["tokens"], b["position_ids"], b["attention_mask"], labels=b["labels"]) for b in data
    ]
    del alive


def measure(args: Any, name: str, algorithm: str) -> dict[str, Any]:
    """One optimizer step's passes, up to the last forward without pipeline stages."""
    from mqat.evaluation.forward import forward_loss, run_microbatches
    from mqat.parallel.linear import quantized_linears
    from mqat.parallel.quantized_step import quantized_step

    start(args)
    system = build(args, name, algorithm)
    (chunk,) = system.chunks
    saved = PeakSavedBytes(chunk)
    linears = quantized_linears(chunk).values()
    data = batches(args)
    with quantized_step(chunk):
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            if args.pp == 1:
                _forward_passes(chunk, data)
            else:
                run_microbatches(forward_loss, system.chunks, data, forward_only=False)
        held = sum(x.weight_cache.num_bytes for x in linears if x.weight_cache is not None)
    parameters = sum(linear.weight.numel() for linear in linears)
    sums = torch.tensor([saved.peak["linear"], saved.peak["all"], held, parameters])
    rss = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(rss, op=torch.distributed.ReduceOp.MAX)
    of_linears, of_all, held, parameters = sums.tolist()
    groups.finalize()
    return {
        "system": name,
        "algorithm": algorithm,
        "precision": args.precision,
        "tokens_per_microbatch": args.tokens,
        "microbatches": args.microbatches,
        "tp": args.tp,
        "pp": args.pp,
        "sequence_parallel": args.sequence_parallel,
        "linear_saved_bytes": of_linears,
        "saved_bytes": of_all,
        "extra_bytes_per_param": held / parameters,
        "peak_rss_bytes": int(rss),
    }


def main() -> None:
    """Prints a table, or JSON, of all systems relative to the baseline."""
    parser = arguments(__doc__.split("\n")[0])
    parser.set_defaults(precision="bf16")
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "ALGORITHM"))
    args = parser.parse_args()
    if args.one:
        row = measure(args, *args.one)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(row))
        return
    launcher = [sys.executable]
    if args.tp * args.pp > 1:
        ranks = str(args.tp * args.pp)
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    results: list[dict[str, Any]] = []
    for kind in systems_of(args):
        command = [*launcher, __file__, *sys.argv[1:], "--one", *kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
        base = results[0] if results else row
        for key in ("linear_saved", "saved"):
            row[f"{key}_ratio"] = row[f"{key}_bytes"] / base[f"{key}_bytes"]
        results.append(row)
    if args.json:
        print(json.dumps({"results": results}, indent=1))
        return
    for row in results:
        print(
            f"{row['system']:>15} {row['algorithm']:>14}  linears x{row['linear_saved_ratio']:.3f}"
            f"  all x{row['saved_ratio']:.3f}  {row['extra_bytes_per_param']:.3f} B/parameter"
            f"  peak {row['peak_rss_bytes'] / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
