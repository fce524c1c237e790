"""Bytes kept for backward, and bytes of quantized weights, with microbatches in flight.

    python tools/bench_memory.py --precision bf16 --tokens 256 --microbatches 4 --json

Counted: unique storages that autograd saves (saved-tensor hooks) in the forward passes of all
microbatches, none of which has run backward yet; parameters excluded. `linear_*` are those saved while
one of the quantizable linears runs. Each system has a process of its own, for its peak memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

import torch
from bench_model import arguments, batches, build, start

from mqat.runtime import groups


class SavedBytes:
    """Unique storages that autograd saves, by whether a linear saved them."""

    def __init__(self, model: torch.nn.Module) -> None:
        from mqat.parallel.linear import quantized_linears

        # Parameters lie in one buffer, so their storage is known by any of them.
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.by_linears: set[int] = set()
        self.inside = False
        for linear in quantized_linears(model).values():
            linear.register_forward_pre_hook(lambda *_: self._enter(True))
            linear.register_forward_hook(lambda *_: self._enter(False))

    def _enter(self, inside: bool) -> None:
        self.inside = inside

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Saved-tensor hook."""
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in self.parameters:
            self.storages[pointer] = storage  # kept, so that its address is not used again
            if self.inside:
                self.by_linears.add(pointer)
        return tensor

    @property
    def total(self) -> int:
        """Bytes of all."""
        return sum(storage.nbytes() for storage in self.storages.values())

    @property
    def of_linears(self) -> int:
        """Bytes that the linears saved."""
        return sum(self.storages[pointer].nbytes() for pointer in self.by_linears)


def measure(args: Any, name: str, algorithm: str) -> dict[str, Any]:
    """Forward passes of all microbatches with their graphs alive."""
    from mqat.parallel.linear import quantized_linears
    from mqat.parallel.quantized_step import quantized_step

    start(args)
    system = build(args, name, algorithm)
    (chunk,) = system.chunks
    saved = SavedBytes(chunk)
    linears = quantized_linears(chunk).values()
    alive = []
    with quantized_step(chunk):
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            for b in batches(args):
                alive.append(
                    chunk(b["tokens"], b["position_ids"], b["attention_mask"], labels=b["labels"])
                )
        held = sum(
            linear.weight_cache.num_bytes for linear in linears if linear.weight_cache is not None
        )
    parameters = sum(linear.weight.numel() for linear in linears)
    row = {
        "system": name,
        "algorithm": algorithm,
        "precision": args.precision,
        "tokens_per_microbatch": args.tokens,
        "microbatches": args.microbatches,
        "tp": args.tp,
        "linear_saved_bytes": saved.of_linears,
        "saved_bytes": saved.total,
        "extra_bytes_per_param": held / parameters,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    del alive
    groups.finalize()
    return row


def main() -> None:
    """Prints a table, or JSON, of all systems relative to the baseline."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--reference", action="store_true", help="also the fake-quantized path")
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "ALGORITHM"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, *args.one)))
        return
    names = ("mqat", "mqat-reference") if args.reference else ("mqat",)
    kinds = [("baseline", "null"), *((name, a) for name in names for a in args.algorithms)]
    results: list[dict[str, Any]] = []
    for kind in kinds:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", *kind]
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
