"""Checkpoints that are complete or absent, and that need no pickle.

A checkpoint is a folder: ``model.safetensors`` (the weights, under the model's own names), ``state.safetensors``
(every other tensor), ``state.json`` (everything else: step, schedule, random states) and ``checksums.json``, which are
verified before anything is used. It is written to a temporary folder and renamed, so a kill at any moment leaves the
previous one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.config import ConfigError
from workbench.files import apply_umask, checksum, sync

FILES = ("model.safetensors", "state.safetensors", "state.json")
CHECKSUMS = "checksums.json"


class DamagedCheckpoint(Exception):
    """A file is missing, or its content is not what was written."""


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` as the folder ``path``, replacing an existing one.

    Args:
        state: tensors and plain data in any nesting of dicts, lists and tuples; ``state["model"]`` are the weights by
            name.

    Raises:
        OSError: when it cannot be written; a previous checkpoint is left unchanged.
        TypeError: for values that are neither tensors nor plain data.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        rest = dict(state)
        weights = {name: tensor.detach().contiguous() for name, tensor in rest.pop("model").items()}
        tensors: dict[str, Tensor] = {}
        encoded = _encode(rest, tensors)
        save_file(weights, temporary / "model.safetensors")
        save_file(tensors, temporary / "state.safetensors")
        for name in ("model.safetensors", "state.safetensors"):
            apply_umask(temporary / name)
        (temporary / "state.json").write_text(json.dumps(encoded), encoding="utf-8")
        checksums = {name: checksum(temporary / name) for name in FILES}
        (temporary / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
        for file in temporary.iterdir():
            sync(file)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        sync(path.parent)
    except SafetensorError as error:  # it hides the operating system's error in its text
        raise OSError(f"{path}: the checkpoint could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Inverse of :func:`save_checkpoint`, on the CPU.

    Raises:
        DamagedCheckpoint: when a file is missing or its checksum differs.
        OSError: when a file cannot be read.
    """
    verify(path)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return {**_decode(state, load_file(path / "state.safetensors")), "model": load_weights(path)}


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, by parameter name, on the CPU."""
    return load_file(path / "model.safetensors")


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its checksum.

    Raises:
        DamagedCheckpoint: when a file is missing or its checksum differs.
        OSError: when a file cannot be read, which says nothing of its content.
    """
    try:
        checksums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
        differing = [name for name in FILES if checksums[name] != checksum(path / name)]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path.name} is damaged ({type(error).__name__}: {error})") from None
    if differing:
        raise DamagedCheckpoint(f"{path.name} is damaged (the checksum of {', '.join(differing)} differs)")


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints in ``folder``, by step."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in ``folder`` that is not damaged, and a line on each newer one that is.

    Raises:
        ConfigError: when one cannot be read. It may be whole, so nothing older is used in its place.
    """
    damaged = []
    for path in reversed(checkpoints_in(folder)):
        try:
            verify(path)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
        except OSError as error:
            raise ConfigError.at(
                str(path),
                got=f"a checkpoint that cannot be read ({error.strerror})",
                expected="files that this user may read",
                do="Give read permission, or wait until the file system answers; nothing was changed.",
            ) from None
        else:
            return path, damaged
    return None, damaged


def random_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy and torch as tensors and plain data."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():  # the checkpoint may be from a machine with more devices
        torch.cuda.set_rng_state_all(state["cuda"][: len(torch.cuda.default_generators)])


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Plain data, every tensor replaced by a reference into ``tensors``."""
    if isinstance(value, Tensor):
        key = f"t{len(tensors)}"
        tensors[key] = value.detach().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(v, tensors) for v in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain data; got {type(value).__name__}: {value!r}")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of :func:`_encode`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    items = [_decode(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items
