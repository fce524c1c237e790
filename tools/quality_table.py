"""Perplexity of a model under every algorithm: unquantized, PTQ, recipe, QAT.

    python tools/quality_table.py --rows int8 int4_g64 --json quality.json --markdown docs/quality.md

Each row is a run of `examples/gpt_qat.py` in its own directory, with the settings below on top of
`--config`; a row that an earlier call finished is not run again, one that was interrupted goes on.
`--peers` adds a column from what `tools/quality_peers.py` wrote: the same model, calibration samples
and held-out text under another system's algorithm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_AWQ = {"smoothquant": "true", "sq_alpha": "null", "sq_grid": "float",
        "weight_calibrator": "awq"}  # fmt: skip
_QAD = {"quantization.distill.weight": "1"}


@dataclass(frozen=True)
class Row:
    """One algorithm.

    Attributes:
        title: For people.
        settings: Of `quantization` in the configuration; keys with a dot are of all of it.
    """

    title: str
    settings: dict[str, str]

    def overrides(self) -> list[str]:
        """As arguments of an example."""
        prefixed = {k if "." in k else f"quantization.{k}": v for k, v in self.settings.items()}
        return [f"{key}={value}" for key, value in prefixed.items()]


ROWS = {
    "bf16": Row("unquantized", {"algorithm": "null"}),
    "int8": Row("INT8", {"algorithm": "int8"}),
    "int8_sq": Row("INT8, SmoothQuant", {"algorithm": "int8_sq"}),
    "int8_pc_pt": Row(
        "INT8, inputs per token, SmoothQuant", {"algorithm": "int8_pc_pt", "smoothquant": "true"}
    ),
    "int8_wo": Row("INT8, weights only", {"algorithm": "int8_wo"}),
    "fp8": Row("FP8", {"algorithm": "fp8"}),
    "fp8_pc_pt": Row("FP8, per channel and token", {"algorithm": "fp8_pc_pt"}),
    "int4": Row("INT4 g128", {"algorithm": "int4"}),
    "int4_awq": Row("INT4 g128, AWQ", {"algorithm": "int4_awq"}),
    "int4_awq_qad": Row("INT4 g128, AWQ, QAD", {"algorithm": "int4_awq", **_QAD}),
    "int4_g64_gptq": Row(
        "INT4 g64, AWQ + GPTQ", {"algorithm": "int4_awq", "group_size": "64", "rounding": "gptq"}
    ),
    "uint4_g64_gptq": Row(
        "INT4 g64 with zero points, AWQ + GPTQ",
        {"algorithm": "w_uint4_asym", "group_size": "64", "rounding": "gptq", **_AWQ},
    ),
    "8da4w": Row(
        "8da4w: INT4 g32 + INT8 inputs per token, AWQ; QAT at 3e-4",
        {"algorithm": "8da4w", "group_size": "32", "model.optim.lr": "3e-4", **_AWQ},
    ),
    "w4a8": Row(
        "INT4 g64 + INT8 inputs, AWQ + GPTQ",
        {"algorithm": "int4_w_int8_a", "group_size": "64", "rounding": "gptq", **_AWQ},
    ),
    "w4a8_awq": Row("INT4 g128 + FP8 inputs, AWQ", {"algorithm": "w4a8_awq"}),
    "nvfp4": Row("NVFP4", {"algorithm": "nvfp4"}),
    "nvfp4_46": Row(
        "NVFP4, four over six", {"algorithm": "nvfp4", "weight_calibrator": "four_over_six"}
    ),
    "nvfp4_awq": Row("NVFP4, AWQ", {"algorithm": "nvfp4", **_AWQ}),
    "nvfp4_qad": Row("NVFP4, AWQ, QAD", {"algorithm": "nvfp4", **_AWQ, **_QAD}),
    "mxfp4": Row("MXFP4", {"algorithm": "mxfp4"}),
    "mxfp4_awq": Row("MXFP4, AWQ", {"algorithm": "mxfp4", **_AWQ}),
    "mxfp4_gptq": Row("MXFP4, AWQ + GPTQ", {"algorithm": "mxfp4", "rounding": "gptq", **_AWQ}),
    "mxfp4_qad": Row("MXFP4, AWQ, QAD", {"algorithm": "mxfp4", **_AWQ, **_QAD}),
    "mxfp8": Row("MXFP8", {"algorithm": "mxfp8"}),
    "nf4": Row("NF4", {"algorithm": "nf4"}),
    "w_int4_sym": Row("INT4 g128, step amax / 7.5", {"algorithm": "w_int4_sym"}),
    "w_uint4_asym": Row("UINT4 g128, zero points", {"algorithm": "w_uint4_asym"}),
}  # fmt: skip


def read_finished(summary: Path) -> dict[str, Any] | None:
    """`summary.json` of a run that came to its end; None: there is none, or it did not."""
    if not summary.is_file():
        return None
    found: dict[str, Any] = json.loads(summary.read_text("utf-8"))
    return found if found["finished"] else None


def run(name: str, directory: Path, steps: int, config: Path, extra: list[str]) -> dict[str, Any]:
    """The row's `summary.json`, from an earlier run or from a new one."""
    summary = directory / "summary.json"
    found = read_finished(summary)
    if found is None:
        recipe = "sft" if name == "bf16" else ("qat" if steps else "ptq")
        command = [
            sys.executable, str(ROOT / "examples" / f"gpt_{recipe}.py"),
            "--config", str(config.resolve()),
            f"exp_manager.exp_dir={directory}", *([f"trainer.max_steps={steps}"] if steps else []),
            *ROWS[name].overrides(), *extra,
        ]  # fmt: skip
        subprocess.run(command, check=True, cwd=ROOT)
        found = read_finished(summary)
        assert found is not None, f"{summary}: the run ended without an error, yet did not finish"
    return found


def markdown(results: dict[str, Any], peers: dict[str, Any]) -> str:
    """The table, perplexities with their distance from the unquantized model's in percent."""
    base = results.get("bf16", {}).get("ppl", {})

    def cell(value: float | None, reference: float | None) -> str:
        if value is None:
            return "-"
        share = f" ({100 * (value / reference - 1):+.1f}%)" if reference else ""
        return f"{value:.2f}{share}"

    lines = [
        "| algorithm | PTQ | PTQ with the recipe | modelopt, PTQ | QAT |",
        "|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        is_base = name == "bf16"
        ppl = results.get(name, {}).get("ppl", {})
        peer = peers.get("null" if is_base else name, {}).get("ppl")
        if not ppl and peer is None:
            continue
        start, tuned = base.get("bf16"), base.get("bf16_finetuned")
        cells = (
            [cell(ppl.get("bf16"), None), "-", cell(peer, None), cell(tuned, None)]
            if is_base
            else [
                cell(ppl.get("ptq"), start),
                cell(ppl.get("ptq_prepared"), start),
                cell(peer, start),
                cell(ppl.get("qat"), tuned),
            ]
        )
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the rows, then writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--config", type=Path, default=ROOT / "conf" / "quality_smollm2.yaml")
    parser.add_argument("--steps", type=int, default=60, help="of QAT; 0: PTQ only")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--markdown", type=Path, help="only the part between the markers of --config changes"
    )
    parser.add_argument("--peers", type=Path, help="from tools/quality_peers.py")
    options, extra = parser.parse_known_args()
    for name in options.rows:
        run(name, (options.runs / name).resolve(), options.steps, options.config, extra)
    results = {
        name: {key: found[key] for key in ("ppl", "loss", "tokens", "seconds") if key in found}
        for name in ROWS
        if (found := read_finished(options.runs / name / "summary.json")) is not None
    }
    peers = json.loads(options.peers.read_text("utf-8")) if options.peers else {}
    table = markdown(results, peers)
    print(table)
    if options.json:
        options.json.write_text(json.dumps({"mqat": results, "peers": peers}, indent=1) + "\n")
    if options.markdown:
        name = options.config.stem
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        text = options.markdown.read_text("utf-8")
        if begin not in text:
            raise SystemExit(f"error: {options.markdown}: no line {begin.strip()!r} to write after")
        before, rest = text.split(begin, 1)
        options.markdown.write_text(before + begin + table + end + rest.split(end, 1)[1])


if __name__ == "__main__":
    main()
