"""`mqat plan`: what a run will need, before it is queued."""

import argparse
from pathlib import Path

from mqat.config import load_config

HELP = "check a configuration and estimate memory before queueing a job"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> None:
    """Prints the plan of a configuration."""
    from mqat.plan.run import describe, make_plan, memory_estimate
    from mqat.plan.step_model import modelled_step

    plan = make_plan(load_config(args.config, args.overrides), world_size=args.world_size)
    for key, value in (describe(plan) | memory_estimate(plan) | modelled_step(plan)).items():
        print(f"{key}: {value}")
