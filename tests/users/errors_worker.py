"""Run by torchrun: the last rank fails in the way that is asked for; all must end, and say why."""

import sys

import torch.distributed as dist

from mqat.errors import UserError
from mqat.runtime.groups import command_line, decided_by_main, join, on_all_ranks

ERRORS = {"user": UserError("group_size=7 does not fit"), "fault": KeyError("a missing key")}


def main() -> None:
    join("gloo")
    assert decided_by_main(dist.get_rank) == 0
    with on_all_ranks():
        if dist.get_rank() == dist.get_world_size() - 1:
            raise ERRORS[sys.argv[1]]
    dist.barrier()  # never reached; a rank that went on would wait here


if __name__ == "__main__":
    with command_line():
        main()
