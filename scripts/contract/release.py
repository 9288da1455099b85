# SPDX-License-Identifier: Apache-2.0
"""The sources of a release of vLLM."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

# What pip must be told to take the wheel of Linux on any machine.
_WHEELS = ("--only-binary=:all:", "--no-deps", "--python-version=3.11", "--implementation=cp")
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64")


def installed() -> tuple[str, Path]:
    """The installed release without its local part, and the folder of its package."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ValueError("vLLM is not installed; name a release: VLLM=0.33.0")
    return metadata.version("vllm").partition("+")[0], Path(spec.origin).parent


def cache_folder() -> Path:
    """Where wheels and their sources are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm_nbdiff" / "contract"


def fetched(version: str) -> Path:
    """The folder of a release's package, from pip's index or the cache; Python files only.

    Raises ValueError where the index has no such release.
    """
    target = cache_folder() / version
    if not (target / "vllm" / "__init__.py").exists():
        unpack(download(version), target)
    return target / "vllm"


def download(version: str) -> Path:
    """The wheel of a release, hundreds of MB, by pip's own configuration."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"vllm-{version}-*.whl"
    if not any(folder.glob(pattern)):
        platforms = (f"--platform={name}" for name in _PLATFORMS)
        command = [sys.executable, "-m", "pip", "download", *_WHEELS, *platforms]
        done = subprocess.run([*command, f"--dest={folder}", f"vllm=={version}"], check=False)
        if done.returncode != 0:
            raise ValueError(f"pip finds no wheel of vllm {version}")
    return next(folder.glob(pattern))


def unpack(wheel: Path, target: Path) -> None:
    """The Python files of a wheel, all of them or none."""
    partial = target.with_name(target.name + ".partial")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
        archive.extractall(partial, names)
    partial.rename(target)


def with_compiled_parts(package: Path) -> Path:
    """The parent folder of a release's package that has the installed one's compiled modules.

    Put first on PYTHONPATH it runs the release's Python files on a CPU build of another release,
    as far as its operations are the same.
    """
    _, own = installed()
    for library in own.rglob("*.so"):
        link = package / library.relative_to(own)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(library)
    return package.parent
