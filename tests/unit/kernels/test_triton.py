"""CUDA's kernels without a GPU: interpreted, compiled for three architectures, refused where they must.

`pytest -s` prints the registers, spills and tensor-core instructions of every kernel. No stack means no
spills; GEMMs are disassembled, too.
"""

import importlib.metadata
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from mqat.kernels import operators, reference
from mqat.kernels.triton import passes


def why_not() -> str:
    """Why kernels cannot be checked here; empty if they can."""
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is missing: pip install mqat[gpu-check]"
    is_old = tuple(int(part) for part in found.split(".")[:2]) < (3, 8)
    return f"Triton {found}: before 3.8 its interpreter cannot multiply integers" if is_old else ""


needs_triton = pytest.mark.skipif(bool(why_not()), reason=why_not())
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


class StubDriver:
    """Of a GPU that is not there: enough for Triton to compile what is launched."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch  # compiled kernels are kept by device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Called with an architecture: the kernels that passes.py launches there, by what they do."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels, run, before = [], JITFunction.run, dict(vars(driver))

    def compile_only(self, *arguments, warmup, **options):
        kernels.append(run(self, *arguments, warmup=True, **options))

    def launched(arch):
        driver.set_active(StubDriver(arch))
        monkeypatch.setattr(passes, "capability", lambda device: divmod(arch, 10))
        named = []
        for name, call in launches(divmod(arch, 10) >= passes._FP8_UNITS).items():
            call()
            named += [(name, kernel) for kernel in kernels]
            kernels.clear()
        return named

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(passes, "_is_served", lambda device: True)
    yield launched
    vars(driver).clear()  # its own way back looks for a GPU
    vars(driver).update(before)


def multiply(rows, cols):
    a, b = (torch.empty(n, 1024, dtype=torch.int8) for n in (rows, cols))
    scales = torch.ones(cols), torch.ones(rows)
    return lambda: passes.scaled_matmul(a, b, *scales, torch.bfloat16)


def launches(with_fp8):
    """One call of passes.py for every kernel, as training makes it."""
    x, one, steps = torch.ones(64, 128, dtype=torch.bfloat16), torch.ones(1), torch.ones(64)
    bits, blocks = torch.full((1024,), 255, dtype=torch.uint8), torch.ones(64, 8)
    zero, total = torch.ones(64, dtype=torch.int32), torch.ones(64, 128)
    codes = {"int8": torch.ones(64, 128, dtype=torch.int8), "fp8": x.to(torch.float8_e4m3fn)}

    def encode(name, granularity, scale, zero=None):
        return lambda: passes.encode(x, scale, zero, name, granularity, None, zero is None)

    def fake_quantize(name):
        return lambda: passes.fake_quantize_with_mask(x, blocks, name, "group:16", None)

    def decode(name):
        return lambda: passes.decode(codes[name], steps, None, "channel", torch.bfloat16)

    def swiglu_encode(name):
        return lambda: passes.swiglu_encode(x, one, name, None, True)

    def stochastic(name, function):
        wide = torch.ones(256, 512, dtype=torch.bfloat16)
        columns = torch.arange(512, dtype=torch.int32)
        return lambda: function(wide, None, columns, name, 5)

    calls = {
        "encode int8, tensor": encode("int8", "tensor", one),
        "encode int8, token + zero": encode("int8_full", "token", steps, zero),
        "encode fp8, tensor": encode("fp8_e4m3", "tensor", one),
        "fake quantize int4, group": fake_quantize("int4"),
        "fake quantize e2m1, group": fake_quantize("fp4_e2m1"),
        "fake quantize fp8, group": fake_quantize("fp8_e4m3"),
        "decode int8, channel": decode("int8"),
        "decode fp8, channel": decode("fp8"),
        "swiglu": lambda: passes.swiglu(x),
        "swiglu, encode int8": swiglu_encode("int8"),
        "swiglu, encode fp8": swiglu_encode("fp8_e4m3"),
        "swiglu, backward": lambda: passes.swiglu_backward(x[:, :64].contiguous(), x, bits[:512]),
        "apply mask": lambda: passes.apply_mask_(x, bits, None),
        "accumulate": lambda: passes.accumulate_(total, x, bits, one),
        "stochastic int8, rows": stochastic("int8", passes.stochastic_rows),
        "stochastic e4m3, columns": stochastic("fp8_e4m3", passes.stochastic_columns),
        "int8 GEMM, 64 rows": multiply(64, 256),
        "int8 GEMM": multiply(256, 1024),
        "int8 GEMM, large": multiply(2048, 4096),
    }
    return {name: call for name, call in calls.items() if with_fp8 or "fp8" not in name}


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
def test_kernels_compile_without_spills_and_multiply_on_tensor_cores(arch, compiled, tmp_path):
    print(f"\n{f'sm_{arch}':26} registers  bytes spilled  tensor cores")
    for name, kernel in compiled(arch):
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
        # sm_80 spells the product of two bfloat16 numbers, exact before it is rounded, a * b + -0.
        fused = re.search(r"fma\.rn\.(?!bf16)", kernel.asm["ptx"])
        assert "div.full" not in kernel.asm["ptx"] and fused is None, name


@needs_triton
def test_spills_are_seen(compiled, tmp_path, monkeypatch):
    big = {"tile_rows": 128, "tile_cols": 128, "tile_inner": 64, "num_warps": 4, "num_stages": 4}
    monkeypatch.setattr(passes, "_tiles", lambda *_: dict(big))
    monkeypatch.setitem(globals(), "launches", lambda _: {"int8 GEMM": multiply(256, 1024)})
    ((_, kernel),) = compiled(80)
    counts, (registers, spilled) = instructions(kernel, tmp_path), resources(kernel, tmp_path)
    assert counts["LDL"] > 0 and counts["STL"] > 0 and registers == 255 and spilled > 0


@pytest.fixture
def warnings(monkeypatch, caplog):
    """Of a machine with an old or a new GPU, on whose behalf tensors of the CPU are taken."""
    caplog.set_level(logging.WARNING, logger=passes.__name__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the GPU here")
    asked = passes._is_served, passes.has_fp8_units
    for cached in asked:
        cached.cache_clear()
    yield caplog
    for cached in asked:
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
    monkeypatch.setattr(passes, "_is_served", lambda device: True)
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


def test_cuda_has_these_kernels_and_the_reference_for_the_rest():
    def is_own(name):
        operator = getattr(operators.torch.ops.mqat, name).default
        return operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA)

    assert is_own("encode") and is_own("swiglu_encode") and not is_own("rms_norm")


def test_the_backend_is_imported_where_triton_is_missing():
    assert "import triton" not in Path(passes.__file__).read_text()
