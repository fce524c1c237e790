"""`mqat plan`: what a run will need, before it is queued."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mqat.cli.arguments import positive
from mqat.config import load_config

if TYPE_CHECKING:
    from mqat.plan.run import RunPlan

HELP = "check a configuration and estimate memory before queueing a job"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--world-size", type=positive, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")


def run(args: argparse.Namespace) -> None:
    """Prints the plan of a configuration."""
    from mqat.plan.run import make_plan

    print_plan(make_plan(load_config(args.config, args.overrides), world_size=args.world_size))


def print_plan(plan: "RunPlan") -> None:
    """What was decided, what it needs, what a step is modelled to cost."""
    from mqat.plan.run import describe, memory_estimate
    from mqat.plan.step_model import modelled_step

    for key, value in (describe(plan) | memory_estimate(plan) | modelled_step(plan)).items():
        print(f"{key}: {value}")
