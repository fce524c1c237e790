"""Saving and loading through Megatron's dist-checkpointing: the topology-free form of a model.

A checkpoint is a directory that appears complete or not at all: ranks write into a temporary
sibling, rank 0 adds `mqat.json` (with checksums) last and renames it.
"""

import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from mqat.checkpoints.adapter_state import check_adapters, loads_adapters
from mqat.checkpoints.describe import check_description, describe_model
from mqat.checkpoints.manifest import (
    DESCRIPTION,
    FORMAT_VERSION,
    check_files,
    describe_files,
    read_description,
)
from mqat.checkpoints.packed_backbone import check_packed, is_packed, load_packed_
from mqat.checkpoints.reader import CheckpointReader
from mqat.checkpoints.recorded import RecordedLogits
from mqat.data.tokenizer import save_tokenizer
from mqat.errors import UserError
from mqat.files import write_json
from mqat.models.adapters import Adapters
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme, scheme_from_dict
from mqat.parallel.checkpoint import (
    adapter_sharded_state,
    learned_sharded_state,
    load_adapters_,
    load_quantizer_state_,
    packed_sharded_state,
    quantizer_sharded_state,
)
from mqat.parallel.parameter_sync import gather_parameters
from mqat.parallel.quantized_module import quantized_modules, unwrapped
from mqat.runtime.groups import (
    UNGUARDED,
    any_rank,
    decided_by_main,
    gathered,
    is_main,
    on_all_ranks,
    raise_on_any_rank,
)
from mqat.runtime.interruption import undisturbed


@dataclass
class TrainingState:
    """What training continues from, besides the model.

    Attributes:
        optimizer: Megatron optimizer over the model's chunks.
        scheduler: Its learning-rate scheduler.
        step: Finished optimizer steps.
        consumed_samples: Training sequences already used; fixes the position in the data.
    """

    optimizer: Any
    scheduler: Any
    step: int = 0
    consumed_samples: int = 0


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _create_optimizer_state(optimizer: Any) -> None:
    """Gives an optimizer that has not stepped yet the state that a checkpoint is loaded into."""
    for distributed in optimizer.chained_optimizers:
        distributed.init_state_fn(distributed.optimizer, distributed.config)
        if isinstance(distributed.optimizer, torch.optim.AdamW):  # others count steps per group
            for values in distributed.optimizer.state.values():
                values.setdefault("step", torch.tensor(0.0))


def _load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Loads the distributed optimizer, whose torch AdamW needs help with its step counts.

    Megatron-Core 0.16 looks for `step` among the sharded tensors, where it is not, and gives every
    parameter the same step tensor, which AdamW would then advance once per parameter. Learning rates
    stay those that the optimizer was built with.

    Under expert parallelism Megatron has a second optimizer, of experts. States of tensors have the same
    names with one and with two; the settings of parameter groups are taken from where they are.
    """
    parts, by_number = optimizer.chained_optimizers, dict[Any, Any](state)
    saved = [by_number[n] for n in range(2) if "optimizer" in by_number.get(n, ())] or [state]
    groups = [group for part in saved for group in part["optimizer"]["param_groups"]]
    for number, distributed in enumerate(parts):
        own = state if len(parts) == 1 else by_number[number]
        tensors = own.pop("param_state")
        settings = {**saved[0], "optimizer": dict(saved[0]["optimizer"])}
        settings["optimizer"]["param_groups"] = [
            {**group, "is_expert_parallel": is_of_experts}
            for group in groups
            for is_of_experts in (False, True)
        ]
        built = distributed.optimizer.param_groups
        rates = [{key: group[key] for key in ("max_lr", "min_lr")} for group in built]
        distributed.load_state_dict(settings)
        for group, own_rates in zip(distributed.optimizer.param_groups, rates, strict=True):
            group.update(own_rates)  # a resumed run may have other ones
        states = distributed.optimizer.state
        steps = {p: values.pop("step") for p, values in states.items() if "step" in values}
        distributed.load_parameter_state_from_fully_reshardable(tensors)
        for parameter, step in steps.items():
            states[parameter]["step"] = step.clone()


def _rng_state() -> ShardedObject:
    """RNG states of this (pipeline, tensor) position; only read back at the same layout."""
    state = {
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    pp, tp = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        (parallel_state.get_tensor_model_parallel_world_size()),
    )
    position = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", state, (pp, tp), position, replica_id=replica)


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _layout() -> dict[str, int]:
    experts = parallel_state.get_expert_model_parallel_world_size()
    return ({"expert_parallel": experts} if experts > 1 else {}) | {
        "tensor_parallel": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_parallel": parallel_state.get_pipeline_model_parallel_world_size(),
        "data_parallel": parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    }


def _sharded_state(
    chunks: Sequence[Any], training: TrainingState | None, *, is_loading: bool, with_scales: bool
) -> dict[str, Any]:
    """Everything of this rank, as Megatron's sharded state dict."""
    metadata = _metadata()
    models = {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(unwrapped(chunks))
    }
    state: dict[str, Any] = dict(models)
    adapters = adapter_sharded_state(chunks, dp_group=metadata["dp_cp_group"])
    if adapters:  # a stage may be without any
        state["adapters"] = adapters
    if not is_loading and is_packed(chunks):
        state["packed"] = packed_sharded_state(chunks, dp_group=metadata["dp_cp_group"])
    if with_scales:
        state["quantizers"] = quantizer_sharded_state(chunks, dp_group=metadata["dp_cp_group"])
    if training is not None:
        merged = {key: value for model in models.values() for key, value in model.items()}
        learned = learned_sharded_state(chunks, dp_group=metadata["dp_cp_group"])
        optimizer_view = merged if len(models) == 1 else models
        state["optimizer"] = training.optimizer.sharded_state_dict(
            {**optimizer_view, "learned": learned, "adapters": adapters},
            is_loading=is_loading,
            metadata=metadata,
        )
    return state


def save_checkpoint(
    path: Path,
    chunks: Sequence[Any],
    *,
    layers: dict[str, Scheme],
    algorithm: str | None,
    model: DecoderConfig | None = None,
    tokenizer: Any | None = None,
    training: TrainingState | None = None,
    recorded: RecordedLogits | None = None,
    adapters: Adapters | None = None,
) -> None:
    """Writes a checkpoint that loads at any TP, PP and DP; replaces an existing one at `path`.

    Args:
        path: Directory to create; all ranks see the same file system.
        chunks: This rank's model chunks, with or without the DDP wrapper.
        layers: Resolved schemes; empty, or quantizers not yet calibrated: an unquantized checkpoint.
        algorithm: Name shown to people.
        model: Its description, which is compared with the chunks; None: `describe_model`'s.
        tokenizer: Saved as Hugging Face files under `tokenizer/`.
        training: Also save optimizer, scheduler, RNG and data position.
        adapters: Those of the chunks, if they have some; saved beside the weights that they adapt.
        recorded: `evaluation.verification.record_logits` of the chunks, by which `mqat verify` tells
            whether it rebuilds the same model.

    Raises:
        UserError: On every rank: the chunks compute something that the description does not say, another
            directory is in the way, or it cannot be written.
    """
    gather_parameters(chunks)
    with on_all_ranks():
        if model is None:
            model = describe_model(chunks)
        else:
            check_description(chunks, model)
        if path.exists() and not (path / DESCRIPTION).is_file():
            raise UserError(
                f"{path} exists and is not an mqat checkpoint, so it is not replaced; choose another "
                "path."
            )
        if recorded is not None and recorded.logits.shape[-1] != model.vocab_size:
            raise UserError(
                f"recorded logits are of {recorded.logits.shape[-1]} tokens, the model of "
                f"{model.vocab_size}; give record_logits the model that is saved, too."
            )
        check_adapters(chunks, adapters)
        modules = quantized_modules(chunks)
        # A stage may be without quantizers.
        are_frozen = all(q.is_frozen for m in modules.values() for q in m.quantizers.values())
    quantized = bool(layers) and not any_rank(not are_frozen)
    if quantized:
        own = {n for n, m in modules.items() if m.quantizers or getattr(m, "is_packed", False)}
        _check_layers(layers, own)
    temporary = path.with_name(f".{path.name}.tmp")
    schemes = {name: scheme.to_dict() for name, scheme in layers.items()}
    description = _describe(model, chunks, training) | {
        "quantization": {"algorithm": algorithm, "layers": schemes} if quantized else None
    }
    if is_packed(chunks):
        description["is_packed"] = True
    if adapters is not None:
        description["adapters"] = adapters.to_dict()
    state = _sharded_state(chunks, training, is_loading=False, with_scales=quantized)
    if training is not None:
        state["scheduler"] = training.scheduler.state_dict()
        state["rng"] = _rng_state()

    with undisturbed():
        with _writing(path, temporary):
            if is_main():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with _writing(path, temporary):
            dist_checkpointing.save(state, str(temporary), content_metadata={"format": "mqat"})
        with _writing(path, temporary):
            if is_main():
                if recorded is not None:
                    recorded.save(temporary)
                _finish(temporary, path, description, tokenizer)


def _check_layers(layers: Mapping[str, Scheme], own: set[str]) -> None:
    """Refuses schemes without quantizers on any rank (`own` are this one's), and the other way round."""
    found = set[str]().union(*gathered(own))
    if found != layers.keys():
        name = min(found ^ layers.keys())
        has, lacks = ("layers", "the model") if name in layers else ("the model", "layers")
        raise UserError(
            f"layers: {name} is quantized in {has} and not in {lacks}; give save_checkpoint the schemes "
            "that the model was built with."
        )


def _describe(
    model: DecoderConfig, chunks: Sequence[Any], training: TrainingState | None
) -> dict[str, Any]:
    """What `mqat.json` says besides quantization and files."""
    return {
        "format_version": FORMAT_VERSION,
        "family": model.family,
        "model": model.to_dict(),
        "params_dtype": str(next(chunks[0].parameters()).dtype).removeprefix("torch."),
        "iteration": training.step if training else 0,
        "consumed_samples": training.consumed_samples if training else 0,
        "has_training_state": training is not None,
        "layout": _layout(),
    }


@contextmanager
def _writing(path: Path, temporary: Path) -> Iterator[None]:
    """One stage of saving: what fails on any rank ends all of them, and nothing unfinished stays."""
    error: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException) as caught:
        error = caught
        shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(
        error, EOFError
    ):  # the others are in a collective of Megatron's: nothing to agree on
        raise UserError(
            f"{path}: the process that writes the checkpoint ended early. {UNGUARDED}"
        ) from error
    if error is not None and _is_of_the_disk(error):
        error = UserError(
            f"{path}: writing the checkpoint failed: {_reasons(error)}. Check that the disk has space "
            "and can be written; what was unfinished is removed, earlier checkpoints are whole."
        )
    raise_on_any_rank(error)


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether the system refused to write: torch and Megatron wrap its OSError in types of theirs."""
    if isinstance(error, CheckpointException):  # torch's collection of what failed on which rank
        return all(_is_of_the_disk(failure) for failure, _ in error.failures.values())
    # Megatron-Core 0.19 keeps only the type of what its writer failed with, and logs the rest.
    texts = (
        r"\[Errno ",
        "PytorchStreamWriter",
        "inline_container",
        r"worker \d+, error: <class '(Runtime|OS)E",
    )
    return isinstance(error, OSError) or any(re.search(text, str(error)) for text in texts)


def _reasons(error: BaseException) -> str:
    if not isinstance(error, CheckpointException):
        return str(error)
    return "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())


def _finish(
    temporary: Path, path: Path, description: dict[str, Any], tokenizer: Any | None
) -> None:
    """Rank 0: tokenizer, checksums, description, then the rename that makes it real."""
    if tokenizer is not None:
        save_tokenizer(tokenizer, temporary / "tokenizer")
    names = [str(f.relative_to(temporary)) for f in temporary.rglob("*") if f.is_file()]
    description["files"] = describe_files(temporary, names)
    write_json(temporary / DESCRIPTION, description)
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old)
    else:
        temporary.rename(path)


def load_checkpoint(
    path: Path,
    chunks: Sequence[Any],
    *,
    layers: dict[str, Scheme],
    training: TrainingState | None = None,
    adapters: Adapters | None = None,
) -> dict[str, Any]:
    """Loads weights, frozen scales if the checkpoint has them, and optionally training state.

    Args:
        path: Complete checkpoint directory, saved at any layout.
        chunks: Model chunks built for the present layout.
        layers: Schemes the model was built with; must be those of a quantized checkpoint.
        training: If given, optimizer, scheduler, step and data position are restored into it; RNG
            too when the layout is the one that saved it.
        adapters: Those of the chunks, if they have some; where the checkpoint has none, they stay.

    Returns:
        The checkpoint's description (`mqat.json`).

    Raises:
        ValueError: On every rank: incomplete or damaged files, tensors without a place in the model,
            chunks that compute another model, other schemes, or no training state.
    """
    with on_all_ranks():
        description = read_description(path)
        check_files(path, description, crc="all" if is_main() else "none")
        reader = CheckpointReader(path, crc="none")  # refuses tensors without a place
        check_packed(chunks, reader)
        check_description(chunks, DecoderConfig.from_dict(description["model"]))
        _check_schemes(path, description, layers)
        check_adapters(chunks, adapters)
        has_adapters = loads_adapters(path, description, adapters)
        if training is not None and not description["has_training_state"]:
            raise UserError(
                f"{path}: holds a model only, no optimizer state to resume from; use it as "
                "model.restore_from_path instead."
            )

    if training is not None:
        _create_optimizer_state(training.optimizer)
    has_scales = description["quantization"] is not None and bool(layers)
    state = _sharded_state(chunks, training, is_loading=True, with_scales=has_scales)
    if not has_adapters:
        state.pop("adapters", None)
    same_layout = description["layout"] == _layout()
    if training is not None and same_layout:
        state["rng"] = _rng_state()
    with on_all_ranks():
        try:
            loaded = dist_checkpointing.load(state, str(path))
        except (OSError, CheckpointingException, CheckpointException) as error:
            raise UserError(f"{path}: cannot be loaded: {_reasons(error)}") from error
    for index, chunk in enumerate(unwrapped(chunks)):
        chunk.load_state_dict(loaded[f"model{index}"], strict=False)
    if is_packed(chunks):
        with on_all_ranks():
            load_packed_(chunks, reader)
    if "adapters" in loaded:
        load_adapters_(chunks, loaded["adapters"])
    if has_scales:
        with on_all_ranks():  # a stage, or a packed model, may be without quantizers
            load_quantizer_state_(chunks, loaded.get("quantizers", {}))
    if training is not None:
        _load_optimizer(training.optimizer, loaded["optimizer"])
        training.scheduler.num_steps = 0  # Megatron adds the loaded steps to those already taken
        training.scheduler.load_state_dict(loaded["scheduler"])
        training.step = description["iteration"]
        training.consumed_samples = description["consumed_samples"]
        if same_layout:
            _restore_rng(loaded["rng"])
    return description


def _without_name(scheme: dict[str, Any]) -> dict[str, Any]:
    """What a scheme is made of: its name is only for people."""
    return {key: value for key, value in scheme.items() if key != "name"}


def _check_schemes(path: Path, description: dict[str, Any], layers: dict[str, Scheme]) -> None:
    saved = description["quantization"]
    if saved is None or not layers:
        return
    current = {name: _without_name(scheme.to_dict()) for name, scheme in layers.items()}
    calibrated = {name: _without_name(scheme) for name, scheme in saved["layers"].items()}
    for name in sorted(current.keys() | calibrated.keys()):
        if current.get(name) != calibrated.get(name):
            raise UserError(
                f"{path}: {name} was calibrated as {calibrated.get(name)}, the run asks for "
                f"{current.get(name)}. Use quantization.algorithm={saved['algorithm']} with the same "
                "group size and rules, or restore from an unquantized checkpoint."
            )


def _complete_checkpoints(directory: Path) -> list[Path]:
    """The complete `step_N` directories, by N."""
    complete = [
        path
        for path in directory.glob("step_*")
        if (path / DESCRIPTION).is_file() and path.name.removeprefix("step_").isdigit()
    ]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step_")))


def latest_checkpoint(directory: Path) -> Path | None:
    """The complete `step_N` directory with the largest N, or None; as the first rank sees it."""
    return decided_by_main(lambda: next(reversed(_complete_checkpoints(directory)), None))


def step_directory(directory: Path, step: int) -> Path:
    """Where a phase's checkpoint after `step` optimizer steps is, or would be."""
    return directory / f"step_{step:08d}"


def saved_steps(directory: Path) -> list[int]:
    """Steps of complete checkpoints, ascending; call on one rank only."""
    return [int(path.name.removeprefix("step_")) for path in _complete_checkpoints(directory)]


def delete_old_checkpoints(
    directory: Path, keep_last: int, kept_steps: Collection[int] = ()
) -> None:
    """Deletes complete `step_N` directories; call on one rank only.

    Args:
        directory: Of a phase.
        keep_last: The newest so many, at least 1, are kept.
        kept_steps: So are those of these steps.
    """
    for path in _complete_checkpoints(directory)[:-keep_last]:
        if int(path.name.removeprefix("step_")) in kept_steps:
            continue
        doomed = path.with_name(f".{path.name}.deleted")  # never half a checkpoint under its name
        shutil.rmtree(doomed, ignore_errors=True)  # left by a run that was killed
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def checkpoint_layers(description: dict[str, Any]) -> dict[str, Scheme]:
    """Schemes recorded in a checkpoint's description; empty when it is unquantized."""
    if description["quantization"] is None:
        return {}
    layers = description["quantization"]["layers"]
    return {name: scheme_from_dict(scheme) for name, scheme in layers.items()}
