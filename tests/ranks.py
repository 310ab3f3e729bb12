"""Ranks of a run as forked processes: they start at once, where Python and torch would take seconds each."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT = 500
"""Seconds to wait for a rank; a loaded machine is no failure."""


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(*arguments)`` in ``count`` processes, with the variables that torchrun sets.

    Returns:
        What each rank returned, in order.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workbench.training.trial", "workbench.ablation.execution.worker"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, connections = [], []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, count, port, sender, function, arguments))
        process.start()
        sender.close()
        processes.append(process)
        connections.append(receiver)
    try:
        results = []
        for receiver in connections:
            assert receiver.poll(TIMEOUT), "a rank is slow"
            results.append(receiver.recv())
        return results
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _rank(
    rank: int, count: int, port: int, sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in variables.items()})
    import torch

    torch.set_num_threads(1)
    sender.send(function(*arguments))
