"""Tensors in a folder in the layout of Hugging Face: one ``model.safetensors``, or numbered shards and an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.config import ConfigError, Problem, require
from workbench.files import apply_umask, write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

CONFIG = "config.json"
MAX_JSON = 2**26
"""Bytes of a JSON file that are read; the index of a thousand shards has a fraction of it."""


def write_tensors(
    tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype, shard_bytes: int, exact: Collection[str] = ()
) -> None:
    """Write ``tensors`` as one file, or as shards of at most ``shard_bytes`` bytes of tensors each.

    A tensor is never split: one that exceeds the limit is alone in its shard.

    Args:
        dtype: floating-point tensors are rounded to it, others keep their type.
        exact: names of floating-point tensors that keep their type as well.

    Raises:
        OSError: when a file cannot be written.
    """
    dtypes = {name: dtype if t.is_floating_point() and name not in exact else t.dtype for name, t in tensors.items()}
    sizes = {name: t.numel() * dtypes[name].itemsize for name, t in tensors.items()}
    shards: list[list[str]] = [[]]
    shard_size = 0
    for name, size in sizes.items():
        if shards[-1] and shard_size + size > shard_bytes:
            shards.append([])
            shard_size = 0
        shards[-1].append(name)
        shard_size += size
    count = len(shards)
    files = [WEIGHTS] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for file, names in zip(files, shards):
        # copies, as the format refuses tensors that share memory; one shard at a time
        copies = {name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in names}
        try:
            # without this metadata transformers assumes another framework
            save_file(
                {name: t.to(dtypes[name]) for name, t in copies.items()}, folder / file, metadata={"format": "pt"}
            )
        except SafetensorError as error:  # it hides the operating system's error in its text
            raise OSError(f"{folder / file}: the weights could not be written: {error}") from error
        apply_umask(folder / file)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of ``folder`` by its name, in its stored type.

    Raises:
        ConfigError: when there are no weights, a shard is missing, or a file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            with open(folder / file, "rb"):  # the library takes a file that may not be read for a missing one
                pass
            tensors |= load_file(folder / file)
        except OSError as error:
            raise ConfigError.at(str(folder / file), got=error.strerror, expected="a file that can be read") from None
        except SafetensorError as error:
            raise ConfigError.at(
                str(folder / file),
                got=f"a damaged file ({error})",
                expected="safetensors",
                do="Copy or download it again.",
            ) from None
    return tensors


def _weight_files(folder: Path) -> list[str]:
    """Names of the files with the tensors of ``folder``."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    require(
        (folder / INDEX).is_file(),
        str(folder),
        got="no weights",
        expected=f"{WEIGHTS}, or shards with {INDEX}",
        do="Other formats, such as pickled .bin files, are not read.",
    )
    weight_map = read_json_file(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError.at(str(folder / INDEX), got="no weight_map", expected="the file of every tensor")
    files = sorted({str(file) for file in weight_map.values()})
    # a name with a folder in it would be read from outside
    missing = [file for file in files if Path(file).name != file or not (folder / file).is_file()]
    require(not missing, str(folder), got=f"no file {shorten(missing)}", expected=f"every file that {INDEX} names")
    return files


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Check names, shapes and values of ``tensors``.

    Args:
        shapes: of all expected tensors, by name.
        source: folder of the tensors, for messages.

    Raises:
        ConfigError: naming the tensors that are missing, unknown, of another shape, or hold NaN or infinity.
    """
    differences = {
        "without": [name for name in shapes if name not in tensors],
        "with unknown": [name for name in tensors if name not in shapes],
        "with other shapes:": [
            f"{name} {tuple(tensors[name].shape)}, not {tuple(shape)}"
            for name, shape in shapes.items()
            if name in tensors and tuple(tensors[name].shape) != tuple(shape)
        ],
        "that are not finite:": [
            name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()
        ],
    }
    problems = [
        Problem(str(source), f"weights {difference} {shorten(names)}", "exactly the tensors of its configuration")
        for difference, names in differences.items()
        if names
    ]
    if problems:
        raise ConfigError(problems)


def read_json_file(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        ConfigError: when it is missing, is not JSON or is not a mapping.
    """
    require(path.is_file() or not path.exists(), str(path), got="no regular file", expected="a JSON file")
    try:
        size = path.stat().st_size
        require(size <= MAX_JSON, str(path), got=f"{size:,} bytes", expected=f"at most {MAX_JSON:,}")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError.at(str(path), got=error.strerror, expected="a JSON file") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError.at(str(path), got=str(error), expected="valid JSON") from None
    if not isinstance(data, dict):
        raise ConfigError.at(str(path), got=data, expected="a mapping at the top level")
    return data


def in_file(error: ConfigError, path: Path) -> ConfigError:
    """The same problems, with ``path`` before their field paths."""
    return ConfigError([replace(problem, path=f"{path}: {problem.path}") for problem in error.problems])


def shorten(names: list[str]) -> str:
    """The first eight names, and the number of further ones."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def fingerprint(folder: str | Path) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a folder's configuration and weights.

    Raises:
        ConfigError: when the folder lacks either.
    """
    files = sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob(CONFIG)])
    if len(files) < 2:
        raise ConfigError.at(
            "start.folder", got=str(Path(folder).absolute()), expected="a folder with config.json and *.safetensors"
        )
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(_file_hash(file, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()[:16]


@lru_cache
def _file_hash(file: Path, size: int, modified_ns: int) -> bytes:
    """SHA-256 of a file. Size and time of modification only make the cached hash of a changed file invalid."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
