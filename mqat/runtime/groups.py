"""Process groups for NCCL on CUDA or gloo on CPU, and agreement between ranks on errors."""

import atexit
import gc
import multiprocessing
import os
import resource
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from mqat.errors import UserError
from mqat.runtime.interruption import Interrupted, StopRequest, ends_at_once
from mqat.runtime.megatron_releases import check_release

T = TypeVar("T")
UNGUARDED = "Put what the script does under `if __name__ == '__main__':`."


def world_size() -> int:
    """Number of processes, from torchrun's environment; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """This rank's device."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def peak_memory_bytes() -> int:
    """The most that this process has held so far: on its GPU, without one in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def is_main() -> bool:
    """Whether this is the process that writes for people: rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def rank_in_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def initialize(
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual_pipeline: int | None = None,
    context_parallel: int = 1,
    expert_parallel: int = 1,
    expert_tensor_parallel: int | None = None,
    seed: int = 1234,
    timeout_minutes: float = 10.0,
) -> None:
    """Joins the other processes and creates Megatron's groups; without torchrun, a world of one.

    Args:
        tensor_parallel: Processes that share each layer.
        pipeline_parallel: Number of pipeline stages.
        virtual_pipeline: Model chunks per stage of an interleaved pipeline; None: not interleaved.
        context_parallel: Processes that share each sequence.
        expert_parallel: Processes that share the experts of each layer, among those that hold copies of
            the rest of it.
        expert_tensor_parallel: Processes that share each expert: 1, or None for `tensor_parallel`.
        seed: For Megatron's per-rank random number streams.
        timeout_minutes: A collective that waits longer than this fails.

    Raises:
        UserError: On every rank, before any group exists: the sizes or the world size do not fit, or
            mqat was not tried with this release of Megatron-Core.
    """
    _refuse_unguarded()
    check_release()
    if min(tensor_parallel, pipeline_parallel, context_parallel) < 1:
        raise UserError(
            f"tensor_parallel={tensor_parallel}, pipeline_parallel={pipeline_parallel} and "
            f"context_parallel={context_parallel} must be at least 1, which means not parallel."
        )
    if virtual_pipeline is not None and (virtual_pipeline < 2 or pipeline_parallel < 2):
        raise UserError(
            f"virtual_pipeline={virtual_pipeline} with pipeline_parallel={pipeline_parallel}: an "
            "interleaved pipeline has at least 2 chunks on each of at least 2 stages; use None."
        )
    size = world_size()
    sizes = tensor_parallel * pipeline_parallel * context_parallel
    if size % sizes:
        raise UserError(
            f"world size {size} is not a multiple of tensor_parallel={tensor_parallel} x "
            f"pipeline_parallel={pipeline_parallel} x context_parallel={context_parallel}; start "
            f"torchrun with --nproc-per-node {sizes} or a multiple of it."
        )
    check_expert_parallel(
        size,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        expert_parallel=expert_parallel,
        expert_tensor_parallel=expert_tensor_parallel,
    )
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(device())
    else:
        from mqat.runtime import cpu

        cpu.install()
    from megatron.core import parallel_state
    from megatron.core import tensor_parallel as megatron_tp

    if not dist.is_initialized():
        join("nccl" if on_cuda else "gloo", timeout_minutes)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        virtual_pipeline_model_parallel_size=virtual_pipeline,
        context_parallel_size=context_parallel,
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=expert_tensor_parallel,
        distributed_timeout_minutes=timeout_minutes,
    )
    megatron_tp.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def make_deterministic() -> None:
    """Operations of torch give the same bits every time, or an error; call before `initialize`.

    What cuBLAS, NCCL and Transformer Engine are told is read when they start.
    """
    for name, value in {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def check_expert_parallel(
    world_size: int,
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
    expert_parallel: int,
    expert_tensor_parallel: int | None,
) -> None:
    """Refuses sizes of expert parallelism that the world cannot be cut into.

    Raises:
        UserError: Names the sizes, and what would fit.
    """
    inner = tensor_parallel if expert_tensor_parallel is None else expert_tensor_parallel
    if expert_parallel < 1 or inner not in (1, tensor_parallel):
        raise UserError(
            f"expert_parallel={expert_parallel} must be at least 1, and expert_tensor_parallel={inner} "
            f"either 1 or tensor_parallel={tensor_parallel}."
        )
    if inner < tensor_parallel and expert_parallel % tensor_parallel:
        raise UserError(
            f"expert_tensor_parallel={inner} with tensor_parallel={tensor_parallel} needs an "
            f"expert_parallel that is a multiple of {tensor_parallel}, not {expert_parallel}: ranks of "
            "one tensor-parallel group hold other tokens, and their gradients of an expert must meet."
        )
    sizes = pipeline_parallel * expert_parallel * inner
    if world_size % sizes:
        raise UserError(
            f"world size {world_size} is not a multiple of pipeline_parallel={pipeline_parallel} x "
            f"expert_parallel={expert_parallel} x expert_tensor_parallel={inner}; start torchrun with "
            f"--nproc-per-node {sizes} or a multiple of it."
        )


def _refuse_unguarded() -> None:
    # The attribute by which multiprocessing tells a process that is still importing its main script.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "this script is being imported by a process that it has started itself (Megatron's "
            f"checkpoint writer is one), which would join the ranks. {UNGUARDED}"
        )


def join(backend: str, timeout_minutes: float = 10.0) -> None:
    """Creates the group of all processes, without Megatron; without torchrun, a world of one."""
    _refuse_unguarded()
    atexit.unregister(_end_threads)  # once, however often this process joins
    atexit.register(_end_threads)
    timeout = timedelta(minutes=timeout_minutes)
    if backend == "nccl":
        torch.cuda.set_device(device())
    if "MASTER_ADDR" in os.environ:
        rank = int(os.environ.get("RANK", "0"))
        dist.init_process_group(backend, rank=rank, world_size=world_size(), timeout=timeout)
        return
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def finalize() -> None:
    """Leaves the process groups for good.

    Under torchrun a process can join once: the job's store still holds the addresses of the first time.
    For another layout of the same world, destroy Megatron's groups only and call `initialize` again.
    """
    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_threads() -> None:
    """At exit: waits for gloo's threads, without which the process may abort.

    A worker thread drops the tensors of its last collective some time after `wait` has returned. For
    that it waits for the interpreter's lock, and Python (before 3.14) unwinds a thread that waits when
    finalization begins, which C++ answers with `std::terminate`. Only the destructor of a group waits
    for its threads, and it runs when the last reference goes: `destroy_process_group` drops torch's own,
    while modules, buckets, autograd graphs and one of Megatron's globals keep theirs. So, while the
    interpreter still lives, this takes groups out of every dict and every object's attributes, and lets
    go of tracebacks and cycles. Not seen: a group in a list, a tuple or a
    closure that lives as long as the process; delete those first.
    """
    if getattr(sys, "last_value", None) is not None and dist.is_initialized():
        # A fault of this rank: others may never join the collectives it has started.
        dist.distributed_c10d._abort_process_group()
    finalize()
    for name in ("last_exc", "last_value", "last_traceback"):  # their frames refer to models
        setattr(sys, name, None)
    for holder in gc.get_objects():
        if type(holder) is types.FunctionType:  # most of the objects
            continue
        held: Any = holder
        if type(holder).__dictoffset__ != 0:
            try:
                held = object.__getattribute__(holder, "__dict__")
            except AttributeError:  # types of Python's own, from 3.12 on
                continue
        if type(held) is dict and dist.ProcessGroup in map(type, held.values()):
            held.update({k: None for k, v in held.items() if type(v) is dist.ProcessGroup})
    del holder, held
    gc.collect()


@dataclass(frozen=True)
class _Failure:
    """What went wrong on a rank, as the others hear of it."""

    is_user_error: bool
    text: str


def _failure(error: BaseException) -> _Failure:
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename):
        return _Failure(True, str(error))
    return _Failure(False, "".join(traceback.format_exception(error)))


def raise_on_any_rank(error: BaseException | None) -> None:
    """Every rank reports success or its error; if any failed, all raise.

    A rank that raises alone leaves the others waiting in their next collective.

    Args:
        error: What went wrong on this rank, or None.

    Raises:
        UserError: On every rank, the message of the lowest rank that failed, if users can mend all of
            what failed.
        Exception: Otherwise: the rank's own error, or where it has none a RuntimeError with the number
            and the traceback of the lowest rank that has one.
    """
    own = None if error is None else _failure(error)
    failures = {rank: found for rank, found in enumerate(gathered(own)) if found is not None}
    if not failures:
        return
    faults = {rank: f for rank, f in failures.items() if not f.is_user_error}
    if not faults:
        raise UserError(next(iter(failures.values())).text) from error
    if error is not None and own is not None and not own.is_user_error:
        raise error
    rank, fault = next(iter(faults.items()))
    raise RuntimeError(f"rank {rank} failed:\n{fault.text}") from error


@contextmanager
def on_all_ranks() -> Iterator[None]:
    """A phase that all ranks finish or none: a failure on one is raised by all, as above."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_on_any_rank(error)


def decided_by_main(choose: Callable[[], T]) -> T:
    """The first rank's answer, on every rank (a collective).

    Raises:
        Exception: As `raise_on_any_rank`, if the first rank has no answer.
    """
    answers: list[Any] = [None]
    with on_all_ranks():
        if is_main():
            answers[0] = choose()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(answers, src=0)
    found: T = answers[0]
    return found


def gathered(value: T) -> list[T]:
    """What every rank has, in the order of ranks, on every rank (a collective)."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; every rank gets the same answer (a collective)."""
    return any(gathered(flag))


def largest_on_any_rank(values: Sequence[int]) -> list[int]:
    """The largest of each number over all ranks, on every rank (one small collective)."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return list(values)
    found = torch.tensor(values, dtype=torch.int64, device=device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [int(value) for value in found.tolist()]


def _is_first_to_fail() -> bool:
    """Whether no other process of this job has printed its error; torchrun's own store knows."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return int(os.environ.get("RANK", "0")) == 0
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=20),
    )
    return bool(store.add(f"mqat/errors/{attempt}", 1) == 1)


@contextmanager
def command_line() -> Iterator[None]:
    """Around a script's main function: quiet dependencies, and errors as people want them.

    A UserError (which every rank raises alike, see `raise_on_any_rank`), or an OSError about a file,
    becomes one line from the first rank that gets here and exit status 2 on all ranks: torchrun ends the
    others as soon as one has exited. SIGTERM and Ctrl-C become a line likewise, status 143 and 130.
    Everything else is a fault of the program and keeps its traceback, on every rank.
    Warnings that users cannot act on are hidden: Megatron uses what newer torch calls deprecated, and
    reports the absence of optional packages.
    """
    warnings.filterwarnings("ignore", module=r"(torch\.distributed|torch\.utils|megatron)\b.*")
    with ends_at_once("the command") as request:
        try:
            yield
        except (UserError, OSError) as error:
            failure = _failure(error)
            if request.number or not failure.is_user_error:
                _end_interrupted_or_raise(error, request)
            if _is_first_to_fail():
                print(f"error: {failure.text}", file=sys.stderr, flush=True)
            finalize()
            sys.exit(2)
        except Interrupted as ended:
            _end_interrupted(ended)
        except KeyboardInterrupt:  # another thread's
            print("interrupted", file=sys.stderr, flush=True)
            sys.exit(130)
        except Exception as error:
            _end_interrupted_or_raise(error, request)
        finalize()


def _end_interrupted_or_raise(error: Exception, request: StopRequest) -> NoReturn:
    """An error of a rank that was asked to end: the others have, amid a collective with this one."""
    if not request.number:
        raise error
    _end_interrupted(Interrupted(str(error), request.number))


def _end_interrupted(ended: Interrupted) -> NoReturn:
    if is_main():  # every rank is told: torchrun's store may be closing already
        print(f"interrupted by {ended}", file=sys.stderr, flush=True)
    if not ended.is_agreed and dist.is_initialized():
        # Others may be in the middle of a collective, which nobody is going to join.
        dist.distributed_c10d._abort_process_group()
    finalize()
    sys.exit(128 + ended.number)
