"""Attention by documents and chunks equals attention under a dense mask, and makes no such mask."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig
from mqat.data.packing import document_ends
from mqat.errors import UserError
from mqat.specs import causal
from mqat.specs.causal import _lower_right_attention, document_attention, trailing_attention
from tests.unit.model_fixtures import MODEL

SCALE = 0.25
SEGMENTS = torch.tensor([[0] * 5 + [1] * 30 + [2] * 1 + [-1] * 12, [0] * 48])


class Largest(TorchDispatchMode):
    """The largest tensor made, in float32 numbers, and the kernels that ran."""

    def __init__(self):
        super().__init__()
        self.numel, self.kernels = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.kernels.add(func)
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4)
        return result


def inputs(length: int, groups: int = 2, rows: int = 2, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, heads, length, 16, generator=generator, dtype=dtype).requires_grad_()
        for heads in (4, groups, groups)
    ]


def dense(q, k, v, segments):
    """The reference: torch's own attention under a mask [b, 1, s, s], keys repeated."""
    same = segments[:, :, None] == segments[:, None, :]
    seen = same & torch.ones(same.shape[1:], dtype=torch.bool).tril()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=SCALE)


def by_documents(q, k, v, segments, chunks=((0, 48),), **options):
    own = torch.cat([q[:, :, a:b] for a, b in chunks], dim=2)
    ends = document_ends(segments).tolist()
    return document_attention(
        own, k, v, chunks=chunks, ends=ends, dropout_p=0.0, scale=SCALE, **options
    )


def gradients(y, tensors):
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    return torch.autograd.grad((y.float() * weights).sum(), tensors)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("chunks", [((0, 48),), ((0, 12), (36, 48)), ((12, 24), (24, 36))])
def test_documents_and_chunks_equal_a_dense_mask(groups, chunks):
    tensors = inputs(48, groups)
    found = by_documents(*tensors, SEGMENTS, chunks)
    whole = dense(*tensors, SEGMENTS)
    expected = torch.cat([whole[:, :, a:b] for a, b in chunks], dim=2)
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(a, b)
    one = dense(*tensors, torch.zeros_like(SEGMENTS))  # control: the documents matter
    assert not torch.allclose(torch.cat([one[:, :, a:b] for a, b in chunks], dim=2), expected)


def test_without_documents_chunks_see_all_that_is_before_them():
    tensors = inputs(48)
    chunks = ((12, 24), (24, 36))
    options = {"ends": None, "dropout_p": 0.0, "scale": SCALE}
    found = document_attention(tensors[0][:, :, 12:36], *tensors[1:], chunks=chunks, **options)
    torch.testing.assert_close(found, dense(*tensors, torch.zeros_like(SEGMENTS))[:, :, 12:36])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trailing_queries_equal_torchs_lower_right_mask_without_making_it(dtype):
    q, k, v = inputs(256, dtype=dtype)
    own = q[:, :, 192:]
    with Largest() as seen:
        y = trailing_attention(own, k, v, dropout_p=0.0, scale=SCALE)
        found = gradients(y, [q, k, v])
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default in seen.kernels
    expected = _lower_right_attention(own, k, v, dropout_p=0.0, scale=SCALE)  # as on CUDA
    # Both kernels round scores and sums of gradients to bf16, over queries in another order.
    close = (
        {"atol": 4e-3, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    )
    torch.testing.assert_close(y, expected, **close)
    for a, b in zip(found, gradients(expected, [q, k, v]), strict=True):
        torch.testing.assert_close(a, b, **close)
    first = F.scaled_dot_product_attention(own, k, v, is_causal=True, enable_gqa=True)
    assert not torch.allclose(first, y)  # control: what `is_causal` means


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
def test_a_model_learns_the_same_from_ends_and_from_a_dense_mask(world, recompute):
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.specs.model import build_model

    settings = ModelConfig(activations_checkpoint_granularity=recompute)
    (model,) = build_model(MODEL, settings, {}, torch.float32)
    load_pretrained_([model], RandomWeights(MODEL, 1, 0.1))
    ids, positions = torch.arange(96).view(2, 48), torch.arange(48).expand(2, 48)
    same = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    dense_mask = ~(same & torch.ones(48, 48, dtype=torch.bool).tril())[:, None]

    def learn(mask):
        model.zero_grad()
        loss = model(ids, positions, mask, labels=ids)
        loss.mean().backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    (loss, grads), (expected, expected_grads) = learn(document_ends(SEGMENTS)), learn(dense_mask)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b)
    whole, _ = learn(None)
    torch.testing.assert_close(whole[0, :5], loss[0, :5])  # of the first document
    assert not torch.allclose(whole[0, 5:], expected[0, 5:])  # control


@pytest.mark.parametrize("length", [512, 2048])
def test_no_tensor_grows_with_the_square_of_the_length(length):
    tensors = inputs(length, rows=1)
    segments = (torch.arange(length) // 100)[None]
    quarter = length // 4
    for chunks in (((0, length),), ((quarter, 2 * quarter), (2 * quarter, 3 * quarter))):
        with Largest() as seen:
            gradients(by_documents(*tensors, segments, chunks), tensors)
        assert seen.numel == 4 * length * 16  # queries, [1, heads, s, d]
    with Largest() as seen:
        gradients(dense(*tensors, segments), tensors)
    assert seen.numel >= length * length // 4  # control: bools, in float32 units


@pytest.mark.parametrize(
    "ends", [[[0, 48]], [[0, 40], [0, 48]], [[3, 48], [0, 48]], [[0, 30, 20, 48], [0, 48, 48, 48]]]
)
def test_ends_of_other_sequences_are_refused(ends):
    with pytest.raises(UserError, match="do not go from 0 to the sequence length 48 in 2 rows"):
        document_attention(
            *inputs(48), chunks=((0, 48),), ends=ends, dropout_p=0.0, scale=SCALE
        )  # fmt: skip


def near(segments, window):
    """Bool [b, s, s] of a dense mask: what a query looks at in its document, within a window."""
    place = torch.arange(segments.shape[1])
    back = place[:, None] - place
    same = segments[:, :, None] == segments[:, None, :]
    return same & (back >= 0) & (back < window)


def under_mask(q, k, v, seen, softcap=None):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * SCALE
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen[:, None], float("-inf")).softmax(dim=-1) @ v


@pytest.mark.parametrize("chunks", [((0, 48),), ((0, 12), (36, 48)), ((12, 24), (24, 36))])
@pytest.mark.parametrize(
    ("window", "softcap"), [(1, None), (9, None), (47, None), (9, 0.7), (None, 0.7)]
)
@pytest.mark.parametrize("block", [4, 512])
def test_windows_and_caps_equal_a_dense_mask(chunks, window, softcap, block, monkeypatch):
    monkeypatch.setattr(causal, "QUERY_BLOCK", block)
    tensors, options = inputs(48), {"window": window, "softcap": softcap}
    found = by_documents(*tensors, SEGMENTS, chunks, **options)
    whole = under_mask(*tensors, near(SEGMENTS, window or 48), softcap)
    expected = torch.cat([whole[:, :, a:b] for a, b in chunks], dim=2)
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(a, b)
    other = by_documents(*tensors, SEGMENTS, chunks, **options | {"window": 3})
    assert not torch.allclose(other, expected)  # control


@pytest.mark.parametrize(("window", "softcap"), [(100, None), (100, 5.0)])
def test_memory_of_a_window_grows_with_the_length_only(window, softcap, monkeypatch):
    monkeypatch.setattr(causal, "QUERY_BLOCK", 64)
    for length in (512, 2048):
        tensors = inputs(length, rows=1)
        with Largest() as seen:
            y = document_attention(
                *tensors, chunks=((0, length),), ends=None, dropout_p=0.0, scale=SCALE,
                window=window, softcap=softcap,
            )  # fmt: skip
            gradients(y, tensors)
        assert seen.numel <= max(4 * length * 16, 4 * 64 * (64 + window))
