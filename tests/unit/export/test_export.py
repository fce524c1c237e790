"""`export_trtllm` as a whole: same bytes however it is run, and nothing half-written."""

import json
import os
import random
import shutil
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mqat.export.export import export_trtllm
from mqat.quant.functional import fake_quantize
from tests.unit.export.checkpoints import (
    EXPORTABLE,
    TINY,
    UNTIED,
    all_layers,
    tensors_of,
    write_checkpoint,
)
from tests.unit.export.test_writer import largest_file

pytestmark = pytest.mark.filterwarnings("ignore:W8A16 checkpoints hold unquantized weights")


def contents(directory):
    files = (f for f in directory.rglob("*") if f.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def export(checkpoint, out, tp=1, pp=1, **kwargs):
    kwargs = {"allow_requantization": True} | kwargs
    export_trtllm(checkpoint, out, tensor_parallel=tp, pipeline_parallel=pp, **kwargs)
    return contents(out)


@pytest.mark.parametrize("algorithm", EXPORTABLE)
def test_how_the_checkpoint_was_cut_does_not_change_a_byte(algorithm, tiny, tmp_path):
    cut = write_checkpoint(tmp_path / "cut", TINY, all_layers(algorithm), cuts=3)
    whole = export(tiny(algorithm), tmp_path / "a", tp=4, pp=2)
    assert export(cut, tmp_path / "b", tp=4, pp=2) == whole
    assert len(whole) == 8 + 1 + 2  # rank files, config.json, tokenizer with a subdirectory


class Threads:
    """`raise_on_any_rank` for a few threads, with the contract of the one in `mqat.runtime.groups`."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=60)
        self.errors = [None] * size
        self.results = [None] * size

    def raise_on_any_rank(self, rank):
        def agree_(error):
            self.errors[rank] = error
            self.barrier.wait()
            first = next((e for e in self.errors if e is not None), None)
            self.barrier.wait()
            if first is not None:
                raise ValueError(str(first)) from error

        return agree_

    def run(self, work):
        def one(rank):
            try:
                work(rank, len(self.results), self.raise_on_any_rank(rank))
            except ValueError as error:
                self.results[rank] = str(error)

        threads = [
            threading.Thread(target=one, args=(rank,), daemon=True)
            for rank in range(len(self.results))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive(), "a rank hangs"
        return self.results


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_in_parallel_write_the_same_bytes_as_one_process(size, tiny, tmp_path):
    alone = export(tiny("int4"), tmp_path / "alone", tp=2, pp=2)

    def work(rank, world_size, raise_on_any_rank):
        export(
            tiny("int4"), tmp_path / "together", tp=2, pp=2,
            rank=rank, world_size=world_size, raise_on_any_rank=raise_on_any_rank,
        )  # fmt: skip

    assert Threads(size).run(work) == [None] * size
    assert contents(tmp_path / "together") == alone


def damage(checkpoint, pattern="*.distcp"):
    file = next(iter(checkpoint.glob(pattern)))
    file.write_bytes(file.read_bytes()[:-1] + b"!")  # only rank 0 compares checksums


def occupy(out):
    out.mkdir()


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (lambda checkpoint, out: damage(checkpoint), "do not match the checksum"),
        (lambda checkpoint, out: damage(checkpoint, ".metadata"), "do not match the checksum"),
        (lambda checkpoint, out: damage(checkpoint, "tokenizer/*"), "do not match the checksum"),
        (lambda checkpoint, out: occupy(out), "exists already"),
        (lambda checkpoint, out: out.parent.joinpath(".out.tmp").write_text(""), "writing failed"),
    ],
)
def test_all_ranks_raise_the_same_error_and_none_hangs(setup, message, tiny, tmp_path):
    checkpoint, out = shutil.copytree(tiny("int8"), tmp_path / "checkpoint"), tmp_path / "x" / "out"
    out.parent.mkdir()
    setup(checkpoint, out)

    def work(rank, world_size, raise_on_any_rank):
        export(
            checkpoint,
            out,
            tp=2,
            rank=rank,
            world_size=world_size,
            raise_on_any_rank=raise_on_any_rank,
        )

    first, second = Threads(2).run(work)
    assert first is not None and message in first
    assert first == second
    assert not (out / "config.json").exists()


def test_a_disk_that_fills_up_leaves_nothing(tiny, tmp_path):
    out = tmp_path / "x" / "out"
    with largest_file(1 << 20), pytest.raises(ValueError, match="is the disk full"):
        export(tiny("int8"), out)
    assert list(out.parent.iterdir()) == []


def test_damage_explains_whatever_else_failed_and_leaves_nothing(tiny, tmp_path):
    checkpoint = shutil.copytree(tiny("int8"), tmp_path / "checkpoint")
    damage(checkpoint)
    (checkpoint / "tokenizer" / "extra").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="do not match the checksum"):
        export(checkpoint, tmp_path / "x" / "out")
    assert list((tmp_path / "x").iterdir()) == []


def test_a_tokenizer_that_cannot_be_copied_leaves_nothing(tiny, tmp_path):
    checkpoint = shutil.copytree(tiny("int8"), tmp_path / "checkpoint")
    (checkpoint / "tokenizer" / "extra").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="extra: writing failed"):
        export(checkpoint, tmp_path / "x" / "out")
    assert list((tmp_path / "x").iterdir()) == []


def fork():
    """0 in the child, which lacks the parent's OpenMP threads and would wait for them."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
    return child


def test_killed_at_any_moment_the_target_is_absent_or_complete(tiny, tmp_path):
    complete = export(tiny("int8"), tmp_path / "reference", tp=2)
    started = time.perf_counter()
    export(tiny("int8"), tmp_path / "timed", tp=2)
    duration = time.perf_counter() - started
    out = tmp_path / "x" / "out"
    choose = random.Random(0)
    for _ in range(12):
        child = fork()
        if child == 0:
            export_trtllm(tiny("int8"), out, tensor_parallel=2, overwrite=True)
            os._exit(0)
        time.sleep(choose.uniform(0, 1.2 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():
            assert contents(out) == complete
    assert export(tiny("int8"), out, tp=2, overwrite=True) == complete
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("step", ["write", "rename_old", "rename_new"])
def test_killed_at_each_step_of_replacing_an_export(step, tiny, tmp_path, monkeypatch):
    out = tmp_path / "x" / "out"
    old = export(tiny("null"), out)
    child = fork()
    if child == 0:
        from pathlib import Path

        rename, renames = Path.rename, []

        def dying_rename(self, target):
            renames.append(target)
            if len(renames) == {"rename_old": 1, "rename_new": 2}.get(step):
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        def dying_fsync(handle):
            if step == "write":
                os.kill(os.getpid(), signal.SIGKILL)

        Path.rename, os.fsync = dying_rename, dying_fsync
        export_trtllm(tiny("int8"), out, tensor_parallel=1, overwrite=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)  # control: the child died where it was meant to
    assert not out.exists() or contents(out) == old
    export(tiny("int8"), out, overwrite=True)
    assert list(out.parent.iterdir()) == [out]


def test_the_tokenizer_cannot_overwrite_the_config(tiny, tmp_path):
    checkpoint = shutil.copytree(tiny("null"), tmp_path / "checkpoint")
    (checkpoint / "tokenizer" / "config.json").write_text("not ours")
    export(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_unquantized_tensors_are_the_checkpoints_rounded_once(dtype, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", UNTIED, {})
    export(checkpoint, tmp_path / "out", dtype=dtype)
    saved, served = tensors_of(UNTIED, {}), load_file(tmp_path / "out" / "rank0.safetensors")
    kind = getattr(torch, dtype)
    vocab = UNTIED.vocab_size
    assert torch.equal(served["lm_head.weight"], saved["output_layer.weight"][:vocab].to(kind))
    down = saved["decoder.layers.mlp.linear_fc2.weight"][3]
    assert torch.equal(served["transformer.layers.3.mlp.proj.weight"], down.to(kind))


def test_a_tied_head_is_written_in_full(tiny, tmp_path):
    export(tiny("null"), tmp_path / "out")
    served = load_file(tmp_path / "out" / "rank0.safetensors")
    assert torch.equal(served["lm_head.weight"], served["transformer.vocab_embedding.weight"])


def int4_by_bits(packed):
    """Codes of bytes, one at a time: slow, and nothing to do with the product's code."""
    rows = []
    for row in packed.tolist():
        low, high = zip(*((byte % 16, byte // 16 % 16) for byte in row), strict=True)
        rows += [[code - 16 if code > 7 else code for code in part] for part in (low, high)]
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("algorithm", ["int8", "int8_wo", "int4", "fp8"])
def test_train_equals_deploy_bit_for_bit(algorithm, tiny, tmp_path):
    """The served down projection, dequantized by hand, is the weight that training multiplied by."""
    export(tiny(algorithm), tmp_path / "out", tp=2, dtype="float32")
    state = tensors_of(TINY, all_layers(algorithm))
    name = "decoder.layers.1.mlp.linear_fc2"
    scheme = all_layers(algorithm)[name].weight
    trained = fake_quantize(
        state["decoder.layers.mlp.linear_fc2.weight"][1],
        state[f"quantizers.{name}.weight_scale"],
        scheme.format,
        scheme.granularity,
    )
    parts = []
    for rank in range(2):
        file = load_file(tmp_path / "out" / f"rank{rank}.safetensors")
        weight = file["transformer.layers.1.mlp.proj.weight"]
        scale = file.get("transformer.layers.1.mlp.proj.weights_scaling_factor")
        if algorithm == "int4":
            weight, scale = int4_by_bits(weight), scale.repeat_interleave(64, dim=1)
        elif algorithm == "int8":
            scale = scale[:, None]
        parts.append(weight.float() if scale is None else weight.float() * scale)
    assert torch.equal(torch.cat(parts, dim=1), trained)


def test_scales_are_the_frozen_ones_although_the_weights_moved_on(tiny, tmp_path):
    export(tiny("int8"), tmp_path / "out")
    served = load_file(tmp_path / "out" / "rank0.safetensors")
    state = tensors_of(TINY, all_layers("int8"))
    frozen = state["quantizers.decoder.layers.0.mlp.linear_fc2.weight_scale"]
    assert torch.equal(served["transformer.layers.0.mlp.proj.weights_scaling_factor"], frozen)
    weight = state["decoder.layers.mlp.linear_fc2.weight"][0]
    assert not torch.equal(weight.abs().amax(dim=1) / 127, frozen)  # control: recomputing differs


@pytest.mark.parametrize(
    ("algorithm", "operand"), [("int4", "weight"), ("fp8", "weight"), ("fp8", "input")]
)
def test_float16_that_cannot_hold_a_scale_is_refused(algorithm, operand, tmp_path):
    layers = all_layers(algorithm)
    tensors = tensors_of(TINY, layers)
    name = f"quantizers.decoder.layers.0.mlp.linear_fc2.{operand}_scale"
    tensors[name].flatten()[0] = 1.5390625 * 2.0**-22  # of bfloat16, below float16's normal numbers
    checkpoint = write_checkpoint(tmp_path / "checkpoint", TINY, layers, tensors=tensors)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.linear_fc2: scales do not fit"):
        export(checkpoint, tmp_path / "x" / "out", dtype="float16")
    assert not (tmp_path / "x").exists()  # nothing was begun
    export(checkpoint, tmp_path / "x" / "out", dtype="bfloat16")


def test_an_unknown_dtype_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"export\.dtype='bf16': must be one of bfloat16"):
        export(tiny("null"), tmp_path / "out", dtype="bf16")


def test_a_bfloat16_checkpoint_exports_in_every_dtype(tmp_path):
    layers = all_layers("int8_wo")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", TINY, layers, dtype=torch.bfloat16)
    for dtype in ("float32", "bfloat16", "float16"):
        export(checkpoint, tmp_path / dtype, dtype=dtype)


def test_ranks_of_padding_alone_are_written(tmp_path):
    model = replace(TINY, vocab_size=5)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model, {})
    export(checkpoint, tmp_path / "out", tp=4)
    last = load_file(tmp_path / "out" / "rank3.safetensors")["lm_head.weight"]
    assert last.shape == (2, 256) and not last.any()
