"""CUDA's kernels without a GPU: interpreted, compiled for three architectures, refused where they must.

`pytest -s` prints the registers, spills and tensor-core instructions of every kernel. No stack means no
spills; GEMMs are disassembled, too.
"""

import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from mqat.kernels import reference
from mqat.kernels.triton import passes

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is missing: pip install mqat[gpu-check]",
)
SIZES = ("n", "rows", "cols", "inner")
ALIGNED = [["tt.divisibility", 16]]  # pointers and sizes
# Name -> kernel, types of arguments (None where left out), constants or sizes; as passes.py calls it.
RANGE = {"n": "i32", "run": "i32", "low": "fp32", "high": "fp32", "first": "fp32", "last": "fp32"}
ENCODED = {"x": "*bf16", "scale": "*fp32", "mask": "*u8", "nan": "*fp32", **RANGE}
VALUES = {"x": "*bf16", "scale": "*fp32", "out": "*bf16", "mask": "*u8", **RANGE}
DECODED = {"codes": "*i8", "scale": "*fp32", "out": "*bf16", "n": "i32", "run": "i32"}
PRODUCT = {
    "x": "*i8", "w": "*i8", "scale": "*fp32", "row_scale": "*fp32", "out": "*bf16",
    "rows": "i32", "cols": "i32", "inner": "i32",
}  # fmt: skip
KERNELS = {
    "encode int8, tensor": (
        "encode", {**ENCODED, "codes": "*i8"}, {"is_float": False, "per_tensor": True},
    ),
    "encode int8, token + zero": (
        "encode", {**ENCODED, "codes": "*i8", "zero": "*i32"}, {"is_float": False, "per_tensor": False},
    ),
    "encode fp8, tensor": (
        "encode", {**ENCODED, "codes": "*fp8e4nv"}, {"is_float": True, "per_tensor": True},
    ),
    "fake quantize int4, group": ("fake_quantize", VALUES, {"kind": "integer", "per_tensor": False}),
    "fake quantize e2m1, group": ("fake_quantize", VALUES, {"kind": "e2m1", "per_tensor": False}),
    "fake quantize e4m3, group": ("fake_quantize", VALUES, {"kind": "e4m3", "per_tensor": False}),
    "decode int8, channel": ("decode", DECODED, {"per_tensor": False}),
    "decode fp8, channel": ("decode", {**DECODED, "codes": "*fp8e4nv"}, {"per_tensor": False}),
    "apply mask": ("apply_mask", {"x": "*bf16", "mask": "*u8", "n": "i32"}, {}),
    "accumulate": (
        "accumulate", {"total": "*fp32", "x": "*bf16", "mask": "*u8", "scale": "*fp32", "n": "i32"}, {},
    ),
    "int8 GEMM, 64 rows": ("scaled_matmul", PRODUCT, (64, 64)),
    "int8 GEMM": ("scaled_matmul", PRODUCT, (256, 1024)),
    "int8 GEMM, large": ("scaled_matmul", PRODUCT, (8192, 4096)),
}  # fmt: skip
TENSOR_CORES = {80: {"IMMA"}, 90: {"IGMMA"}, 100: {"UTCIMMA"}}  # the last is tcgen05.mma


@needs_triton
def test_interpreted_kernels_equal_the_reference_bit_for_bit():
    """In another process: Triton decides at its import whether it compiles or interprets."""
    tests = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])


def compiled(name, arch, monkeypatch):
    """A kernel as a GPU of this architecture would get it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mqat.kernels.triton import elementwise, int8_gemm

    kernel, types, constants = KERNELS[name]
    options = {}
    if kernel == "scaled_matmul":
        monkeypatch.setattr(passes, "capability", lambda device: divmod(arch, 10))
        tiles = passes._tiles(*constants, torch.device("cuda"))
        options = {key: tiles.pop(key) for key in ("num_warps", "num_stages")}
        constants = {"per_tensor": False, "is_whole": True, "stack": 8, **tiles}
        function = int8_gemm.scaled_matmul
    else:
        constants = {**constants, "tile": passes._BYTES}
        function = getattr(elementwise, kernel)
    names = function.arg_names
    index = {argument: (place,) for place, argument in enumerate(names)}
    source = ASTSource(
        function,
        {argument: types.get(argument, "constexpr") for argument in names},
        {index[a]: constants.get(a) for a in names if a not in types},
        {index[a]: ALIGNED for a, t in types.items() if t.startswith("*") or a in SIZES},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False, **options}
    )


def from_cubin(kernel, directory, tool, *options):
    import triton

    cubin = directory / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, *options, cubin]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(kernel, directory):
    """Registers of a thread, and bytes of its stack: where registers are spilled to."""
    usage = from_cubin(kernel, directory, "cuobjdump", "--dump-resource-usage")
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])


def instructions(kernel, directory):
    """How often each occurs in the machine code."""
    listing = from_cubin(kernel, directory, "nvdisasm", "-c")
    return Counter(re.findall(r"^\s+/\*\w+\*/\s+(?:@!?\w+\s+)?([A-Z]\w+)", listing, re.M))


@needs_triton
@pytest.mark.parametrize("arch", TENSOR_CORES)
def test_kernels_compile_without_spills_and_multiply_on_tensor_cores(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    print(f"\n{f'sm_{arch}':26} registers  bytes spilled  tensor cores")
    for name in KERNELS:
        if ("fp8" in name or "e4m3" in name) and divmod(arch, 10) < passes._FP8_UNITS:
            continue  # never launched there
        kernel = compiled(name, arch, monkeypatch)
        registers, spilled = resources(kernel, tmp_path)
        products = {}
        if "GEMM" in name:  # half a second each
            counts = instructions(kernel, tmp_path)
            assert counts["EXIT"] and not counts["LDL"] + counts["STL"], name
            products = {key: n for key, n in counts.items() if key.endswith("MMA")}
            assert set(products) == TENSOR_CORES[arch], name
        shown = ", ".join(f"{n} {key}" for key, n in products.items())
        print(f"{name:26} {registers:9} {spilled:14}  {shown}")
        assert spilled == 0, name
        assert "div.full" not in kernel.asm["ptx"] and "fma" not in kernel.asm["ptx"], name


@needs_triton
def test_spills_are_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    big = {"tile_rows": 128, "tile_cols": 128, "tile_inner": 64, "num_warps": 4, "num_stages": 4}
    monkeypatch.setattr(passes, "_tiles", lambda *_: dict(big))
    kernel = compiled("int8 GEMM", 80, monkeypatch)
    counts, (registers, spilled) = instructions(kernel, tmp_path), resources(kernel, tmp_path)
    assert counts["LDL"] > 0 and counts["STL"] > 0 and registers == 255 and spilled > 0


@pytest.fixture
def warnings(monkeypatch, caplog):
    """Of a machine with an old or a new GPU, on whose behalf tensors of the CPU are taken."""
    caplog.set_level(logging.WARNING, logger=passes.__name__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the GPU here")
    for cached in (passes._is_served, passes.has_fp8_units):
        cached.cache_clear()
    yield caplog
    for cached in (passes._is_served, passes.has_fp8_units):
        cached.cache_clear()


def encode_twice(name):
    x, scale = torch.randn(16, 32), torch.tensor([0.02])
    arguments = (x, scale, None, name, "tensor", None, True)
    expected = reference.encode(*arguments)
    for _ in range(2):
        for a, b in zip(passes.encode(*arguments), expected, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_without_triton_the_reference_serves_after_one_warning(monkeypatch, warnings):
    monkeypatch.setattr(passes, "capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    encode_twice("int8")
    (message,) = warnings.messages
    assert "twice the time" in message and "pip install triton" in message


def test_a_gpu_too_old_is_named_and_the_reference_serves(monkeypatch, warnings):
    monkeypatch.setattr(passes, "capability", lambda device: (7, 5))
    encode_twice("int8")
    (message,) = warnings.messages
    assert "the GPU here" in message and "8.0" in message


def test_fp8_on_a_gpu_without_it_is_told_what_to_use(monkeypatch, warnings):
    monkeypatch.setattr(passes, "capability", lambda device: (8, 0))
    encode_twice("fp8_e4m3")
    (message,) = warnings.messages
    assert "the GPU here" in message and "int8_pc_pt" in message


@pytest.mark.parametrize("cols", [1, 48])
@pytest.mark.parametrize("rows", [None, 32])
def test_fp8_products_are_torchs_with_the_scales_in_place(rows, cols, monkeypatch):
    monkeypatch.setattr(passes, "has_fp8_units", lambda device: True)
    monkeypatch.setattr(passes, "_is_served", lambda device: False)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 64, generator=generator).to(torch.float8_e4m3fn) for n in (32, 48))
    scale = torch.rand(cols, generator=generator) + 0.5
    row_scale = None if rows is None else torch.rand(rows, generator=generator) + 0.5
    expected = reference.scaled_matmul(x, w, scale, row_scale, torch.float32)
    multiplied = []
    scaled_mm = torch._scaled_mm
    monkeypatch.setattr(
        torch,
        "_scaled_mm",
        lambda *args, **kwargs: multiplied.append(1) or scaled_mm(*args, **kwargs),
    )
    found = passes.scaled_matmul(x, w, scale, row_scale, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and multiplied == [1]
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-3)  # one bfloat16 step
    for a, b in ((x, w[:40]), (x[:, :24], w[:, :24])):  # what it does not take
        short = scale[: len(b)]
        expected = reference.scaled_matmul(a, b, short, row_scale, torch.bfloat16)
        assert torch.equal(passes.scaled_matmul(a, b, short, row_scale, torch.bfloat16), expected)
    assert multiplied == [1]


def test_the_backend_is_imported_where_triton_is_missing():
    assert "import triton" not in Path(passes.__file__).read_text()
