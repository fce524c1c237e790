"""Time of calibration against plain forward passes over the same tokens.

python tools/bench_calibration.py --tokens 256 --microbatches 4 --json
"""

from __future__ import annotations

import json
import statistics
import time

from bench_model import arguments, batches, build, calibrate_on, start

from mqat.runtime import groups


def main() -> None:
    """Prints a table, or JSON."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    start(args)
    from mqat.training.step import evaluate

    plain = build(args, "baseline", "null")
    data = batches(args)
    results = []
    for algorithm in args.algorithms:
        system = build(args, "mqat", algorithm)
        forward: list[float] = []
        calibration: list[float] = []
        for _ in range(args.repeats + 1):
            began = time.process_time()
            evaluate(plain.chunks, [data])
            middle = time.process_time()
            calibrate_on(system.chunks, data)
            forward.append(middle - began)
            calibration.append(time.process_time() - middle)
        ratios = [b / a for a, b in zip(forward[1:], calibration[1:], strict=True)]
        results.append(
            {
                "system": "mqat",
                "algorithm": algorithm,
                "precision": args.precision,
                "tokens": args.tokens * args.microbatches,
                "tp": args.tp,
                "forward_cpu_seconds": statistics.median(forward[1:]),
                "calibration_cpu_ratio": statistics.median(ratios),
                "calibration_cpu_ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
            }
        )
    if groups.is_main():
        if args.json:
            print(json.dumps({"results": results}, indent=1))
        else:
            for row in results:
                print(
                    f"{row['algorithm']:>14}  x{row['calibration_cpu_ratio']:.3f} CPU of a forward"
                    f"  {row['calibration_cpu_ratio_range']}"
                )
    groups.finalize()


if __name__ == "__main__":
    main()
