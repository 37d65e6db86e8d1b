"""The pinned CUDA compilers, from PyPI wheels into the git-ignored .cache/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

NVCC_VERSION = "13.0.88"
# The newest ptxas that stops at PTX 8.0: what it takes, every driver from 525 on takes.
OLD_PTXAS_VERSION = "12.0.140"

PACKAGES = {
    f"cuda-{NVCC_VERSION}": (
        f"nvidia-cuda-nvcc=={NVCC_VERSION}",
        f"nvidia-nvvm=={NVCC_VERSION}",
        f"nvidia-cuda-crt=={NVCC_VERSION}",
        "nvidia-cuda-runtime==13.0.96",
        "nvidia-cuda-cccl==13.0.85",
    ),
    f"ptxas-{OLD_PTXAS_VERSION}": (f"nvidia-cuda-nvcc-cu12=={OLD_PTXAS_VERSION}",),
}


class ToolkitError(Exception):
    """The compiler cannot be had, and why."""


@dataclass(frozen=True)
class Toolkit:
    """Where the programs lie; they need not be there yet."""

    nvcc: Path
    ptxas: Path
    old_ptxas: Path

    @classmethod
    def under(cls, cache: Path) -> Toolkit:
        """The programs as they lie in a cache folder."""
        new, old = (cache / name for name in PACKAGES)
        return cls(
            nvcc=new / "nvidia/cu13/bin/nvcc",
            ptxas=new / "nvidia/cu13/bin/ptxas",
            old_ptxas=old / "nvidia/cuda_nvcc/bin/ptxas",
        )

    def is_installed(self) -> bool:
        """Folders are renamed into place whole, so that a program's presence says that all of its package is there."""
        return self.nvcc.is_file() and self.ptxas.is_file() and self.old_ptxas.is_file()


def ensure_toolkit(cache: Path) -> Toolkit:
    """Install what the cache lacks (some 100 MB the first time), and look for the host compiler that nvcc calls."""
    if shutil.which("gcc") is None:
        raise ToolkitError("nvcc preprocesses with gcc, which is not on PATH; hint: apt-get install gcc")
    for name, packages in PACKAGES.items():
        if not (cache / name).is_dir():
            _install(packages, cache / name)
    toolkit = Toolkit.under(cache)
    if not toolkit.is_installed():
        raise ToolkitError(f"{cache} holds no usable toolkit; hint: delete {' and '.join(PACKAGES)} in it, try again")
    return toolkit


def _install(packages: tuple[str, ...], folder: Path) -> None:
    print(f"installing {' '.join(packages)}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as scratch:
        target = Path(scratch) / "packages"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
        pip += ["--no-deps", "--only-binary", ":all:", "--target", str(target), *packages]
        # pip warns of a root user, whom a folder of its own does not concern.
        run = subprocess.run(pip, env={**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}, check=False)
        if run.returncode != 0:
            raise ToolkitError(f"pip could not install {' '.join(packages)} with {sys.executable}")
        try:
            target.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same packages
                raise
