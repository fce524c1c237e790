"""What a teacher's step sums up, on one process."""

import torch

from tests.unit.model_fixtures import MODEL, microbatches


def test_only_answers_are_learned_of_a_teacher(calibrated):
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.config import ModelConfig
    from mqat.parallel.divergence import DistillationLoss
    from mqat.specs.model import build_model
    from mqat.training.distillation import Teacher
    from mqat.training.step import forward_backward

    chunks = calibrated("int8")
    frozen = build_model(MODEL, ModelConfig(), {}, torch.float32)
    load_pretrained_(frozen, RandomWeights(MODEL, 2, 0.1))
    teacher = Teacher(frozen, DistillationLoss(weight=0.5), hidden_weight=0.5)
    assert not any(p.requires_grad for p in frozen[0].parameters())

    def sums(mask):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        batches = [batch | {"loss_mask": mask} for batch in microbatches()]
        found = forward_backward(chunks, batches, teacher=teacher)
        gradient = torch.cat([p.main_grad.flatten() for p in chunks[0].parameters()])
        # Megatron divides gradients by the number of tokens.
        return torch.tensor(list(found.values())), gradient * found["tokens"], list(found)

    answers = torch.zeros(2, 32)
    answers[0, 5:9] = answers[1, 20:] = 1
    both, whole, names = sums(torch.ones(2, 32))
    parts = [sums(mask) for mask in (answers, 1 - answers)]
    assert names == ["loss", "tokens", "divergence", "cross_entropy", "hidden_distance"]
    assert torch.allclose(parts[0][0] + parts[1][0], both, rtol=1e-5)
    assert parts[0][0][1] == 2 * 16  # tokens of two microbatches
    assert not torch.allclose(parts[0][0], both, rtol=0.1)  # control
    apart = (parts[0][1] + parts[1][1] - whole).norm() / whole.norm()
    assert float(apart) < 1e-4 and float(parts[0][1].norm()) > 0
