"""Compiles `kernels.cpp` for this CPU at the first use, and loads it.

One second once per machine and version; the library is kept in the user's cache directory. Without a C++
compiler there is none, and callers take torch's own operations instead.
"""

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_logger = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("kernels.cpp")
_COMPILERS = ("c++", "g++")
# No contraction into fused multiply-adds: each operation rounds as torch's does.
_FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
)  # fmt: skip

_P, _I, _N, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_U = ctypes.c_uint32
_SIGNATURES = {
    "encode": (_P, _P, _P, _N, _N, _P, _P, _P, _P, _I),
    "fake_quantize": (_P, _P, _N, _N, _P, _P, _P, _I),
    "decode": (_P, _I, _P, _P, _N, _N, _P, _I),
    "scale_ints": (_P, _N, _N, _P, _N, _P, _P, _I),
    "scale_floats": (_P, _N, _N, _P, _N, _P, _P, _I),
    "scale_halves": (_P, _N, _N, _P, _N, _P, _P, _I),
    "apply_mask": (_P, _N, _P, _P, _I),
    "accumulate": (_P, _N, _P, _P, _P, _I),
    "stochastic_rows": (_P, _P, _P, _N, _N, _U, _I, _F, _P, _P, _I),
    "stochastic_columns": (_P, _P, _P, _N, _N, _U, _I, _F, _P, _P, _I),
    "swiglu": (_P, _N, _N, _P, _I),
    "swiglu_encode": (_P, _P, _N, _N, _P, _P, _P, _P, _I),
    "swiglu_backward": (_P, _P, _P, _N, _N, _P, _I),
    "rms_norm": (_P, _P, _N, _N, _F, _P, _P, _I),
    "rms_norm_backward": (_P, _P, _P, _P, _N, _N, _P, _P, _I),
}
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _cpu_features() -> str:
    """What `-march=native` depends on: caches may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"


def _cache_directory() -> Path:
    """Of this user; where there is none to write to, a new one that is removed with the process."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(home) / "mqat"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        directory = Path()
    if directory == Path() or not os.access(directory, os.W_OK):
        directory = Path(tempfile.mkdtemp(prefix="mqat-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _compile(compiler: str, target: Path) -> None:
    """Writes under a temporary name first: several ranks may do so at once."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        made = Path(directory) / target.name
        # Without -lgomp: torch has loaded its OpenMP runtime already, and one process needs only one.
        objects = Path(directory) / "kernels.o"
        compiled = [compiler, *_FLAGS, "-fopenmp", "-c", str(_SOURCE), "-o", str(objects)]
        linked = [compiler, "-shared", str(objects), "-o", str(made)]
        for command in (compiled, linked):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(made, target)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None, with one line in the log, where they cannot be built."""
    compiler = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        _logger.warning("no C++ compiler: passes around quantized GEMMs run in torch, slower")
        return None
    try:
        key = "\n".join([_SOURCE.read_text(), *_FLAGS, compiler, _cpu_features()])
        target = _cache_directory() / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if not target.exists():
            _compile(compiler, target)
        loaded = ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        _logger.warning("kernels.cpp could not be built, torch is used instead: %s", reason)
        return None
    for name, arguments in _SIGNATURES.items():
        for suffix in SUFFIXES.values():
            function = getattr(loaded, f"mqat_{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
    return loaded
