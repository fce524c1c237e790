"""What verification found, as numbers and in words: what was compared, what was not, with what."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Report:
    """What verification found."""

    problems: list[str] = field(default_factory=list)  # each names a file or tensor
    num_files: int = 0  # with weights
    form: str | None = None  # what kind of directory, for which layout
    num_tensors: int = 0  # in these files
    num_linears: int = 0  # as stored: servers fuse some that others keep apart
    linears: dict[str, int] = field(default_factory=dict)  # how they are stored -> how many
    checkpoint: str | None = None  # that the directory was compared with
    compared_with_checkpoint: bool = False  # every tensor was compared bit for bit
    positions: int | None = None  # whose logits were compared
    mean_kl: float | None = None  # from training's next-token distribution to the exported, in nats
    top1_agreement: float | None = None  # share of positions with the same most likely token
    max_abs_difference: float | None = None  # of two logits
    noise: float | None = None  # relative, on the input of every linear, for the two below
    noise_kl: float | None = None  # of the export with noise, against itself without
    noise_top1_agreement: float | None = None  # likewise
    worst_linear: float | None = None  # error on the trainer's own inputs, relative
    worst_layer: float | None = None  # likewise, of what a layer adds
    recorded: str | None = None  # what became of the logits that training recorded

    @property
    def ok(self) -> bool:
        """Whether the directory may be served."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return asdict(self) | {"ok": self.ok, "lines": self.lines()}

    def headline(self) -> str:
        """One line for people."""
        if not self.ok:
            count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
            return f"FAILED, {count}, first: {self.problems[0]}"
        parts = [f"verified, {_count(self.num_files, 'file')} of weights"]
        if self.compared_with_checkpoint:
            parts.append(f"every tensor equal to the checkpoint {self.checkpoint}")
        if self.mean_kl is not None:
            parts.append(f"logits within rounding (KL {self.mean_kl:.1e})")
        return ", ".join(parts)

    def lines(self) -> list[str]:
        """What was compared and what was not, a sentence each."""
        found = []
        if self.form is not None:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.linears.items())
            found.append(
                f"read: {self.form}, {_count(self.num_tensors, 'tensor')} in "
                f"{_count(self.num_files, 'file')}; {_count(self.num_linears, 'linear')} ({kinds})"
            )
        if self.ok:
            found += self._compared()
        if missing := self._not_compared():
            found.append(f"not compared: {'; '.join(missing)}")
        return found

    def _compared(self) -> list[str]:
        found = []
        if self.compared_with_checkpoint:
            served = (
                "config.json describes its model, and every tensor is bit for bit what follows from it: "
                "codes on the frozen grid, scales, zero points, norms, biases, tables"
            )
            own = "every tensor is bit for bit the checkpoint's"  # of adapters, of a .nemo
            found.append(
                f"checkpoint: made from {self.checkpoint}. {own if self.form is None else served}"
            )
        if self.worst_linear is not None and self.worst_layer is not None:
            found.append(
                "linears and layers: each computed again, on the inputs that it has in the training "
                f"model; linears within {self.worst_linear:.1e}, what layers add within "
                f"{self.worst_layer:.1e} (relative, median over tokens)"
            )
        if self.mean_kl is not None and self.top1_agreement is not None:
            found.append(
                f"logits: of {_count(self.positions or 0, 'position')} against the training model, KL "
                f"{self.mean_kl:.2e}, same top token {self.top1_agreement:.1%} (the export with noise "
                f"of {self.noise:.0e} against itself: KL {self.noise_kl:.2e}, "
                f"{self.noise_top1_agreement:.1%})"
            )
        return found + ([f"training: {self.recorded}"] if self.recorded else [])

    def _not_compared(self) -> list[str]:
        found = []
        if not self.compared_with_checkpoint:
            found.append(
                "tensors with the checkpoint they were made from (give it as --reference)"
                if self.ok
                else "tensors with a checkpoint"
            )
        if self.worst_linear is None:
            found.append("linears and layers with the training model")
        if self.mean_kl is None:
            found.append("logits with the training model")
        return [*found, "tokenizer files, which are copied; a server and what it builds"]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
