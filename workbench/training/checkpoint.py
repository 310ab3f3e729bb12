"""Checkpoints that are whole or absent, and that need no pickle.

A checkpoint is a folder: ``model.safetensors`` (the weights, loadable by themselves), ``state.safetensors`` (every other
tensor) and ``state.json`` (all the rest: loops, schedule, loader position, random states). It is written beside and
renamed, so a kill at any moment leaves the previous one.
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
from lightning.fabric.plugins.io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

KEEP = 2
"""Checkpoints kept: the newest, and the one before it should the newest be damaged later."""


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Plain data with every tensor replaced by a reference into ``tensors``."""
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
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    items = [_decode(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoint dictionary to and from such a folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            rest = dict(checkpoint)
            weights = {name: t.detach().contiguous() for name, t in rest.pop("state_dict").items()}
            tensors: dict[str, Tensor] = {}
            state = _encode(rest, tensors)
            save_file(weights, temporary / "model.safetensors")
            save_file(tensors, temporary / "state.safetensors")
            (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
            for file in temporary.iterdir():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
        except SafetensorError as error:  # it hides the operating system's error in its text
            raise OSError(f"{path}: the checkpoint could not be written: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in _by_step(path.parent)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(path)
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        checkpoint = _decode(state, load_file(path / "state.safetensors"))
        return {**checkpoint, "state_dict": load_file(path / "model.safetensors")}

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in ``folder`` that can be read, and a line on each newer one that cannot."""
    damaged = []
    for path in reversed(_by_step(folder)):
        try:
            SafeCheckpointIO().load_checkpoint(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            damaged.append(f"{path.name} is damaged ({type(error).__name__}: {error})")
        else:
            return path, damaged
    return None, damaged


def random_state() -> dict[str, Any]:
    """Python's, NumPy's and torch's generators as tensors and plain data."""
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
    """Undo of :func:`random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
