"""Documents and chunks on CUDA: as under a dense mask, in kernels whose memory is linear in tokens."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from mqat.data.packing import document_ends
from mqat.specs.causal import document_attention

pytestmark = pytest.mark.gpu
SCALE = 0.125


def inputs(length, groups, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(
            1,
            heads,
            length,
            64,
            generator=generator,
            dtype=dtype,
            device="cuda",
            requires_grad=True,
        )
        for heads in (8, groups, groups)
    ]


def by_documents(q, k, v, segments, chunks):
    own = torch.cat([q[:, :, a:b] for a, b in chunks], dim=2)
    ends = document_ends(segments).tolist()
    return document_attention(own, k, v, chunks=chunks, ends=ends, dropout_p=0.0, scale=SCALE)


def dense(q, k, v, segments):
    same = (segments[:, :, None] == segments[:, None, :]).cuda()
    seen = same & torch.ones(same.shape[1:], dtype=torch.bool, device="cuda").tril()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=SCALE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("chunks", [((0, 512),), ((128, 256), (256, 384))])
def test_documents_and_chunks_equal_a_dense_mask(dtype, groups, chunks):
    tensors = inputs(512, groups, dtype)
    segments = (torch.arange(512) // 100)[None]
    found = by_documents(*tensors, segments, chunks)
    whole = dense(*(x.float() for x in tensors), segments)
    expected = torch.cat([whole[:, :, a:b] for a, b in chunks], dim=2)
    weights = torch.linspace(-1, 1, found.numel(), device="cuda").view_as(found)
    grads, expected_grads = (
        torch.autograd.grad((y.float() * weights).sum(), tensors) for y in (found, expected)
    )
    close = (
        {"atol": 3e-2, "rtol": 3e-2} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    )
    torch.testing.assert_close(found.float(), expected, **close)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a.float(), b.float(), **close)
    one = dense(*(x.float() for x in tensors), torch.zeros_like(segments))  # control
    assert not torch.allclose(torch.cat([one[:, :, a:b] for a, b in chunks], dim=2), expected)


def test_memory_doubles_with_the_tokens():
    peaks = []
    for length in (4096, 8192):
        tensors = inputs(length, 2, torch.bfloat16)
        segments = (torch.arange(length) // 1000)[None]
        quarter = length // 4
        chunks = ((quarter, 2 * quarter), (2 * quarter, 3 * quarter))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(by_documents(*tensors, segments, chunks).float().sum(), tensors)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.5 * peaks[0]  # 4 with scores of [tokens, tokens]
