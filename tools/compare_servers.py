"""Differences between the trainer's model and what servers compute of its exports, as a table.

    python tools/compare_servers.py --serve-python .venv-serve/bin/python --markdown docs/export.md

SmolLM2-135M, quantized without training, is exported in every form below; the trainer's model, the
reader of `mqat verify`, transformers and vLLM then tell the log-probability of every token of some
windows of held-out text (`tools/ask_server.py`). Checkpoints, exports and answers stay in `--work`: what
an earlier call finished is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run by its path, it sees its own folder only
from tools import ask_server

ROOT = Path(__file__).parents[1]
MARK = "served"
_OF_SERVE_PYTHON = ("vllm", "vllm-default", "llama.cpp")
BF16_NOISE, FLOAT32_NOISE = 2.0**-7, 1e-5  # those of `mqat verify`
_AWQ = {"weight_calibrator": "awq", "smoothquant": "true", "sq_alpha": "null", "sq_grid": "float"}


@dataclass(frozen=True)
class Form:
    """An export, and in which dtype it is compared.

    Attributes:
        title: For people.
        settings: Of `quantization`; empty: unquantized.
        dtype: Of the trainer's model and of servers; the reader computes in float32.
        style: As `mqat export`; `gguf` as its format.
        kv_cache: vLLM's dtype of keys and values.
        servers: Besides the trainer and, for Hugging Face directories, the reader.
    """

    title: str
    settings: Mapping[str, str]
    dtype: str = "float32"
    style: str = "compressed-tensors"
    kv_cache: str = "auto"
    servers: tuple[str, ...] = ("transformers", "vllm", "vllm-default")


_G64, _G32 = {"group_size": "64"}, {"group_size": "32"}
_Q8_0 = "[{pattern: '*', weight: {format: int8, granularity: 'group:32', scale: bfloat16}}]"
FORMS = {
    "plain": Form("unquantized", {}, servers=("transformers", "vllm")),
    "int8": Form("`int8`", {"algorithm": "int8"}, servers=("transformers", "vllm")),
    "int8_pc_pt": Form("`int8_pc_pt`", {"algorithm": "int8_pc_pt"}, servers=("transformers", "vllm")),
    "fp8": Form("`fp8`", {"algorithm": "fp8"}, servers=("transformers", "vllm")),
    "fp8_pc_pt": Form("`fp8_pc_pt`", {"algorithm": "fp8_pc_pt"}, servers=("transformers", "vllm")),
    "fp8_kv": Form(
        "`fp8`, FP8 caches", {"algorithm": "fp8", "kv_cache": "fp8"}, kv_cache="fp8_e4m3",
        servers=("vllm",),
    ),
    "plain_bf16": Form("unquantized", {}, "bfloat16", servers=("transformers", "vllm")),
    "int4": Form("`int4` g64", {"algorithm": "int4", **_G64}, "bfloat16"),
    "int4_awq": Form("`int4_awq` g64", {"algorithm": "int4_awq", **_G64}, "bfloat16"),
    "w_uint4_asym": Form(
        "`w_uint4_asym` g64, AWQ", {"algorithm": "w_uint4_asym", **_G64, **_AWQ}, "bfloat16",
        servers=("vllm", "vllm-default"),
    ),
    "fp8_bf16": Form("`fp8`", {"algorithm": "fp8"}, "bfloat16"),
    "fp8_modelopt": Form(
        "`fp8`, ModelOpt style", {"algorithm": "fp8"}, "bfloat16", "modelopt",
        servers=("vllm",),
    ),
    "gguf": Form("unquantized, GGUF", {}, style="gguf", servers=("llama.cpp",)),
    "q8_0": Form("`Q8_0`", {"algorithm": "null", "rules": _Q8_0}, style="gguf", servers=("llama.cpp",)),
    "q4_0": Form(
        "`int4` g32, `Q4_0`", {"algorithm": "int4", **_G32}, style="gguf", servers=("llama.cpp",)
    ),
    "q4_1": Form(
        "`w_uint4_asym` g32, `Q4_1`", {"algorithm": "w_uint4_asym", **_G32}, style="gguf",
        servers=("llama.cpp",),
    ),
    "fp8_pc_pt_modelopt": Form(
        "`fp8_pc_pt`, ModelOpt style", {"algorithm": "fp8_pc_pt"}, "bfloat16", "modelopt",
        servers=("vllm",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Between two answers.

    Attributes:
        mean: Of the absolute differences of the tokens' log-probabilities, in nats.
        perplexity: Of the second answer.
        texts: Greedy texts that are the same in both, of
        of_texts: so many.
    """

    mean: float
    perplexity: float
    texts: int
    of_texts: int


Answer = Mapping[str, Any]


def difference(reference: Answer, answer: Answer) -> Difference:
    """Of an answer from a reference, over the same request."""
    pairs = [
        pair
        for rows in zip(reference["logs"], answer["logs"], strict=True)
        for pair in zip(*rows, strict=True)
    ]
    same = [a == b for a, b in zip(reference["texts"], answer["texts"], strict=False)]
    return Difference(
        math.fsum(abs(a - b) for a, b in pairs) / len(pairs),
        math.exp(-math.fsum(b for _, b in pairs) / len(pairs)),
        sum(same),
        len(same),
    )


@dataclass(frozen=True)
class Workshop:
    """Makes exports and asks servers, each once.

    Attributes:
        work: Where everything is kept.
        serve_python: Of the environment with vLLM and llama.cpp; None: they are not asked.
        tokens: Of a window.
        windows: How many.
    """

    work: Path
    serve_python: Path | None
    tokens: int = 256
    windows: int = 4

    def answers(self, names: Sequence[str]) -> dict[str, dict[str, Answer]]:
        """Form -> who computes it (`trainer`, `reader`, its servers) -> the answer."""
        asked = {name: ("trainer", *_reader(FORMS[name]), *FORMS[name].servers) for name in names}
        for server in ask_server.SERVERS:
            if self.serve_python is not None or server not in _OF_SERVE_PYTHON:
                self._ask(server, [name for name in names if server in asked[name]])
        return {
            name: {
                server: json.loads(file.read_text("utf-8"))
                for server in servers
                if (file := self._answer(name, server)).is_file()
            }
            for name, servers in asked.items()
        }

    def _answer(self, name: str, server: str) -> Path:
        return self.work / "answers" / f"{name}.{server}.json"

    def _ask(self, server: str, names: Sequence[str]) -> None:
        """Asks one server for the forms that it has not answered yet, in one process."""
        jobs = [
            self._job(server, name) for name in names if not self._answer(name, server).is_file()
        ]
        if not jobs:
            return
        self._answer("", "").parent.mkdir(parents=True, exist_ok=True)
        file = self.work / f"jobs-{server}.json"
        file.write_text(json.dumps([asdict(job) for job in jobs], indent=1), "utf-8")
        python, preload = Path(sys.executable), Path()
        if server in _OF_SERVE_PYTHON:
            assert self.serve_python is not None, server
            python = self.serve_python
            if server == "llama.cpp":  # what its package needs and older C++ libraries lack
                preload = python.parents[1] / "call_terminate.so"
        _run(
            [str(python), str(ROOT / "tools" / "ask_server.py"), server, "--jobs", str(file),
             "--request", str(self._request())],
            self.work / "log", sees_mqat=server not in _OF_SERVE_PYTHON, preload=preload,
        )  # fmt: skip

    def _job(self, server: str, name: str) -> ask_server.Job:
        form = FORMS[name]
        model = self._checkpoint(form) if server == "trainer" else self._export(name)
        if server == "llama.cpp":
            model = model / "model.gguf"
        noise = BF16_NOISE if form.dtype == "bfloat16" else FLOAT32_NOISE
        answer = str(self._answer(name, server))
        return ask_server.Job(str(model), answer, form.dtype, noise, form.kv_cache)

    def _checkpoint(self, form: Form) -> Path:
        if not form.settings:
            return self._made(self.work / "checkpoints" / "plain", ["import", _packaged_model()])
        words = [f"{key}={value}" for key, value in form.settings.items()]
        alike = (name for name, other in FORMS.items() if other.settings == form.settings)
        run = self.work / "checkpoints" / next(alike)
        command = [
            "ptq", "--config", str(ROOT / "conf" / "quality_smollm2.yaml"),
            "trainer.limit_val_samples=2", "quantization.num_calib_size=8",
            f"exp_manager.exp_dir={run}", *(f"quantization.{word}" for word in words),
        ]  # fmt: skip
        if not (run / "checkpoint" / "mqat.json").is_file():
            self._mqat(*command)
        return run / "checkpoint"

    def _export(self, name: str) -> Path:
        form = FORMS[name]
        how = ["--format", "hf", "--style", form.style, "--dtype", form.dtype]
        if form.style == "gguf":
            how = ["--format", "gguf", "--dtype", form.dtype]
        return self._made(
            self.work / "exports" / name, ["export", str(self._checkpoint(form)), *how]
        )

    def _made(self, path: Path, command: Sequence[str]) -> Path:
        """What a command of mqat writes to `--out`."""
        if not path.exists():
            self._mqat(*command, "--out", str(path))
        return path

    def _mqat(self, *command: str) -> None:
        _run([sys.executable, "-m", "mqat.cli", *command], self.work / "log", sees_mqat=True)

    def _request(self) -> Path:
        """Beginnings of held-out articles, and shorter ones of the same to continue."""
        from mqat.data.packaged import hold_out, wikipedia_documents
        from mqat.data.tokenizer import load_tokenizer

        path = self.work / "request.json"
        if not path.is_file():
            tokenizer = load_tokenizer(self._export("plain"))
            _, held_out = hold_out(wikipedia_documents())
            texts = [tokenizer(text)["input_ids"] for text in held_out[: self.windows]]
            request = {
                "windows": [text[: self.tokens + 1] for text in texts],
                "prompts": [text[:32] for text in texts],
                "new_tokens": 24,
            }
            path.write_text(json.dumps(request), "utf-8")
        return path


def _reader(form: Form) -> tuple[str, ...]:
    return () if form.style == "gguf" else ("reader",)


def _packaged_model() -> str:
    from mqat.data.packaged import smollm2_gguf

    return str(smollm2_gguf())


def _run(command: Sequence[str], log: Path, *, sees_mqat: bool, preload: Path = Path()) -> None:
    """A command in this repository; its output is appended to a log.

    Raises:
        RuntimeError: It failed; with the end of what it said.
    """
    paths = {"PYTHONPATH": str(ROOT) if sees_mqat else ""}
    if preload.is_file():
        paths["LD_PRELOAD"] = str(preload)
    log.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **paths}
    )
    said = done.stdout + done.stderr
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{said}\n")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{said[-3000:]}")


def markdown(found: Mapping[str, Mapping[str, Answer]]) -> str:
    """The table: a row a form, a column what computes it."""
    titles = {
        "noise": "with noise", "reader": "reader", "transformers": "transformers", "vllm": "vLLM",
        "vllm-default": "vLLM's own choice", "llama.cpp": "llama.cpp",
    }  # fmt: skip
    lines = [
        f"| form | dtype | perplexity | {' | '.join(titles.values())} |",
        "|---|---|---|" + "---|" * len(titles),
    ]
    for name, answers in found.items():
        form, trainer = FORMS[name], answers["trainer"]
        cells = [form.title, form.dtype, f"{difference(trainer, trainer).perplexity:.3f}"]
        cells += [_cell(server, answers) for server in titles]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(server: str, answers: Mapping[str, Answer]) -> str:
    """Mean difference from the trainer's model, and how many of the greedy texts are the same."""
    reader = answers.get("reader")
    if server == "noise":
        if reader is None:
            return "-"
        return f"{difference(reader, {'logs': reader['noisy'], 'texts': []}).mean:.1e}"
    if server not in answers:
        return "-"
    if "error" in answers[server]:
        return "refused"
    found = difference(answers["trainer"], answers[server])
    texts = f" ({found.texts}/{found.of_texts})" if found.of_texts else ""
    return f"{found.mean:.1e}{texts}"


def write_between(path: Path, table: str) -> None:
    """Puts the table between its markers in a page."""
    begin, end = f"<!-- {MARK} -->\n", f"<!-- end of {MARK} -->"
    before, rest = path.read_text("utf-8").split(begin, 1)
    path.write_text(before + begin + table + end + rest.split(end, 1)[1], "utf-8")


def main() -> None:
    """Asks all, then prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forms", nargs="*", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--work", type=Path, default=Path("build/serve"))
    parser.add_argument("--serve-python", type=Path, help="of the environment with vLLM")
    parser.add_argument("--markdown", type=Path, help="page with the table's markers")
    args = parser.parse_args()
    workshop = Workshop(args.work.resolve(), args.serve_python and args.serve_python.absolute())
    found = workshop.answers(args.forms)
    print(markdown(found))
    for name, answers in found.items():
        for server, answer in answers.items():
            if "error" in answer:
                print(f"{name}, {server}: {answer['error'][:300]}")
    if args.markdown:
        write_between(args.markdown, markdown(found))


if __name__ == "__main__":
    main()
