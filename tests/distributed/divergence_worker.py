"""Run by torchrun: distillation losses of a vocabulary cut over all ranks, against whole rows."""

import json
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from mqat.parallel import cross_entropy as chunked
from mqat.parallel.cross_entropy import chunked_cross_entropy
from mqat.parallel.divergence import DIVERGENCES, DistillationLoss, distillation_losses
from mqat.runtime import groups

TOKENS, VOCAB, PADDED = 9, 37, 40


def expected(student: Tensor, teacher: Tensor, labels: Tensor, loss: DistillationLoss) -> Tensor:
    """By definition, from log-probabilities of all tokens."""
    s, t = (x[:, :VOCAB] / loss.temperature for x in (student, teacher))
    if loss.top_k is not None:
        best = t.sort(dim=1, descending=True, stable=True).indices[:, : loss.top_k]
        s, t = s.gather(1, best), t.gather(1, best)
    if loss.divergence == "reverse_kl":
        s, t = t, s
    divergence = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
    entropy = cross_entropy(student[:, :VOCAB], labels, reduction="none")
    return loss.weight * loss.temperature**2 * divergence + (1 - loss.weight) * entropy


def main() -> None:
    groups.join("gloo")
    group, columns = dist.group.WORLD, PADDED // dist.get_world_size()
    own = slice(group.rank() * columns, (group.rank() + 1) * columns)
    chunked.CHUNK_ELEMENTS = 4 * columns  # the last chunk is a shorter one
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(TOKENS, PADDED, generator=generator) for _ in range(2))
    teacher[:, ::3] = teacher[:, :1]  # as likely as each other, on every rank
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    upstream = torch.rand(TOKENS, generator=generator)
    worst: dict[str, float] = {"loss": 0.0, "gradient": 0.0}
    for choice in product(DIVERGENCES, (1.0, 0.3), (1.0, 2.5), (None, 5, VOCAB)):
        loss = DistillationLoss(*choice)
        whole, mine = student.clone().requires_grad_(), student[:, own].clone().requires_grad_()
        wanted = expected(whole, teacher, labels, loss)
        (wanted * upstream).sum().backward()
        found, _, _ = distillation_losses(
            mine,
            lambda start, stop: teacher[start:stop, own],
            labels,
            loss,
            vocab_size=VOCAB,
            group=group,
        )
        (found * upstream).sum().backward()
        assert torch.equal(mine, student[:, own]) and torch.equal(labels, labels.clamp(0, VOCAB))
        assert whole.grad is not None and mine.grad is not None
        pairs = {"loss": (found, wanted), "gradient": (mine.grad, whole.grad[:, own])}
        for key, (x, y) in pairs.items():
            worst[key] = max(worst[key], float((x - y).abs().max()))
    whole, mine = student.clone().requires_grad_(), student[:, own].clone().requires_grad_()
    wanted = cross_entropy(whole[:, :VOCAB], labels, reduction="none")
    (wanted * upstream).sum().backward()
    found = chunked_cross_entropy(mine, labels, vocab_size=VOCAB, group=group)
    (found * upstream).sum().backward()
    worst["entropy"] = float((found - wanted).abs().max())
    worst["slope"] = float((mine.grad - whole.grad[:, own]).abs().max())
    with torch.no_grad():
        assert torch.equal(
            chunked_cross_entropy(mine, labels, vocab_size=VOCAB, group=group), found
        )
        unmasked = chunked_cross_entropy(mine, labels, vocab_size=PADDED, group=group)
    assert not torch.allclose(unmasked, wanted, atol=1e-3)  # control: padding would take its share
    everywhere = groups.gathered(worst)
    if groups.is_main():
        print(json.dumps({key: max(each[key] for each in everywhere) for key in worst}))
    groups.finalize()


if __name__ == "__main__":
    main()
