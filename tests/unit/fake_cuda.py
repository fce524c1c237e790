"""Fake CUDA tensors on a machine without a GPU, and a ledger of what their operations would move.

`FakeTensorMode` computes shapes, dtypes and devices only. It raises where an operation mixes devices,
and where the host would have to wait for a number of the device; the ledger raises where it would wait
for a copy.

A CPU build of torch has no CUDA device guard, which indexing and autograd's nodes ask for:
`install_guard` compiles one that does nothing. Autograd's engine still finds no accelerator, so
`backward` walks the recorded graph itself, calling each node as the engine would.
"""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mqat.kernels import reference
from mqat.kernels.triton import passes
from mqat.quant.formats import FORMATS, FP4_E2M1

CUDA = torch.device("cuda", 0)
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}
"""
_ALLOCATIONS = {
    "empty.memory_format", "empty_like.default", "empty_strided.default", "new_empty.default",
    "new_empty_strided.default", "_unsafe_view.default", "lift_fresh.default",
}  # fmt: skip
_OVERWRITES = {"copy_.default", "zero_.default", "fill_.Scalar", "fill_.Tensor"}
_GEMMS = {"mm", "addmm", "bmm", "_int_mm", "_scaled_mm"}


@functools.cache
def install_guard(directory: Path) -> None:
    """Gives torch a CUDA device guard, for the rest of the process; skips without a C++ compiler."""
    if torch.cuda.is_available():
        return
    compiler = next(filter(None, map(shutil.which, ("c++", "g++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler here, which fake CUDA tensors need for a device guard")
    source, target, home = (
        directory / "guard.cpp",
        directory / "guard.so",
        Path(torch.__file__).parent,
    )
    source.write_text(_GUARD)
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-std=c++20",
        abi,
        f"-I{home / 'include'}",
        str(source),
    ]
    subprocess.run([*command, "-o", str(target), f"-L{home / 'lib'}", "-lc10"], check=True)
    ctypes.CDLL(str(target), ctypes.RTLD_GLOBAL)


@dataclass(frozen=True)
class Pass:
    """One kernel: its operation, bytes read and written, and FLOPs of a GEMM."""

    name: str
    num_bytes: int
    flops: int = 0

    @property
    def is_gemm(self) -> bool:
        """Whether it multiplies matrices."""
        return self.flops > 0


def _num_bytes(x: Tensor) -> int:
    """Of the memory behind a tensor: what is broadcast is read once."""
    touched = math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return touched * x.element_size() if x.numel() else 0


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [x for value in values for x in _tensors(value)]
    return []


class HostWaitsError(AssertionError):
    """A copy between host and device that the host waits for."""


def _refuse_waiting(name: str, args: Any, kwargs: Any, out: Any) -> None:
    if name not in ("aten._to_copy.default", "aten.copy_.default"):
        return
    source = args[1] if name.startswith("aten.copy_") else args[0]
    is_waited_for = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
    if source.device != out.device and is_waited_for:
        raise HostWaitsError(f"{name}: {source.device} -> {out.device} of {tuple(source.shape)}")


def _is_one_kernel(name: str, args: Any) -> bool:
    """Whether the CUDA backend serves an operator and these arguments."""
    if not hasattr(passes, name):
        return False
    formats = [FORMATS[x] for x in args if isinstance(x, str) and x in FORMATS]
    is_arithmetic = all(not fmt.levels or fmt == FP4_E2M1 for fmt in formats)
    return is_arithmetic and all(x.is_contiguous() for x in _tensors(list(args)))


def _is_composite(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


class Ledger(TorchDispatchMode):
    """Records every kernel; an operator of mqat counts as one where its CUDA backend makes that true.

    Elsewhere the torch code of `reference` counts, as it runs there: with `decomposed` everywhere,
    which is CUDA without Triton.
    """

    def __init__(self, *, decomposed: bool = False) -> None:
        super().__init__()
        self.decomposed = decomposed
        self.passes: list[Pass] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func.name().split("::")
        plain = getattr(reference, name.split(".")[0], None) if namespace == "mqat" else None
        if plain is not None and (self.decomposed or not _is_one_kernel(plain.__name__, args)):
            with self:
                return plain(*args, **kwargs)
        # Inside of that, operations arrive that autograd would have taken apart before.
        if namespace == "aten" and _is_composite(func.name()):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        _refuse_waiting(str(func), args, kwargs, out)
        schema = func._schema
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if namespace == "prim" or is_view or str(func).removeprefix("aten.") in _ALLOCATIONS:
            return out
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        read, written = 0, sum(map(_num_bytes, _tensors(out)))
        for argument in schema.arguments:
            tensors = _tensors(given.get(argument.name))
            is_changed = argument.alias_info is not None and argument.alias_info.is_write
            overwrites = str(func).removeprefix("aten.") in _OVERWRITES
            if not (is_changed and (argument.kwarg_only or overwrites)):
                read += sum(map(_num_bytes, tensors))
            if is_changed and not schema.returns:
                written += sum(map(_num_bytes, tensors))
        flops = 0
        if name.split(".")[0] in _GEMMS or (namespace == "mqat" and "matmul" in name):
            product = _tensors(out)[0]
            inner = next(x for x in _tensors(list(args)) if x.dim() >= 2).shape[-1]
            flops = 2 * product.numel() * inner
        self.passes.append(Pass(name, read + written, flops))
        return out


def backward(output: Tensor, grad: Tensor) -> dict[Tensor, Tensor]:
    """Gradients of the leaves, as autograd's engine would compute them, one node at a time."""
    if output.grad_fn is None:
        return {output: grad}
    waiting: Counter[Any] = Counter()
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        children = [child for child, _ in node.next_functions if child is not None]
        waiting.update(children)
        stack += children
    received: dict[Any, dict[int, Tensor]] = {output.grad_fn: {output.output_nr: grad}}
    ready, leaves = [output.grad_fn], {}
    while ready:
        node = ready.pop()
        grads = received.pop(node, {})
        if hasattr(node, "variable"):
            leaves[node.variable] = grads[0]
            continue
        ordered = [grads.get(i) for i in range(max(grads, default=0) + 1)]
        with torch.no_grad():
            results = node.apply(*ordered) if hasattr(node, "apply") else node(*ordered)
        results = results if isinstance(results, tuple) else (results,)
        for (child, slot), value in zip(node.next_functions, results, strict=False):
            if child is None:
                continue
            if value is not None:
                held = received.setdefault(child, {})
                held[slot] = value if slot not in held else held[slot] + value
            waiting[child] -= 1
            if not waiting[child]:
                ready.append(child)
    return leaves


def to_fake_cuda_(module: nn.Module) -> None:
    """Replaces parameters, buffers and other tensors by fake ones on CUDA; inside a `FakeTensorMode`."""

    def fake(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=CUDA)

    for part in module.modules():
        held = {name: x for name, x in vars(part).items() if isinstance(x, Tensor)}
        vars(part).update({name: fake(x) for name, x in held.items()})
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(fake(parameter), parameter.requires_grad)
                vars(part._parameters[name]).update(vars(parameter))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake(buffer)


@contextmanager
def fake_cuda(ledger: Ledger | None = None) -> Iterator[None]:
    """Inside, tensors are fake and on CUDA where they say so."""
    with FakeTensorMode(), ledger or nullcontext():
        yield
