"""Makes a mixture of experts out of a dense model: every MLP is copied into each expert.

    python tools/upcycle.py [SRC] --experts 4 --top-k 2 --out DIR

SRC is a Hugging Face directory or GGUF file of a Llama-like model (default: the packaged SmolLM2-135M);
DIR becomes a `MixtralForCausalLM` directory. A token's weights for its experts add up to one, so the
mixture computes what the dense model did, whatever its new routers choose; training makes experts
differ.
Komatsuzaki et al. 2022, Sparse Upcycling (arXiv:2212.05055).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mqat.checkpoints.source import open_pretrained
from mqat.data.packaged import smollm2_gguf
from mqat.data.tokenizer import load_tokenizer, save_tokenizer
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.families.llama import LLAMA
from mqat.models.families.mixtral import MIXTRAL
from mqat.models.hf_keys import hf_shapes

ROUTER_STD = 0.02  # of new routers: choices begin nearly even


def mixture_of(dense: DecoderConfig, experts: int, top_k: int) -> DecoderConfig:
    """Sizes of the mixture, of whose experts a token goes to `top_k`.

    Raises:
        UserError: Another family, or sizes that no mixture has.
    """
    if dense.family != LLAMA.name:
        raise UserError(
            f"a {dense.family} model: only {LLAMA.name} models differ from {MIXTRAL.name} in their MLPs "
            "alone."
        )
    return replace(
        dense,
        family=MIXTRAL.name,
        num_experts=experts,
        experts_per_token=top_k,
        expert_intermediate_size=dense.intermediate_size,
    )


def _dense_names(dense: DecoderConfig, mixture: DecoderConfig) -> dict[str, str]:
    """Expert's weight in a Hugging Face directory -> the dense model's weight that it copies."""
    mlp = {linear.name.rpartition(".")[2]: linear for linear in dense.linears}
    found = {}
    for expert in (linear for linear in mixture.linears if linear.expert is not None):
        origin = mlp[expert.name.rpartition(".")[2]]
        for own, part in zip(expert.parts, origin.parts, strict=True):
            for layer in range(mixture.num_layers):
                prefix = mixture.architecture.hf_layer.format(i=layer)
                found[f"{prefix}{own.hf}.weight"] = f"{prefix}{part.hf}.weight"
    return found


def upcycled(source: Any, mixture: DecoderConfig, seed: int) -> dict[str, Tensor]:
    """All tensors of the mixture, float32, by their Hugging Face names."""
    copies = _dense_names(source.config, mixture)
    in_dense = hf_shapes(source.config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in hf_shapes(mixture).items():
        origin = copies.get(name, name)
        if origin in in_dense:
            columns = slice(None) if len(shape) == 2 else None
            tensors[name] = source.read(origin, slice(None), columns).float().contiguous()
        else:  # a router
            tensors[name] = ROUTER_STD * torch.randn(shape, generator=generator)
    return tensors


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and writes the directory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", nargs="?", type=Path, help="default: the packaged SmolLM2-135M")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1234, help="of the routers")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if args.out.exists():
        raise UserError(f"{args.out} exists already; choose another path, or delete it first.")
    source = open_pretrained(args.source or smollm2_gguf())
    mixture = mixture_of(source.config, args.experts, args.top_k)
    tensors = upcycled(source, mixture, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}.") as folder:
        whole = Path(folder, "whole")
        save_tokenizer(load_tokenizer(source.tokenizer_source), whole)
        save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
        (whole / "config.json").write_text(json.dumps(mixture.to_hf("float32"), indent=2), "utf-8")
        whole.rename(args.out)
    parameters = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    print(f"{args.out}: {mixture.num_layers} layers of {args.experts} experts, {parameters:.1f} M")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
