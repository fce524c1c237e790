"""Forward passes over microbatches, through Megatron's own pipeline schedules."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from mqat.models.structure import OUTPUT_LAYER, is_adapter_key
from mqat.parallel.context import own_tokens, whole_sequences
from mqat.parallel.learned_scales import scale_rule
from mqat.parallel.parameter_sync import gather_parameters
from mqat.parallel.quantized_module import QuantizedModule, set_token_mask, unwrapped
from mqat.parallel.quantized_step import quantized_step
from mqat.runtime.groups import device
from mqat.transfer import to_device

Microbatch = dict[str, Tensor | None]
# What Megatron's schedules call: a chunk's output, and how the last stage's becomes a loss.
StepOutput = tuple[Tensor, Callable[..., Any]]
ForwardStep = Callable[[Iterator[Microbatch], Any], StepOutput]


def on_device(batch: Microbatch) -> Microbatch:
    """Without what the host decides by what it starts: ends of documents, and real tokens."""
    return {
        key: value if value is None or _is_of_host(key, value) else to_device(value, device())
        for key, value in batch.items()
    }


def _is_of_host(key: str, value: Tensor) -> bool:
    is_document_ends = key == "attention_mask" and value.dtype != torch.bool
    return is_document_ends or key == "token_mask"


def masked_sums(
    loss_mask: Tensor, parts: Mapping[str, Tensor], losses: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's per-token contract: loss sum, token count, values to report (those of `parts` too)."""
    mask = loss_mask.reshape(-1)
    total = (losses.reshape(-1).float() * mask).sum()
    count = mask.sum().to(torch.int)
    reported = {"loss": total.detach().double(), "tokens": count.double()}
    reported |= {
        key: (part.detach().reshape(-1) * mask).sum().double() for key, part in parts.items()
    }
    return total, count, reported


def forward_loss(batches: Iterator[Microbatch], chunk: Any) -> StepOutput:
    """One microbatch through a chunk, for Megatron's schedules: output, and how it becomes a loss."""
    batch = on_device(next(batches))
    output = chunk(
        batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"]
    )
    loss_mask = batch["loss_mask"]
    assert loss_mask is not None
    return output, partial(masked_sums, loss_mask, {})


def forward_logits(batches: Iterator[Microbatch], chunk: Any) -> StepOutput:
    """One microbatch through a chunk, for Megatron's schedules, which report its `logits`."""
    batch = on_device(next(batches))
    output = chunk(batch["tokens"], batch["position_ids"], batch["attention_mask"])
    return output, lambda logits: (logits.new_zeros(()), {"logits": logits.detach()})


def _forward_hidden(batches: Iterator[Microbatch], chunk: Any) -> StepOutput:
    output, _ = forward_logits(batches, chunk)
    return output, lambda hidden: (hidden.new_zeros(()), {})


def _forward_last_states(batches: Iterator[Microbatch], chunk: Any) -> StepOutput:
    output, _ = forward_logits(batches, chunk)
    return output, lambda hidden: (hidden.new_zeros(()), {"hidden": hidden.detach()})


def _of_context_rank(batch: Microbatch) -> Microbatch:
    """This rank's tokens of whole sequences; attention needs the documents of all of them."""
    group = parallel_state.get_context_parallel_group()
    return {
        key: value if value is None or key == "attention_mask" else own_tokens(value, group)
        for key, value in batch.items()
    }


def _announced(chunk: Any, microbatches: Sequence[Microbatch]) -> Iterator[Microbatch]:
    """The microbatches; as each is taken, the chunk's modules learn which of its tokens are real."""
    for batch in microbatches:
        set_token_mask(chunk, batch.get("token_mask"))
        yield batch


def run_microbatches(
    forward_step: ForwardStep,
    chunks: Sequence[Any],
    microbatches: Sequence[Microbatch],
    *,
    forward_only: bool,
    are_whole: bool = False,
) -> list[dict[str, Tensor]]:
    """One pass over the microbatches of this data-parallel rank; results only on the last stage.

    Context-parallel ranks are given the same whole sequences and take their parts of them, or compute
    all of them inside `whole_sequences` (`are_whole`).

    Forward only, a rank may have none: nothing in a model's forward pass waits for other
    data-parallel ranks, unless they share experts. Padding and filler (`token_mask`) pass through the
    model like any token, but what watches it, calibration or the quality report, leaves them out.
    """
    if forward_only and not microbatches:
        return []
    tokens = microbatches[0]["tokens"]
    assert tokens is not None
    length, cp = tokens.shape[1], parallel_state.get_context_parallel_world_size()
    if are_whole:
        length *= cp  # the schedule divides by it
    elif cp > 1:
        microbatches = [_of_context_rank(batch) for batch in microbatches]
    take = _announced if forward_only else lambda _, batches: iter(batches)
    try:
        results: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=forward_step,
            # Every chunk of an interleaved pipeline reads the same microbatches.
            data_iterator=[take(chunk, microbatches) for chunk in chunks],
            model=list(chunks),
            num_microbatches=len(microbatches),
            seq_length=length,
            micro_batch_size=tokens.shape[0],
            forward_only=forward_only,
        )
    finally:
        set_token_mask(chunks, None)
    return results


def totals(results: list[dict[str, Tensor]], keys: Sequence[str]) -> dict[str, float]:
    """Sums of what was reported over microbatches and data-parallel ranks, known on every stage."""
    sums = torch.zeros(len(keys), dtype=torch.float64, device=device())
    for result in results:
        sums += torch.stack([result[key] for key in keys])
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(sums, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return dict(zip(keys, sums.tolist(), strict=True))


@contextmanager
def eval_mode(chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, without dropout; afterwards as before."""
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, was_training, strict=True):
            chunk.train(training)


@torch.no_grad()
def evaluate(chunks: Sequence[Any], steps: Sequence[Sequence[Microbatch]]) -> tuple[float, float]:
    """Loss summed over all counted tokens, and their number, on every rank; changes nothing.

    The host waits for the device once, at the end.
    """
    results: list[dict[str, Tensor]] = []
    with eval_mode(chunks), quantized_step(chunks, for_backward=False):
        for microbatches in steps:
            results += run_microbatches(forward_loss, chunks, microbatches, forward_only=True)
    found = totals(results, ("loss", "tokens"))
    return found["loss"], found["tokens"]


@contextmanager
def _without_logits(chunks: Sequence[Any]) -> Iterator[None]:
    """The last stage ends with the decoder, unless its output layer is watched too."""
    models = [
        model
        for model in unwrapped(chunks)
        if not isinstance(getattr(model, OUTPUT_LAYER.name, None), QuantizedModule)
    ]
    ends = [model.post_process for model in models]
    try:
        for model in models:
            model.post_process = False
        yield
    finally:
        for model, end in zip(models, ends, strict=True):
            model.post_process = end


@torch.no_grad()
def run_layers(chunks: Sequence[Any], steps: Sequence[Sequence[Microbatch]]) -> None:
    """Forward passes through all layers, without logits and loss: for what calibration watches.

    Context-parallel ranks, which are given the same microbatches, take turns at them.
    """
    cp, rank = (
        parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank(),
    )  # fmt: skip
    with eval_mode(chunks), _without_logits(chunks), whole_sequences(chunks):
        for microbatches in steps:
            own = _filled_up(chunks, microbatches[rank::cp], microbatches, cp)
            run_microbatches(_forward_hidden, chunks, own, forward_only=True, are_whole=True)


@torch.no_grad()
def hidden_states(chunks: Sequence[Any], microbatches: Sequence[Microbatch]) -> list[Tensor]:
    """What the output layer would be given, for each microbatch; on the last stage only.

    [s, b, h], this rank's part of the sequence under context and sequence parallelism. The output layer
    itself must not be quantized.
    """
    with eval_mode(chunks), _without_logits(chunks), quantized_step(chunks, for_backward=False):
        results = run_microbatches(_forward_last_states, chunks, microbatches, forward_only=True)
    return [result["hidden"] for result in results]


def _filled_up(
    chunks: Sequence[Any], own: Sequence[Microbatch], microbatches: Sequence[Microbatch], cp: int
) -> Sequence[Microbatch]:
    """A rank's own microbatches and what it has to compute besides, which has no real token.

    An interleaved pipeline takes a multiple of its stages, and ranks that share experts wait for each
    other: they take as many as the one with the most of its context-parallel group.
    """
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    wanted = len(own)
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        wanted = -(-len(microbatches) // cp)
    if len(chunks) > 1:
        wanted += -wanted % stages
    if wanted == len(own):
        return own
    filler = dict(microbatches[0])
    tokens = filler["tokens"]
    assert tokens is not None
    filler["token_mask"] = torch.zeros_like(tokens, dtype=torch.bool)
    return [*own, *[filler] * (wanted - len(own))]


def true_vocab_size(chunks: Sequence[Any]) -> int:
    """Without padding, where the model knows it: Megatron's own GPTModel does not."""
    model = unwrapped(chunks)[-1]
    return int(getattr(model, "true_vocab_size", model.vocab_size))


@torch.no_grad()
def logits(chunks: Sequence[Any], tokens: Tensor, vocab_size: int | None = None) -> Tensor:
    """Next-token logits of sequences [b, s]: float32 [b, s, V], without vocabulary padding.

    `tokens` are the same on every rank, and so are the logits. V is `vocab_size`, by default
    `true_vocab_size`.
    """
    sequence = tokens.shape[1]  # of any length: nothing is cut over context-parallel ranks
    # Sequence parallelism cuts the sequence evenly; causal attention ignores what is added.
    padding = -sequence % parallel_state.get_tensor_model_parallel_world_size()
    padded = torch.nn.functional.pad(tokens, (0, padding))
    batch: Microbatch = {
        "tokens": padded,
        "position_ids": torch.arange(padded.shape[1]).expand_as(padded),
        "attention_mask": None,
    }
    vocab = vocab_size or true_vocab_size(chunks)
    # An interleaved pipeline needs one microbatch per stage; the copies' results are not used.
    copies = 1 if len(chunks) == 1 else parallel_state.get_pipeline_model_parallel_world_size()
    with (
        eval_mode(chunks),
        whole_sequences(chunks),
        quantized_step(chunks, for_backward=False),
    ):
        results = run_microbatches(
            forward_logits, chunks, [batch] * copies, forward_only=True, are_whole=True
        )
    full = torch.empty(*tokens.shape, vocab, device=device())
    if results:
        local = results[0]["logits"]
        gathered = gather_from_tensor_model_parallel_region(local)
        full.copy_(gathered[:, :sequence, :vocab])
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(full, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return full


@contextmanager
def served_weights(chunks: Sequence[Any], dtype: str) -> Iterator[None]:
    """Inside, unquantized tensors are rounded to the dtype they are served in.

    Norms, embedding, head and unquantized linears are exported in `dtype`; rounding them first leaves
    only the quantized arithmetic to compare. The weights are restored afterwards.
    """
    gather_parameters(chunks)
    served = getattr(torch, dtype)
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for model in unwrapped(chunks):
                for name, parameter in model.named_parameters():
                    owner, _, kind = name.rpartition(".")
                    quantizer = getattr(model.get_submodule(owner), f"{kind}_quantizer", None)
                    if is_adapter_key(name) or scale_rule(parameter) is not None:
                        continue  # served as they are
                    # One that nothing has calibrated is not served: its weight is exported as it is.
                    if quantizer is None or not quantizer.is_frozen:
                        kept.append((parameter, parameter.detach().clone()))
                        parameter.copy_(parameter.to(served))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def served_logits(chunks: Sequence[Any], tokens: Tensor, dtype: str) -> Tensor:
    """`logits` with `served_weights`."""
    with served_weights(chunks, dtype):
        return logits(chunks, tokens)
