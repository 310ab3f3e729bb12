"""Create a virtual environment with the pinned dependencies and this project. Needs only Python with pip.

usage: python3 tools/install.py FOLDER

Concurrent calls wait for each other; a call on a finished environment does nothing.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "requirements.lock")


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (this file also runs on an older Python)
        sys.exit(f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed. Try: make PYTHON=python3.11 …")
    folder = Path(sys.argv[1]).resolve()
    stamp = folder / "installed"
    expected = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in SOURCES)).hexdigest()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != expected:
            print(f"Installing into {folder} (once, a few minutes; 3 GB, with torch for CUDA more) …", flush=True)
            if not (folder / "bin" / "python").exists():
                venv.create(folder, with_pip=True)
            pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            subprocess.run([*pip, "-c", "requirements.lock", "-e", ".[dev]"], cwd=ROOT, check=True)
            stamp.write_text(expected)
        os.utime(stamp)


if __name__ == "__main__":
    main()
