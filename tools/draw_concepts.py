"""Draws the pictures of docs/concepts.md: `python tools/draw_concepts.py` writes docs/pictures/*.svg."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

OUT = Path(__file__).parents[1] / "docs" / "pictures"
BLUE, GREEN, RED, GREY, YELLOW = "#d5e6f7", "#d6efdd", "#f8dad3", "#eceff4", "#fbf0cc"


class Picture:
    """Boxes, arrows and words on white, so that it reads on light and dark pages."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title = (width, height), title
        self.parts: list[str] = []

    def box(
        self, x: float, y: float, w: float, h: float, lines: str | Sequence[str], fill: str = GREY
    ) -> None:
        """A box with one or more centred lines."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{fill}" stroke="#556"/>'
        )
        lines = [lines] if isinstance(lines, str) else lines
        top = y + h / 2 - 8 * (len(lines) - 1) + 4.5
        for number, line in enumerate(lines):
            self.text(x + w / 2, top + 16 * number, line, anchor="middle")

    def text(
        self, x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal"
    ) -> None:
        """One line."""
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, *, dashed: bool = False) -> None:
        """From the first point to the second."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#334" stroke-width="1.4" '
            f'marker-end="url(#head)"{dash}/>'
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.6) -> None:
        """A polyline."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
        )

    def write(self, name: str) -> None:
        """Writes `docs/pictures/<name>.svg`."""
        width, height = self.size
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="#334"/></marker>'
        )
        body = "\n".join(self.parts)
        OUT.mkdir(exist_ok=True)
        (OUT / f"{name}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="system-ui, sans-serif" font-size="13" fill="#223" '
            f'role="img">\n<title>{escape(self.title)}</title>\n<defs>{head}</defs>\n'
            f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>\n{body}\n</svg>\n',
            encoding="utf-8",
        )


def layouts() -> None:
    """Eight processes as TP 2 x PP 2 x DP 2, and what each holds."""
    p = Picture(760, 330, "Eight processes: TP 2 x PP 2 x DP 2")
    for replica, top in enumerate((50, 190)):
        p.text(20, top + 12, f"replica {replica} (DP)", weight="bold")
        for stage, left in enumerate((150, 450)):
            for half in range(2):
                rank = stage * 4 + replica * 2 + half
                y = top - 14 + half * 52
                held = "layers 0, 1" if stage == 0 else "layers 2, 3"
                p.box(left, y, 200, 46, [f"rank {rank}", f"{held}, half {half} of weights"],
                      BLUE if half == 0 else YELLOW)  # fmt: skip
            if stage == 0:
                p.arrow(354, top + 34, 446, top + 34)
                p.text(400, top + 26, "activations", anchor="middle")
        p.text(665, top + 38, "TP: sums", anchor="start")
    p.text(250, 20, "stage 0 (PP)", anchor="middle", weight="bold")
    p.text(550, 20, "stage 1 (PP)", anchor="middle", weight="bold")
    for x in (250, 550):
        p.arrow(x, 142, x, 172)
        p.arrow(x, 172, x, 142)
        p.text(x + 8, 162, "gradients, DP: sums")
    p.text(20, 318, "The checkpoint knows none of this: it holds whole tensors, and an export "
           "may ask for any other TP and PP.")  # fmt: skip
    p.write("layouts")


def fake_quantization() -> None:
    """What the forward and the backward pass see of a weight."""
    p = Picture(760, 320, "Fake quantization")
    p.text(20, 26, "forward: the value that the server will have", weight="bold")
    x0, y0, step = 190, 160, 24
    p.line([(x0 - 150, y0), (x0 + 150, y0)], "#99a", 1)
    p.line([(x0, y0 - 115), (x0, y0 + 115)], "#99a", 1)
    stairs: list[tuple[float, float]] = []
    for code in range(-4, 5):
        left, right = (code - 0.5) * step, (code + 0.5) * step
        left, right = (max(left, -140), min(right, 140))
        if code == -4:
            left = -140
        if code == 4:
            right = 140
        stairs += [(x0 + left, y0 - code * step), (x0 + right, y0 - code * step)]
    p.line([(x0 - 110, y0 + 110), (x0 + 110, y0 - 110)], "#99a", 1)
    p.line(stairs, "#c8452f", 2.2)
    p.text(x0 + 86, y0 + 16, "w")
    p.text(x0 + 8, y0 - 104, "scale x code")
    p.text(x0 - 150, y0 + 136, "codes end at the largest: beyond it w is clipped")
    p.text(420, 26, "backward: straight through", weight="bold")
    p.box(430, 50, 130, 40, "w, full precision", BLUE)
    p.box(600, 50, 130, 40, ["quantized:", "codes"], RED)
    p.arrow(560, 62, 598, 62)
    p.box(600, 140, 130, 40, "GEMM, as served", GREEN)
    p.arrow(665, 90, 665, 138)
    p.box(430, 140, 130, 40, ["gradient, zero", "where clipped"], YELLOW)
    p.arrow(598, 160, 562, 160)
    p.arrow(495, 138, 495, 92, dashed=True)
    p.text(430, 218, "The optimizer moves w; its code changes once")
    p.text(430, 236, "w has moved far enough. Weights are quantized")
    p.text(430, 254, "once per optimizer step, for all microbatches.")
    p.write("fake-quantization")


def amax_reduction() -> None:
    """Why scales do not depend on the layout."""
    p = Picture(760, 300, "Amax reduction over ranks")
    for number, (seen, value) in enumerate((("tokens 0 to 99", "3.1"), ("tokens 100 to 199", "7.9"),
                                            ("no token (an idle expert)", "-inf"))):  # fmt: skip
        y = 40 + 80 * number
        p.box(20, y, 190, 50, [f"rank {number}", seen], BLUE)
        p.arrow(210, y + 25, 258, y + 25)
        p.box(260, y, 110, 50, ["amax", value], YELLOW)
        p.arrow(370, y + 25, 438, 145)
    p.box(440, 110, 130, 70, ["one MAX", "over TP x DP x CP,", "all quantizers"], GREEN)
    p.arrow(570, 145, 608, 145)
    p.box(610, 110, 130, 70, ["amax 7.9", "scale 7.9 / 127", "on every rank"], RED)
    p.text(20, 285, "A maximum merges exactly, and so do histograms of integers: the scales are "
           "bit-equal at any TP, PP, DP, CP.")  # fmt: skip
    p.write("amax")


def export() -> None:
    """From a checkpoint of one layout to files for another."""
    p = Picture(760, 300, "Export")
    p.text(20, 26, "trained at TP 3", weight="bold")
    for rank in range(3):
        p.box(20, 44 + 56 * rank, 110, 44, f"training rank {rank}", BLUE)
        p.arrow(130, 66 + 56 * rank, 178, 122)
    p.box(
        180, 72, 150, 100, ["checkpoint", "whole tensors,", "frozen scales,", "mqat.json"], YELLOW
    )
    p.text(360, 26, "for every inference rank: read slices, quantize, pack", weight="bold")
    for rank in range(2):
        y = 66 + 72 * rank
        p.arrow(330, 122, 378, y + 22)
        p.box(380, y, 150, 44, f"rank{rank}.safetensors", RED)
        p.arrow(530, y + 22, 588, 122)
    p.box(590, 92, 150, 60, ["mqat verify:", "an own decoder"], GREEN)
    p.line([(255, 172), (255, 232)], "#334", 1.2)
    p.line([(255, 232), (665, 232)], "#334", 1.2)
    p.arrow(665, 232, 665, 154)
    p.text(270, 252, "every tensor bit for bit; linears, layers and logits on the trainer's inputs")
    p.text(20, 282, "No GPU, no process group, memory for some rows at a time; the same bytes "
           "whatever layout trained.")  # fmt: skip
    p.write("export")


if __name__ == "__main__":
    layouts()
    fake_quantization()
    amax_reduction()
    export()
