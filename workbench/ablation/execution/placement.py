"""GPUs of this machine, and which of them a worker's trials use."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator, Sequence

from workbench.ablation.folder import AblationFolder
from workbench.files import locked

__all__ = ["claim_gpu", "gpu_groups", "visible_gpus"]


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",") if names else [str(i) for i in range(torch.cuda.device_count())]


def gpu_groups(devices: int) -> list[str]:
    """The GPUs of this process in groups of ``devices``, each as CUDA_VISIBLE_DEVICES names it. GPUs that are left over
    belong to none."""
    names = visible_gpus()
    return [",".join(names[first : first + devices]) for first in range(0, len(names) - devices + 1, devices)]


@contextlib.contextmanager
def claim_gpu(folder: AblationFolder, gpus: Sequence[str]) -> Iterator[str | None]:
    """Give the trials of this process the GPU that the fewest other workers use, through CUDA_VISIBLE_DEVICES.

    Args:
        folder: the ablation whose workers share the GPUs.
        gpus: their names on this machine, or those of groups (:func:`gpu_groups`); with none, nothing is set.
    """
    folder.workers_path.mkdir(exist_ok=True)
    for turn in itertools.count() if gpus else ():
        for gpu in gpus:
            name = "".join(c if c.isalnum() else "_" for c in gpu)
            # machines that share the folder number their GPUs alike
            with locked(folder.workers_path / f"gpu-{socket.gethostname()}-{name}-{turn}.lock", timeout=0) as is_free:
                if is_free:
                    os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when a trial's process first asks for a device
                    yield gpu
                    return
    yield None
