"""Ends pairs of ranks right after collectives, again and again; prints how many ranks were aborted.

Arguments: the number of pairs, and "control" for ranks that end without `groups._end_threads`.
Ranks are forks of one process that has imported torch, which takes most of the time otherwise. A thread
switch that waits for the interpreter's lock to be offered, and work between the collectives and the end,
make the fatal case likely: gloo's threads wait for the lock while the interpreter's end begins.
"""

import atexit
import os
import socket
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

from mqat.runtime import groups


def fork_pair() -> list[int]:
    """Process ids of two ranks; an empty list in each of them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    children = []
    for rank in ("0", "1"):
        os.environ["RANK"] = rank
        pid = os.fork()
        if pid == 0:
            return []
        children.append(pid)
    return children


aborted = 0
for _ in range(int(sys.argv[1])):
    pair = fork_pair()
    if not pair:
        break
    aborted += sum(os.waitpid(pid, 0)[1] != 0 for pid in pair)
else:
    print("aborted:", aborted)
    sys.exit()

groups.join("gloo")
model = SimpleNamespace(first=dist.new_group(), second=dist.new_group())
if sys.argv[2:] == ["control"]:
    atexit.unregister(groups._end_threads)
for _ in range(3):  # connects, and starts the threads
    dist.all_reduce(torch.ones(1), group=model.first)
    dist.all_reduce(torch.ones(1), group=model.second)
sys.setswitchinterval(100)
for group in (model.first, model.second, None):
    dist.all_reduce(torch.ones(1), group=group)
del group
sum(range(2_000_000))
