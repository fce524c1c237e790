"""Lets unmodified Megatron-Core train on CPU over gloo. Never imported on CUDA.

The only place in mqat that replaces functions of other packages.

| what Megatron does                            | what happens here                                 |
|-----------------------------------------------|---------------------------------------------------|
| `device=torch.cuda.current_device()`          | that function returns `torch.device("cpu")`       |
| `torch.cuda.synchronize()`, `set_device(...)` | no-ops                                            |
| `torch.cuda.current_stream()`                 | the CPU's, which waits for nothing                |
| `tensor.cuda()`                               | returns the tensor                                |
| factories with a literal `device="cuda"`      | those modules get a `torch` whose factories say   |
|                                               | "cpu" (`_TorchOnCpu`)                             |
| `pin_memory=True` in a factory of those       | left out: nothing is copied to a device           |
| `param.type() == "torch.cuda.FloatTensor"`    | `Tensor.type()` says so to Megatron's optimizer   |
| `jit_fuser = torch.compile`                   | its small functions stay uncompiled               |
| CUDA RNG tracker (dropout, initialization)    | the CPU generator's state                         |
| `torch.cuda.Stream()`, `stream(...)` and      | the CPU's stream, and a stream that copies at     |
| events of token dispatchers                   | once                                              |
| split sizes of an all-to-all left as tensors  | numbers, as they become when copied off a device  |
| gathers and reduce-scatters of ranks with      | an all-gather filled up to the largest, and an    |
| other numbers of tokens, which gloo lacks     | all-reduce                                        |
| `te_general_gemm` without Transformer Engine  | None, for which routers multiply with torch       |

Other collectives need no bridge: gloo has all that Megatron uses, 64-bit integers included.

Nothing is paid per tensor operation: over four processes each, the fastest add, empty, mul_, zeros,
view and matmul of 8 numbers took 0.98 to 1.05 of the time without this file, as much as such runs differ
among themselves; a `TorchFunctionMode`, the shorter way to write this, takes 2.0 to 2.4 times as long.

Not bridged: CUDA streams and events elsewhere (FSDP, offloading, CUDA graphs, several optimizer
instances), grouped GEMMs and Mamba kernels, persistent asynchronous checkpoint writers.
`overlap_p2p_comm` together with
`deallocate_pipeline_outputs` gives wrong numbers: Megatron frees a tensor that gloo is still sending,
which is safe only where the allocator follows the stream.
"""

import contextlib
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "empty_like", "zeros_like", "arange")

# Modules of the training path that name the device "cuda" literally.
_LITERAL_CUDA = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.rerun_state_machine",
    "megatron.core.tensor_parallel.data",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)


class _TorchOnCpu(types.ModuleType):
    """`torch`, except that factory calls asking for CUDA get a CPU tensor."""

    def __init__(self) -> None:
        super().__init__("torch")
        vars(self).update(vars(torch))  # looked up at once; `__getattr__` is for later imports
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def create(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _no_op() -> Callable[..., None]:
    """A new function each time: torch.compile's rule table refuses one object under two names."""
    return lambda *args, **kwargs: None


def _bridge_cuda_functions() -> None:
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = _no_op()
    torch.cuda.set_device = _no_op()
    torch.cuda.empty_cache = _no_op()
    torch.cuda.current_stream = lambda device=None: torch.cpu.current_stream()  # type: ignore
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    torch.cuda.get_rng_state = lambda device="cpu": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cpu": torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore


def _bridge_type_names() -> None:
    """The optimizer sorts parameters by type name and accepts only CUDA ones."""
    original = torch.Tensor.type

    def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = original(self) if dtype is None else original(self, dtype, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if dtype is None and caller.startswith("megatron.core.optimizer"):
            return str(result).replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = tensor_type  # type: ignore[method-assign, assignment]


def _bridge_rng_tracker() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")

    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


class _CopyStream:
    """Where a token dispatcher copies its counts to the host: on a CPU they are there."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def record_event(self) -> "_CopyStream":
        """An event that has happened."""
        return self

    def synchronize(self) -> None:
        """Nothing to wait for."""


class _CudaOfDispatchers(types.ModuleType):
    """`torch.cuda` with streams that a CPU has."""

    Stream = _CopyStream

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def stream(stream: Any) -> Any:
        return contextlib.nullcontext()


def _bridge_token_dispatchers() -> None:
    """Routers and dispatchers of mixtures of experts, where a CPU has no streams to copy on."""
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    if not utils.HAVE_TE:
        utils.te_general_gemm = None

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    dispatcher.maybe_move_tensor_to_cpu = to_host
    with_streams = _TorchOnCpu()
    with_streams.cuda = _CudaOfDispatchers("torch.cuda")
    dispatcher.torch = with_streams


def _bridge_uneven_collectives() -> None:
    """Between ranks that share each of several experts: some have more tokens for them than others."""
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(
        x: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if sizes is None or group.size() == 1:
            return gather(x, group, sizes, use_global_buffer)
        filled = x.new_zeros(max(sizes), *x.shape[1:])
        filled[: len(x)] = x
        whole = x.new_empty(len(sizes) * len(filled), *x.shape[1:])
        torch.distributed.all_gather_into_tensor(whole, filled, group=group)
        pieces = zip(whole.chunk(len(sizes)), sizes, strict=True) if len(filled) else ()
        return torch.cat([piece[:size] for piece, size in pieces]) if len(filled) else whole

    def scatter_uneven(
        x: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if sizes is None or group.size() == 1:
            return scatter(x, group, sizes, use_global_buffer)
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].contiguous()

    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = scatter_uneven


def _import_without_compiling() -> None:
    """Leaves the functions that Megatron hands to `torch.compile` as they are.

    On a CPU that compiler needs seconds to import and, for each function, many more at its first call.
    """
    compiler = torch.compile
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core.jit")
    finally:
        torch.compile = compiler


def install() -> None:
    """Bridges everything in the table above; calling it again changes nothing."""
    if "megatron" in sys.modules and getattr(torch.cuda, "_mqat_cpu", False):
        return
    logging.getLogger("megatron").setLevel(logging.ERROR)
    _bridge_cuda_functions()
    _bridge_type_names()
    with warnings.catch_warnings():
        # Apex and Transformer Engine are optional, and absent on a CPU.
        warnings.simplefilter("ignore")
        _import_without_compiling()
        proxy = _TorchOnCpu()
        for name in _LITERAL_CUDA:
            importlib.import_module(name).torch = proxy
        _bridge_rng_tracker()
        _bridge_token_dispatchers()
        _bridge_uneven_collectives()
    torch.cuda._mqat_cpu = True  # type: ignore[attr-defined]
