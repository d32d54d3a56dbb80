"""What stands at the top of every file of results."""

import datetime
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import jax
from jax.extend import backend


def head(script: str) -> dict[str, Any]:
    """Device, versions, time, commit and command of this run of `benchmarks.<script>`.

    Without git `commit` is None; `modified` tells of changes that are not in the commit.
    """
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "backend": backend.get_backend().platform_version,
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "modified": bool(changes),
        "command": shlex.join(["python", "-m", f"benchmarks.{script}", *sys.argv[1:]]),
    }


def _git(*arguments: str) -> str | None:
    """What git prints in the repository's folder; None without one."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent), *arguments]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
