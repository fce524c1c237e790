"""Which validated states of a phase are its best, and when it has stopped getting better."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ValidationRules:
    """What follows from validation losses; by default nothing.

    Attributes:
        save_top_k: So many states of lowest loss are kept, and the phase ends with the best one.
        patience: The phase ends after so many validations without a loss that is lower by more than
            `min_delta` than the lowest so far; None: never.
        min_delta: In nats a token.
    """

    save_top_k: int = 0
    patience: int | None = None
    min_delta: float = 0.0


class Validations:
    """Validation losses of a phase.

    Args:
        rules: What they are for.
        losses: Of an earlier part of the phase, by step.
        saved: Steps whose state is on disk.
        settled_after: Up to this step the model is not yet what will be served (fake quantization is
            partly off, or has more bits): losses of those steps are never the best.
    """

    def __init__(
        self,
        rules: ValidationRules,
        losses: Mapping[int, float],
        saved: Collection[int],
        settled_after: int,
    ) -> None:
        self.rules, self._settled_after = rules, settled_after
        counted = {s: losses[s] for s in sorted(losses) if s > settled_after}
        self.losses = {step: _comparable(loss) for step, loss in counted.items()}
        self._candidates = {s: x for s, x in self.losses.items() if s in saved}

    def add(self, step: int, loss: float) -> bool:
        """Takes the loss after a step; whether its state belongs to those that are kept."""
        if step <= self._settled_after:
            return False
        self.losses[step] = self._candidates[step] = _comparable(loss)
        return step in self.best()

    def best(self) -> list[int]:
        """Steps of the states that are kept, best first; of equal ones the earlier."""
        ranked = sorted(self._candidates, key=lambda step: (self._candidates[step], step))
        return ranked[: self.rules.save_top_k]

    def has_stalled(self) -> bool:
        """Whether the last `patience` validations were no better than the best one before them."""
        if self.rules.patience is None:
            return False
        lowest, waited = math.inf, 0
        for loss in self.losses.values():
            is_better = loss < lowest - self.rules.min_delta
            lowest, waited = (loss, 0) if is_better else (lowest, waited + 1)
        return waited >= self.rules.patience


def _comparable(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
