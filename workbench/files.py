"""Files that survive crashes: replaced atomically, appended line by line, locked across processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MACHINE = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ESTALE,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ETIMEDOUT,
    )
)
"""Numbers of errors of the file system that are no fault of the program, and say nothing about a model."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it atomically on success.

    Readers see the old file or the new one, never a part of either. The new content is synced to disk before the
    rename. If the block raises, ``path`` is left unchanged.

    Yields:
        The temporary path, to be written as a file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty temporary folder beside ``path`` that replaces it on success, with everything in it.

    Its files are synced to disk before the rename. If the block raises, ``path`` is left unchanged.

    Yields:
        The temporary folder.
    """
    path = path.resolve()
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    if old.exists() and not path.exists():  # an earlier call was killed between its two renames
        os.replace(old, path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for name in temporary.iterdir():
            sync(name)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():  # a folder that is not empty cannot be renamed over
            os.replace(path, old)
        os.replace(temporary, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Write what the system holds of a file, or of the names in a folder, to the disk: it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def apply_umask(path: Path) -> None:
    """Give a file that a library created as private the permissions of any new file in its folder."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
    try:
        with open(probe, "wb") as file:
            os.chmod(path, os.fstat(file.fileno()).st_mode & 0o777)
    finally:
        probe.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """CRC-32 of the content of a file, eight hexadecimal digits: detects damage, not intent.

    Raises:
        OSError: when it cannot be read.
    """
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replace ``path`` atomically by ``data`` as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in ``path``; empty if the file is missing or damaged, or a folder has its name."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def stamp(path: str | Path) -> tuple[int, int] | None:
    """Size and time of change of ``path``, to detect changes; None if there is no such file."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def append_json(path: Path, row: Mapping[str, Any]) -> None:
    """Append ``row`` to ``path`` as one line of JSON. A last line torn by a crash is removed first."""
    line = (json.dumps(row) + "\n").encode()
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)
        file.write(line)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every complete line of ``path``, without damaged ones; empty if there is no such file."""
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return []
    rows = []
    for line in lines[:-1]:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


@contextlib.contextmanager
def locked(path: Path, *, timeout: float = math.inf) -> Iterator[bool]:
    """Hold an exclusive lock on the file ``path``, which is created if missing; its folder must exist.

    The operating system releases the lock when the process ends, however it ends. Whoever may only read the file can
    lock it as well, to see whether somebody holds it.

    Args:
        path: the lock file.
        timeout: seconds to wait for another process.

    Yields:
        Whether the lock was acquired.
    """
    deadline = time.monotonic() + timeout
    mode = "a" if not path.exists() or os.access(path, os.W_OK) else "r"
    with open(path, mode) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if timeout == math.inf else fcntl.LOCK_NB))
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
                yield False
            else:
                yield True
            return
