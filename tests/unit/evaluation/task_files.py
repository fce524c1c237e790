"""Task files for lm-evaluation-harness whose data lies beside them: nothing is downloaded.

python -m tests.unit.evaluation.task_files DIR      the MMLU few-shot questions, and held-out articles
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import yaml

from mqat.data.packaged import hold_out, wikipedia_documents

_LOCAL = {"dataset_path": "json", "metadata": {"version": 1.0}, "test_split": "train"}
_PARTS = re.compile(
    r"(.*?)" + "".join(rf"\s*\({letter}\)\s*(.*?)" for letter in "ABCD") + r"\s*$", re.S
)
_ANSWER = re.compile(r"The answer is \(([ABCD])\)")


def mmlu_questions(limit: int | None = None) -> list[dict[str, object]]:
    """The few-shot questions of MMLU that come inside the package, four or five a subject."""
    import lm_eval

    class AnyTag(yaml.SafeLoader):
        """Its files call functions, which are not needed here."""

    AnyTag.add_multi_constructor("!", lambda *_: None)
    folder = Path(lm_eval.__file__).parent / "tasks/mmlu/flan_cot_fewshot"
    found = []
    for file in sorted(folder.glob("mmlu_*.yaml")):
        for sample in yaml.load(file.read_text("utf-8"), AnyTag)["fewshot_config"]["samples"]:
            answer, parts = _ANSWER.search(sample["target"]), _PARTS.match(sample["question"])
            if answer and parts:
                question, *choices = parts.groups()
                number = "ABCD".index(answer[1])
                found.append({"question": question, "choices": choices, "answer": number})
    return found[:limit]


def _write(folder: Path, name: str, rows: list[dict[str, object]], task: dict[str, object]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"dataset_kwargs": {"data_files": str(data)}}
    task = {"task": name, **_LOCAL, **files, **task}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def write_tasks(folder: Path, texts: list[str], questions: list[dict[str, object]]) -> list[str]:
    """Files of three tasks: whole texts, questions with four answers, and text up to a stop string."""
    _write(folder, "local_texts", [{"page": text} for text in texts], {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}",
        "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity")],
    })  # fmt: skip
    letters = (
        "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}"
    )
    _write(folder, "local_mmlu", questions, {
        "output_type": "multiple_choice", "doc_to_text": f"{letters}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "answer", "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}],
    })  # fmt: skip
    _write(folder, "local_answers", questions, {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    })  # fmt: skip
    _write(folder, "local_text", questions[:4], {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "num_fewshot": 0,
        "doc_to_target": "{{choices[0]}}", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 8, "do_sample": False},
    })  # fmt: skip
    return ["local_texts", "local_mmlu", "local_answers", "local_text"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text[:6000] for text in hold_out(wikipedia_documents())[1][:4]]
    print(*write_tasks(folder, texts, mmlu_questions()))
