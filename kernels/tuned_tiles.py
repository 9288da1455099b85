# SPDX-License-Identifier: Apache-2.0
"""Launch shapes of attention that are the fastest of those measured on a device, by its name.

`python -m benchmarks.tune` measures and writes the table; what it lacks, `tile_shape` chooses.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

TABLE = Path(__file__).with_name("tuned_tiles.json")


class TileKind(NamedTuple):
    head_dim: int
    block_m: int
    itemsize: int


class TileShape(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    resident: int = 1
    """Programs that an SM holds at a time, at least."""


NOT_TUNED: Mapping[TileKind, TileShape] = MappingProxyType({})


@functools.cache
def tuned_tiles(device_name: str, table: Path = TABLE) -> Mapping[TileKind, TileShape]:
    """What the table has of a device."""
    rows = json.loads(table.read_text()).get(device_name, [])
    return {
        TileKind(**{field: row[field] for field in TileKind._fields}): TileShape(
            **{field: row[field] for field in TileShape._fields}
        )
        for row in rows
    }


def write_tuned_tiles(
    device_name: str, tiles: Mapping[TileKind, TileShape], table: Path = TABLE
) -> None:
    """Add `tiles` to the table, in place of what it had of their kinds on that device."""
    everything = json.loads(table.read_text()) if table.exists() else {}
    known = tuned_tiles(device_name, table) if table.exists() else NOT_TUNED
    both = {**known, **tiles}
    everything[device_name] = [kind._asdict() | both[kind]._asdict() for kind in sorted(both)]
    table.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
    tuned_tiles.cache_clear()
