"""The table of docs/reliability.md: what malformed models lead to.

    python tools/fuzz_sources.py --count 1000

Runs that many Hugging Face directories, that many GGUF files and that many directories of the families
least like Llama, of `tests/unit/checkpoints`, each a good model with one or two seeded changes, and
prints what became of each kind. Ends with status 1 if one of them gave other numbers than transformers,
a traceback or several lines; prints their seeds.
"""

import argparse
import logging
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> int:
    """Prints the table; the status to end with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="cases of each reader")
    parser.add_argument("--start", type=int, default=0, help="first seed")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    from mqat.runtime import groups

    groups.initialize()
    import transformers

    from tests.unit.checkpoints.malformed_gguf import run_case

    transformers.logging.disable_progress_bar()
    found: Counter[tuple[str, str, str]] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for reader in ("huggingface", "gguf", "families"):
            for seed in range(args.start, args.start + args.count):
                kind, end = run_case(reader, seed, Path(folder) / f"{reader}-{seed}")
                if end[0].isupper():
                    wrong.append(f"{reader} {seed} ({kind}): {end}")
                    end = "WRONG"
                found[reader, kind, end] += 1
    ends = ["refused", "same numbers", "same numbers, which transformers does not read", "WRONG"]
    print(f"| reader, change | {' | '.join(ends)} |\n|---|{'---|' * len(ends)}")
    for reader, kind in sorted({key[:2] for key in found}):
        print(f"| {reader}, {kind} | {' | '.join(str(found[reader, kind, e]) for e in ends)} |")
    totals = [sum(n for key, n in found.items() if key[2] == end) for end in ends]
    print(f"| all {sum(totals)} | {' | '.join(map(str, totals))} |")
    print("\n".join(wrong))
    groups.finalize()
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
