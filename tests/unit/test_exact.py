import torch

from mqat.parallel.exact import ordered_linear, sharded_linear
from tests.launch import torchrun


class Alone:
    """A group of one rank."""

    def size(self):
        return 1

    def rank(self):
        return 0


def test_shards_of_rows_give_the_same_bits_as_one_rank():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(32, 96, generator=generator), torch.randn(48, 96, generator=generator)
    rows = torch.cat([sharded_linear(x, w[:24], 2), sharded_linear(x, w[24:], 2)], dim=1)
    assert torch.equal(sharded_linear(x, w, 4), rows)
    torch.testing.assert_close(rows, x @ w.t())


def test_shards_of_features_are_added_up_in_float32():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(32, 96, generator=generator), torch.randn(48, 96, generator=generator)
    whole, overflow = ordered_linear(x, w, 4, Alone())
    torch.testing.assert_close(whole, x @ w.t())
    assert not overflow
    by_hand = x[:, :24] @ w[:, :24].contiguous().t()
    for start in (24, 48, 72):
        by_hand = by_hand + x[:, start : start + 24] @ w[:, start : start + 24].contiguous().t()
    torch.testing.assert_close(whole, by_hand, rtol=1e-6, atol=1e-6)
    half = ordered_linear(x.bfloat16(), w.bfloat16(), 4, Alone())[0]
    assert half.dtype == torch.bfloat16
    assert not torch.equal(half.float(), whole)  # control


def test_values_that_are_not_finite_raise_the_flag():
    x, w = torch.ones(2, 4), torch.ones(2, 4)
    assert not ordered_linear(x, w, 1, Alone())[1]
    x[1, 2] = float("nan")
    assert ordered_linear(x, w, 2, Alone())[1]
    x[1, 2] = float("inf")
    assert ordered_linear(x, w, 2, Alone())[1]


def test_ranks_give_the_bits_of_one_rank(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = torchrun(2, script)
    assert done.returncode == 0, done.stderr[-4000:]


WORKER = """
import torch
import torch.distributed as dist
from mqat.parallel.exact import ordered_linear
from tests.unit.test_exact import Alone

dist.init_process_group("gloo")
rank = dist.get_rank()
for dtype in (torch.float32, torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 96, generator=generator).to(dtype)  # 21 tokens, which two ranks share unevenly
    w = torch.randn(48, 96, generator=generator).to(dtype)
    whole, _ = ordered_linear(x, w, 4, Alone())
    half = slice(48 * rank, 48 * (rank + 1))
    part, _ = ordered_linear(x[..., half], w[:, half], 2, dist.group.WORLD)
    one, _ = ordered_linear(x[:1, :1, half], w[:, half], 2, dist.group.WORLD)
    assert one.shape == (1, 1, 48)  # one rank has no token of its own
    assert bool((part == 0).view(21, -1).all(dim=1).sum() in (10, 11))
    dist.all_reduce(part)
    assert torch.equal(part, whole)
    plain = x[..., half] @ w[:, half].t()
    dist.all_reduce(plain)
    assert not torch.equal(plain, whole)  # control: float sums do depend on the order
dist.destroy_process_group()
"""
