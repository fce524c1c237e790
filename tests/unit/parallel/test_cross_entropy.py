"""The chunked loss in a model: the same numbers, and nothing of `[tokens, vocabulary]` in float32."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.model_fixtures import MODEL, microbatches


class LargestFloat32(TorchDispatchMode):
    """Elements of the largest float32 tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


def step(chunk, *, chunked):
    from mqat.training.step import forward_backward

    chunk.module.chunks_loss = chunked
    chunk.zero_grad_buffer()
    batch = microbatches(count=1, length=64)
    with LargestFloat32() as seen:
        sums = forward_backward([chunk], batch)
    gradients = [p.main_grad.clone() for p in chunk.module.parameters()]
    return sums["loss"] / sums["tokens"], gradients, seen.elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_megatrons(calibrated, monkeypatch, dtype):
    from mqat.parallel import cross_entropy

    monkeypatch.setattr(
        cross_entropy, "CHUNK_ELEMENTS", 20 * 512
    )  # the last chunk is a shorter one
    (chunk,) = calibrated("null", dtype)
    loss, gradients, whole = step(chunk, chunked=False)
    found, same, _ = step(chunk, chunked=True)
    assert found == pytest.approx(loss, rel=1e-6 if dtype == torch.float32 else 1e-4)
    for gradient, expected in zip(same, gradients, strict=True):
        error = (gradient - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)
    assert whole >= 128 * MODEL.vocab_size


def test_no_float32_tensor_has_all_tokens_and_the_vocabulary(calibrated, monkeypatch):
    from mqat.parallel import cross_entropy

    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 8 * 512)
    calls = []
    for chunked in (True, False):
        logits = torch.randn(256, 4096, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(0, 4096, (256,))
        (chunk,) = calibrated("null") if not calls else calls[0][1]
        with LargestFloat32() as seen:
            if chunked:
                group = chunk.module.pg_collection.tp
                loss = cross_entropy.chunked_cross_entropy(
                    logits, labels, vocab_size=4096, group=group
                )
            else:
                from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

                loss = vocab_parallel_cross_entropy(logits.float(), labels)
            loss.sum().backward()
        calls.append((seen.elements, [chunk]))
    assert calls[0][0] <= 4096 and calls[1][0] == 256 * 4096  # control
