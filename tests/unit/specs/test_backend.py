"""Attention of packed documents runs in a fused kernel, whatever a device's kernels take."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mqat.specs.backend import SdpaAttention

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Config:
    context_parallel_size = 1
    window_size = window_attn_skip_freq = None
    softmax_type = "vanilla"
    kv_channels = 16
    attention_dropout = 0.0
    sequence_parallel = False


class Called(TorchDispatchMode):
    """Remembers the key heads that the fused kernel was given, and the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.heads, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is FUSED:
            self.heads.append(args[1].shape[1])
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def as_cuda_chooses(query, key, value, attn_mask=None, dropout_p=0.0, enable_gqa=False, **_):
    """No kernel there takes a mask together with fewer heads of keys (torch 2.13, sdp_utils.cpp)."""
    if enable_gqa and attn_mask is not None:
        return SDPBackend.MATH.value
    return SDPBackend.EFFICIENT_ATTENTION.value


def attend(heads, groups, mask, length=64):
    attention = SdpaAttention(Config, 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(length, 2, n, 16, generator=generator, requires_grad=True)
        for n in (heads, groups, groups)
    )
    with Called() as called:
        y = attention(q, k, v, mask)
        grads = torch.autograd.grad(y.square().sum(), [q, k, v])
    return y.detach(), grads, called


def documents(length=64):
    """Megatron's mask of two packed documents: True where a query must not look."""
    number = torch.arange(length) // (length // 2)
    same = number[:, None] == number
    return ~(same & torch.ones(length, length, dtype=torch.bool).tril())[None, None].expand(
        2, 1, -1, -1
    )


def test_keys_are_repeated_where_no_fused_kernel_takes_groups(monkeypatch):
    y, grads, called = attend(8, 2, documents())
    assert called.heads == [2]  # CPUs have one that does
    monkeypatch.setattr(torch, "_fused_sdp_choice", as_cuda_chooses)
    found, found_grads, called = attend(8, 2, documents())
    assert called.heads == [8]
    assert called.largest <= max(2 * 8 * 64 * 16, 2 * 64 * 64)  # no scores of every head
    torch.testing.assert_close(found, y)
    for a, b in zip(found_grads, grads, strict=True):
        torch.testing.assert_close(a, b)
    unmasked, _, called = attend(8, 2, None)
    assert called.heads == [2]  # flash attention takes those
    assert not torch.allclose(unmasked, y)  # control: the mask matters
    with sdpa_kernel(SDPBackend.MATH):
        scores = attend(8, 2, documents())[2]
    assert scores.heads == [] and scores.largest >= 2 * 8 * 64 * 64  # control: what is avoided


@pytest.mark.parametrize("groups", [2, 8])
def test_packed_documents_equal_documents_alone(groups):
    y, _, called = attend(8, groups, documents())
    assert called.heads == [groups]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(64, 2, n, 16, generator=generator) for n in (8, groups, groups))
    alone = []
    for own in (slice(0, 32), slice(32, 64)):
        parts = (x[own].permute(1, 2, 0, 3) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        alone.append(out.permute(2, 0, 1, 3).reshape(32, 2, -1))
    torch.testing.assert_close(y, torch.cat(alone))
