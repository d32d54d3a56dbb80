"""Which kernel, cut into which tiles, was fastest for a shape on a kind of GPU: data, not code.

The package holds a table for each device that we measured, tuning/<device>.json. What
`python -m jaxcodec.pallas_kernels.tune` writes on a user's own GPU lies in `user_directory()` and
goes before it, entry by entry. Without an entry, `preferences` orders the kernels.

Letters: M rows of x, K input and N output features, m codebooks, v weights a code.
"""

import dataclasses
import functools
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxcodec.checkpoints.files import read_json, replacement
from jaxcodec.pallas_kernels.kernels import KERNELS
from jaxcodec.spec import CodebookSpec

# Rows up to which the kernels won where nothing else is known; see the figures of time against rows
# in docs/kernels.md. All numbers here are of an H200, benchmarks/results/h200/tuner.json.
GATHER_ROWS = 1
MMA_ROWS = 16
# Weights K x N up to which mma won besides. One row, one codebook: it takes 5.1 us and
# the gather 5.3 at 4096x4096, 10.9 and 10.4 at 8192x8192.
SMALL_WEIGHT = 2**24
# 17 to 32 rows: it takes 19.6 us and wgmma 19.8 at 8192x8192 with one codebook; with more, 10.6 and
# 11.7 at 4096x4096, 26.1 and 22.4 at 8192x8192.
MEDIUM_WEIGHT = 2**26
# A float32 x has no tensor cores: the gather reads the codes again for each 4 rows, and stays
# ahead of writing a float32 weight to memory up to this many.
FLOAT32_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fastest way that was measured.

    Attributes:
      spec: format, such as `m2v8g128`.
      K: input features.
      N: output features of each weight of the launch.
      M: rows of x.
      kernel: name of one of KERNELS, such as `mma_mosaic`.
      tiles: fields of that kernel's Tiling.
      us: microseconds of kernel time.
    """

    spec: str
    K: int
    N: tuple[int, ...]
    M: int
    kernel: str
    tiles: Mapping[str, int]
    us: float

    @property
    def key(self) -> tuple[str, int, tuple[int, ...], int]:
        """What is unique in a table."""
        return self.spec, self.K, self.N, self.M


@dataclasses.dataclass(frozen=True)
class Table:
    """Entries of one kind of device.

    Attributes:
      entries: by (spec, K, N), then by M, in ascending order of M.
    """

    entries: Mapping[tuple[str, int, tuple[int, ...]], tuple[Entry, ...]]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> "Table":
        """Sort entries; of two with one key the later stays."""
        unique = {entry.key: entry for entry in entries}
        shapes: dict[tuple[str, int, tuple[int, ...]], list[Entry]] = {}
        for entry in sorted(unique.values(), key=lambda entry: entry.M):
            shapes.setdefault(entry.key[:3], []).append(entry)
        return cls({shape: tuple(found) for shape, found in shapes.items()})

    def entry(self, M: int, K: int, N: tuple[int, ...], spec: CodebookSpec) -> Entry | None:
        """The entry of the fewest rows that are at least M, or None if the shape has none."""
        found = self.entries.get((str(spec), K, N), ())
        return next((entry for entry in found if entry.M >= M > 0), None)


def preferences(
    M: int, K: int, Ns: Sequence[int], spec: CodebookSpec, dtype: jnp.dtype
) -> tuple[str, ...]:
    """Kernels to try for M rows and weights [K, N_i] of one launch, never measured: best first."""
    if jnp.dtype(dtype).itemsize == 4:
        return ("psumbook_mosaic",) if M <= FLOAT32_ROWS else ()
    weight, one = K * sum(Ns), spec.num_codebooks == 1
    if M <= GATHER_ROWS:
        # The gather cuts all weights of a launch alike, too wide for the narrow ones: q, k and v of
        # 70B take 21.6 us so and 14.2 by mma, with two codebooks 22.7 and 22.2.
        unlike = len(set(Ns)) > 1 and spec.num_codebooks <= 2
        if unlike or (one and weight <= SMALL_WEIGHT):
            return ("mma_mosaic", "psumbook_mosaic", "wgmma_mosaic")
        return ("psumbook_mosaic", "mma_mosaic", "wgmma_mosaic")
    if M <= MMA_ROWS or (M <= 2 * MMA_ROWS and weight <= (MEDIUM_WEIGHT if one else SMALL_WEIGHT)):
        return ("mma_mosaic", "wgmma_mosaic")
    return ("wgmma_mosaic", "mma_mosaic")


@functools.cache
def table(device_kind: str) -> Table:
    """The table of a kind of device, such as "NVIDIA H100 80GB HBM3"; empty if never tuned.

    Raises:
      ValueError: a file in the place of a table is none; see `read`.
    """
    name = file_name(device_kind)
    paths = (Path(__file__).parent / "tuning" / name, user_directory() / name)
    return Table.of(entry for path in paths if os.path.exists(path) for entry in read(path))


def user_directory() -> Path:
    """Where tables of a user's own GPUs lie: $JAXCODEC_TUNING, else ~/.cache/jaxcodec/tuning."""
    named = os.environ.get("JAXCODEC_TUNING")
    return Path(named) if named else Path.home() / ".cache" / "jaxcodec" / "tuning"


def file_name(device_kind: str) -> str:
    """`nvidia_h100_80gb_hbm3.json` for "NVIDIA H100 80GB HBM3"."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


def read(path: Path) -> list[Entry]:
    """Entries of a file that `write` wrote.

    Entries of kernels, formats or tiles that this version cannot run are left out, and a warning
    tells how many: a table that an older version wrote serves for the rest.

    Raises:
      ValueError: the file is not such a table, with the reason.
    """
    try:
        rows = read_json(path).get("entries")
        if not isinstance(rows, list):
            raise ValueError("it has no list of entries")
        entries = [_entry(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a table of tile sizes ({error}); delete it, then run "
            "python -m jaxcodec.pallas_kernels.tune again."
        ) from None
    known = [entry for entry in entries if _is_known(entry)]
    if left_out := len(entries) - len(known):
        warnings.warn(
            f"{path}: {left_out} of {len(entries)} entries are left out, because this version "
            "cannot run them; python -m jaxcodec.pallas_kernels.tune measures anew.",
            stacklevel=2,
        )
    return known


def _entry(row: Any) -> Entry:
    """The entry that a row of a file holds.

    Raises:
      ValueError: fields that are not those of an entry, or a value that cannot be.
    """
    fields = [field.name for field in dataclasses.fields(Entry)]
    if not isinstance(row, dict) or sorted(row) != sorted(fields):
        raise ValueError(f"an entry has the fields {', '.join(fields)}, got {str(row)[:200]}")
    spec, K, N, M, kernel, tiles, us = (row[name] for name in fields)
    right = {
        "spec": isinstance(spec, str),
        "K": _is_positive(K),
        "N": isinstance(N, list) and len(N) > 0 and all(map(_is_positive, N)),
        "M": _is_positive(M),
        "kernel": isinstance(kernel, str),
        "tiles": isinstance(tiles, dict) and all(map(_is_positive, tiles.values())),
        "us": type(us) in (int, float) and 0 < us < float("inf"),
    }
    if wrong := [f"{name} = {str(row[name])[:80]}" for name in fields if not right[name]]:
        raise ValueError(f"an entry has {', '.join(wrong)}")
    if kernel == "mma_mosaic" and tiles.get("rows", M) < M:
        # Its one block holds all rows, and would read past its sums.
        raise ValueError(f"an entry of {kernel} has M = {M} but tiles of {tiles['rows']} rows")
    return Entry(spec, K, tuple(N), M, kernel, tiles, us)


def _is_positive(value: Any) -> bool:
    return type(value) is int and value > 0  # True is none


def _is_known(entry: Entry) -> bool:
    """Whether this version has the kernel, and it can run a format with these tiles."""
    if entry.kernel not in KERNELS:
        return False
    try:
        KERNELS[entry.kernel].Tiling(**entry.tiles).check(CodebookSpec.parse(entry.spec))
    except (TypeError, ValueError):  # a field too many or too few, a size that cannot be
        return False
    return True


def write(path: Path, head: Mapping[str, Any], entries: Iterable[Entry]) -> None:
    """Write `head` (device, versions, date) and entries, one a line; whole or not at all."""
    shapes = Table.of(entries).entries
    lines = [json.dumps(dataclasses.asdict(e)) for key in sorted(shapes) for e in shapes[key]]
    text = json.dumps(dict(head), indent=2)[:-2] + ',\n  "entries": [\n    '
    text += ",\n    ".join(lines) + "\n  ]\n}\n"
    with replacement(path) as [temporary]:
        temporary.write_text(text, encoding="utf-8")
