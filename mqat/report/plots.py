"""Pictures of the pages: SVG that stands inside the HTML, drawn by matplotlib."""

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from mqat.errors import UserError
from mqat.report.advice import LOW_DB

# The same for a model on every page and in every curve.
COLOURS = {
    "bf16": "#4c566a", "bf16_finetuned": "#2a78b8", "ptq": "#c8452f", "ptq_prepared": "#d98e2b",
    "qat": "#2f9e5b",
}  # fmt: skip
_OF_PHASE = {"baseline": "bf16_finetuned", "sft": "bf16_finetuned", "qat": "qat"}


def check_plots() -> None:
    """Raises UserError if matplotlib is not installed; meant to run before anything else."""
    if find_spec("matplotlib") is None:
        raise UserError("report: plots need matplotlib; pip install 'mqat[report]'.")


def _svg(figure: Any) -> str:
    """The picture without a prologue, so that it can stand in a page; the same bytes each time."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mqat"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def sqnr_by_layer(linears: Sequence[Mapping[str, Any]]) -> str:
    """SQNR of outputs and clipped inputs by depth; a line for each kind of linear."""
    from matplotlib.figure import Figure

    kinds: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for entry in sorted(linears, key=lambda entry: entry["layer"] or 0):
        module = entry["module"]
        if "is_idle" in entry:  # an expert, the worst of its layer
            module = f"worst expert, {module.rpartition('.')[2]}"
        kinds.setdefault(module, []).append((entry["layer"] or 0, entry))
    figure = Figure(figsize=(11, 6), layout="constrained")
    above, below = figure.subplots(2, 1)
    for kind, entries in kinds.items():
        layers = [layer for layer, _ in entries]
        above.plot(layers, [e["output_sqnr_db"] for _, e in entries], marker="o", label=kind)
        inputs = [100 * e["input"]["clip_rate"] if e["input"] else 0.0 for _, e in entries]
        below.plot(layers, inputs, marker="o", label=kind)
    above.set(ylabel="SQNR of the output, dB", title="Signal to quantization noise by layer")
    above.axhline(LOW_DB, color="tab:red", linewidth=0.8, linestyle="--")
    figure.legend(*above.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    below.set(xlabel="layer", ylabel="clipped inputs, %")
    return _svg(figure)


def loss_curves(
    phases: Mapping[str, Sequence[Mapping[str, float]]],
    levels: Mapping[str, float],
    names: Mapping[str, str],
) -> str:
    """Training losses of the phases over one axis, and the held-out loss of each model as a level.

    Args:
        phases: Name -> lines of `metrics.jsonl`, in order.
        levels: Model -> loss on the held-out text.
        names: Of phases and models, for people.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots()
    for phase, lines in phases.items():
        colour = COLOURS.get(_OF_PHASE.get(phase, ""), "#888888")
        steps, losses = [e["step"] for e in lines], [e["loss"] for e in lines]
        axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=1)
        axes.plot(steps, _smoothed(losses), color=colour, label=f"{names[phase]}, training text")
        held_out = [e for e in lines if "validation_loss" in e]
        axes.plot(
            [e["step"] for e in held_out], [e["validation_loss"] for e in held_out],
            color=colour, marker="o", linestyle="none",
        )  # fmt: skip
    for model, loss in levels.items():
        axes.axhline(
            loss, color=COLOURS.get(model, "#888888"), linestyle="--", linewidth=1.2,
            label=f"{names.get(model, model)}, held-out {loss:.3f}",
        )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return _svg(figure)


def gradient_norms(
    phases: Mapping[str, Sequence[Mapping[str, float]]], names: Mapping[str, str]
) -> str:
    """Norm of the gradient and learning rate by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for phase, lines in phases.items():
        colour = COLOURS.get(_OF_PHASE.get(phase, ""), "#888888")
        steps = [e["step"] for e in lines]
        left.plot(steps, [e["grad_norm"] for e in lines], color=colour, label=names[phase])
        right.plot(steps, [e["lr"] for e in lines], color=colour, label=names[phase], alpha=0.8)
    left.set(xlabel="optimizer step", ylabel="gradient norm")
    right.set(xlabel="optimizer step", ylabel="learning rate")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    return _svg(figure)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Mean of the last steps, a twentieth of all, at least five."""
    width = max(5, len(losses) // 20)
    return [sum(part) / len(part) for part in (
        losses[max(0, end - width) : end] for end in range(1, len(losses) + 1)
    )]  # fmt: skip
