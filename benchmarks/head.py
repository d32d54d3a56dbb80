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

    The commit is None where there is no git; what is not committed it does not tell.
    """
    git = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "backend": backend.get_backend().platform_version,
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "command": shlex.join(["python", "-m", f"benchmarks.{script}", *sys.argv[1:]]),
    }
