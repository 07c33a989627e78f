"""Build the C functions beside this file with the machine's own compiler. Knows compilers and folders, not the code."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
BUILD_TIMEOUT_S = 120


class Unavailable(Exception):
    """The kernels cannot be used here; the message says why."""


def build() -> Path:
    """The library for this processor: built now, or by an earlier start.

    Raises:
        Unavailable: no compiler, or a failed build.
    """
    compiler = _compiler()
    target = _run([compiler, "-march=native", "-E", "-dM", "-x", "c", os.devnull])
    digest = hashlib.sha256(" ".join(FLAGS).encode() + target)
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    folder = _cache_folder()
    library = folder / f"kernels-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch, "kernels.so")
            _run([compiler, *FLAGS, "-o", str(built), str(SOURCES / "kernels.c"), "-lm"])
            built.replace(library)
    return library


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")):
        found = shutil.which(name)
        if found:
            return found
    raise Unavailable("this machine has no C compiler (cc, gcc or clang)")


def _cache_folder() -> Path:
    """Where built code is kept for the next start."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    for folder in (Path(base, "lda-service"), Path(tempfile.gettempdir(), f"lda-service-{os.getuid()}")):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise Unavailable("no folder to keep the built code in can be written")


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=BUILD_TIMEOUT_S).stdout
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{command[0]} failed: {error.stderr.decode(errors='replace').strip()[-500:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} could not be run: {error}") from error
