import torch

from mqat.parallel.exact import fixed_point_linear, from_fixed_point, tiled_linear


def test_split_over_ranks_gives_the_same_bits_as_one_rank():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(32, 96, generator=generator), torch.randn(48, 96, generator=generator)
    whole, _ = fixed_point_linear(x, w, 4)
    halves = [fixed_point_linear(x[:, part], w[:, part], 2)[0]
              for part in (slice(0, 48), slice(48, 96))]  # fmt: skip
    assert torch.equal(whole, halves[0] + halves[1])
    rows = torch.cat([tiled_linear(x, w[:24], 2), tiled_linear(x, w[24:], 2)], dim=1)
    assert torch.equal(tiled_linear(x, w, 4), rows)
    torch.testing.assert_close(from_fixed_point(whole, torch.float32), x @ w.t())
    plain = x[:, :48] @ w[:, :48].t() + x[:, 48:] @ w[:, 48:].t()
    assert not torch.equal(plain, x @ w.t())  # control: float sums do depend on the split


def test_values_out_of_range_raise_the_flag():
    x, w = torch.full((1, 4), 1e6), torch.ones(2, 4)
    assert fixed_point_linear(x, w, 1)[1]
    assert not fixed_point_linear(x / 1e6, w, 1)[1]
    assert fixed_point_linear(x * float("nan"), w, 1)[1]
