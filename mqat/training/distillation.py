"""Quantization-aware distillation: the unquantized model teaches the quantized one.

The teacher is cut over the same ranks as the student, stage next to stage, and runs over a step's
microbatches before the student does. All that is kept of it are its last hidden states, on the last
stage: [tokens, hidden] in its dtype. Its logits are computed from them chunk by chunk where they are
compared (`parallel.divergence`), so that they never exist as a whole.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from mqat.evaluation.forward import (
    ForwardStep,
    Microbatch,
    StepOutput,
    hidden_states,
    masked_sums,
    on_device,
    true_vocab_size,
)
from mqat.models.structure import OUTPUT_LAYER
from mqat.parallel.divergence import DistillationLoss, distillation_losses
from mqat.parallel.quantized_module import unwrapped
from mqat.runtime.groups import device
from mqat.transfer import to_device


class Teacher:
    """A frozen model on this rank, and what its student is to learn from it.

    Args:
        chunks: Its pipeline chunks, unquantized, of the student's vocabulary and layout.
        loss: How the student's next-token distribution is compared with the teacher's.
        hidden_weight: Weight of the distance between both models' last hidden states: the mean square of
            the difference over the mean square of the teacher's, for every token that counts. 0: none.
        is_offloaded: The teacher's weights, but for the head's, wait in host memory while the student
            trains.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        loss: DistillationLoss,
        *,
        hidden_weight: float = 0.0,
        is_offloaded: bool = False,
    ) -> None:
        self.chunks, self.loss, self.hidden_weight = list(chunks), loss, hidden_weight
        for chunk in self.chunks:
            chunk.requires_grad_(False)
        self._host: dict[torch.nn.Parameter, Tensor] = {}
        if is_offloaded and device().type != "cpu":
            self._move_to_host()

    @property
    def reported(self) -> tuple[str, ...]:
        """Names of the parts of the loss that a forward step reports beside it."""
        named = {"cross_entropy": self.loss.weight < 1, "hidden_distance": self.hidden_weight > 0}
        return ("divergence", *(name for name, is_wanted in named.items() if is_wanted))

    def _move_to_host(self) -> None:
        head = self._head() if self._is_last() else None
        for parameter in (p for chunk in self.chunks for p in chunk.parameters()):
            if parameter is not head:
                self._host[parameter] = parameter.detach().cpu().pin_memory()
                parameter.data = self._host[parameter]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        try:
            for parameter, value in self._host.items():
                parameter.data = to_device(value, device())
            yield
        finally:
            for parameter, value in self._host.items():
                parameter.data = value

    def _is_last(self) -> bool:
        return bool(unwrapped(self.chunks)[-1].post_process)

    def _head(self) -> Tensor:
        model = unwrapped(self.chunks)[-1]
        if model.share_embeddings_and_output_weights:
            return model.shared_embedding_or_output_weight()  # type: ignore[no-any-return]
        return model.output_layer.weight  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Logits [stop - start, Vp/tp] of rows of its last hidden states [n, h]."""
        capped: Tensor = unwrapped(self.chunks)[-1].capped(
            torch.nn.functional.linear(hidden[start:stop], self._head())
        )
        return capped

    def forward_step(self, microbatches: Sequence[Microbatch]) -> ForwardStep:
        """Runs the teacher; the student's forward step, for one pass over the same microbatches."""
        with self._on_device():
            states = deque(hidden_states(self.chunks, microbatches))
        return partial(self._student_step, states)

    def _student_step(
        self, states: deque[Tensor], batches: Iterator[Microbatch], chunk: Any
    ) -> StepOutput:
        batch = on_device(next(batches))
        (student,) = unwrapped([chunk])
        with _input_of_head(student, is_wanted=self.hidden_weight > 0) as head_input:
            output = chunk(batch["tokens"], batch["position_ids"], batch["attention_mask"])
        if not student.post_process:
            return output, lambda _: None  # Megatron asks the last stage alone
        states_of_teacher = states.popleft()
        labels, mask = batch["labels"], batch["loss_mask"]
        assert labels is not None and mask is not None
        total, divergence, entropy = distillation_losses(
            output.flatten(0, 1),
            partial(self.logits, _rows(states_of_teacher, student)),
            labels.flatten(),
            self.loss,
            vocab_size=true_vocab_size([chunk]),
            group=student.pg_collection.tp,
        )
        reported = {"divergence": divergence, "cross_entropy": entropy}
        if head_input:
            apart = _distance(head_input[0], states_of_teacher, student)
            total = total + self.hidden_weight * apart
            reported["hidden_distance"] = apart
        return total, partial(masked_sums, mask, reported)


def _is_cut(model: Any) -> bool:
    return bool(model.config.sequence_parallel)


def _rows(hidden: Tensor, model: Any) -> Tensor:
    """Hidden states [n, h] of tokens [b, s] in their order, from [s, b, h] or this rank's part."""
    if _is_cut(model):
        hidden = gather_from_sequence_parallel_region(hidden, group=model.pg_collection.tp)
    return hidden.transpose(0, 1).flatten(0, 1)


def _distance(student: Tensor, teacher: Tensor, model: Any) -> Tensor:
    """Relative squared distance of every token, float32 [n], from hidden states [s, b, h] or parts."""
    apart = (student.float() - teacher.float()).square().mean(-1)
    relative = apart / teacher.float().square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    if _is_cut(model):
        relative = gather_from_sequence_parallel_region(
            relative, tensor_parallel_output_grad=False, group=model.pg_collection.tp
        )
    return relative.t().flatten()


@contextmanager
def _input_of_head(model: Any, *, is_wanted: bool) -> Iterator[list[Tensor]]:
    """What the output layer is given while a forward pass runs inside; empty where there is none."""
    given: list[Tensor] = []
    layer = getattr(model, OUTPUT_LAYER.name, None)
    if not (is_wanted and model.post_process and layer is not None):
        yield given
        return
    hook = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        yield given
    finally:
        hook.remove()
