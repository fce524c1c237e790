"""Hashes of what every algorithm writes in every format, to show that two commits write the same.

Sums are SHA-256, of checkpoints' tensors and of exported files. The models are small and random, and the
examples quantize them, in the checkout that `import mqat` finds; compare on one machine, with one torch:

    PYTHONPATH=old python tools/hash_exports.py old.json
    PYTHONPATH=new python tools/hash_exports.py new.json --compare old.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import mqat

ROOT = Path(mqat.__file__).parents[1]
ALGORITHMS = """int8 int8_sq int8_pc_pt int8_wo fp8 fp8_pc_pt nvfp4 mxfp4 mxfp8 nf4 int4 int4_awq
w4a8_awq int4_w_int8_a 8da4w w_int4_sym w_uint4_asym""".split()
_MIXED = "algorithm=int4_awq rules=[{'pattern':'*.linear_fc2','algorithm':'fp8'}]"
# Example, family, processes (all tensor-parallel), and settings of `quantization`.
CASES = (
    *(f"ptq llama 1 algorithm={name}" for name in ALGORITHMS),
    *(f"ptq llama 1 algorithm={a} kv_cache={b}" for a in ("int8", "fp8") for b in ("int8", "fp8")),
    "ptq llama 1 algorithm=int4 group_size=64", f"ptq llama 1 {_MIXED}",
    "ptq qwen2 1 algorithm=int8_sq", "ptq qwen2 2 algorithm=int4_awq", "ptq mistral 2 algorithm=fp8",
    "sft llama 1 algorithm=null", "qat llama 2 algorithm=int8", "qat llama 1 algorithm=int4",
)  # fmt: skip
_TRAINED = """
trainer.precision=32 trainer.max_steps=2 trainer.limit_val_samples=8 model.micro_batch_size=4
model.global_batch_size=8 model.optim.lr=1e-3 model.data.packaged=null model.data.seq_length=64
quantization.num_calib_size=8 quantization.compare_with_finetuned=false export.format=null
exp_manager.create_tensorboard_logger=false""".split()
Cell = dict[str, str] | str  # name -> sum; or "refused"


def write_model(path: Path, family: str) -> None:
    """A Hugging Face directory of random weights; uneven norms give AWQ and SmoothQuant work to do."""
    config = AutoConfig.for_model(
        family, vocab_size=301, hidden_size=512, intermediate_size=1536, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=128,
        tie_word_embeddings=False,  # groups of 128 fit TP 4; the vocabulary fits no TP: it is padded
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = drawn.exp() if "norm" in name else 0.05 * drawn
    model.save_pretrained(path)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([], vocab_size=257, special_tokens=["<end>"], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>")
    fast.save_pretrained(path)


def make_checkpoint(case: str, work: Path, run: Path) -> None:
    """Runs the example that writes `run/checkpoint`."""
    example, family, count, *settings = case.split(" ")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count,
        f"examples/gpt_{example}.py", "--config", "conf/ptq_tiny.yaml", *_TRAINED,
        f"model.restore_from_path={work / family}", f"model.tensor_model_parallel_size={count}",
        f"model.data.train=[{work / 'text'}]", f"model.data.validation=[{work / 'text'}]",
        f"exp_manager.exp_dir={run}", *(f"quantization.{setting}" for setting in settings),
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}: no checkpoint\n{done.stderr[-2000:]}")


def hash_tensors(checkpoint: Path) -> Cell:
    """Sums of all tensors, weights and scales, whole: whatever the training layout was."""
    index: Any = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {key: entry for key, entry in index.items() if hasattr(entry, "chunks")}
    state = {k: torch.empty(e.size, dtype=e.properties.dtype) for k, e in tensors.items()}
    load(state, checkpoint_id=checkpoint, no_dist=True)
    data = {key: tensor.flatten().view(torch.uint8).numpy().data for key, tensor in state.items()}
    return {key: hashlib.sha256(values).hexdigest() for key, values in data.items()}


def hash_export(run: Path, export: Callable[..., None], **settings: Any) -> Cell:
    """Sums of all files of an export of `run/checkpoint`."""
    out = Path(tempfile.mkdtemp(dir=run)) / "export"
    try:
        export(run / "checkpoint", out, **settings)
    except ValueError:
        return "refused"
    files = {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def hash_case(work: Path, case: str) -> dict[str, Cell]:
    """Sums of a checkpoint and of its exports."""
    run = Path(tempfile.mkdtemp(dir=work))
    make_checkpoint(case, work, run)
    cells = {f"{case}: checkpoint": hash_tensors(run / "checkpoint")}
    for tp, pp in ((1, 1), (2, 1), (4, 1), (2, 2)):
        layout = {"tensor_parallel": tp, "pipeline_parallel": pp, "allow_requantization": True}
        cells[f"{case}: trtllm tp{tp} pp{pp}"] = hash_export(run, mqat.export_trtllm, **layout)
    for style in ("compressed-tensors", "modelopt"):
        cells[f"{case}: {style}"] = hash_export(run, mqat.export_hf, style=style)
    shutil.rmtree(run)
    return cells


def main() -> None:
    """Writes the sums; with `--compare`, prints what differs, and the status is 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--compare", type=Path, help="what an earlier run wrote")
    args = parser.parse_args()
    cells: dict[str, Cell] = {}
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(2) as pool:
        work = Path(directory)
        for family in ("llama", "qwen2", "mistral"):
            write_model(work / family, family)
        (work / "text").write_text("".join(chr(33 + i**3 // 7 % 94) for i in range(8192)), "utf-8")
        for found in pool.map(lambda case: hash_case(work, case), CASES):
            cells |= found
    args.out.write_text(json.dumps(cells, indent=1, sort_keys=True) + "\n", "utf-8")
    print(f"{len(cells)} cells, {list(cells.values()).count('refused')} refused")
    old = json.loads(args.compare.read_text("utf-8")) if args.compare else cells
    pairs = {cell: (old.get(cell), cells.get(cell)) for cell in sorted(old | cells)}
    changed = {cell: pair for cell, pair in pairs.items() if pair[0] != pair[1]}
    for cell, pair in changed.items():
        a, b = (c if isinstance(c, dict) else {f"({c})": ""} for c in pair)
        print(f"{cell}: {', '.join(sorted({name for name, _ in a.items() ^ b.items()}))}")
    sys.exit(1 if changed else 0)


if __name__ == "__main__":
    main()
