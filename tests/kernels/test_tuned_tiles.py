# SPDX-License-Identifier: Apache-2.0
"""Launch shapes that were measured: kept in a table, taken by the launcher."""

from pathlib import Path

import pytest
import torch
from vllm_nbdiff.kernels import attention_launch
from vllm_nbdiff.kernels.attention_tile import tile_shape
from vllm_nbdiff.kernels.tuned_tiles import TileKind, TileShape, tuned_tiles, write_tuned_tiles

from tests.kernels.attention_cases import (
    Segment,
    assert_as_good_as_eager,
    launch_for,
    make_case,
)

CANVAS, ROW = TileKind(128, 128, 2), TileKind(128, 16, 2)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    table = tmp_path / "tiles.json"
    first, second = TileShape(128, 128, 8, 3), TileShape(16, 32, 4, 7, resident=2)
    write_tuned_tiles("one", {CANVAS: first}, table)
    write_tuned_tiles("one", {ROW: second}, table)
    write_tuned_tiles("other", {ROW: second}, table)
    assert tuned_tiles("one", table) == {CANVAS: first, ROW: second}
    third = TileShape(128, 32, 8, 4)
    write_tuned_tiles("one", {CANVAS: third}, table)
    assert tuned_tiles("one", table) == {CANVAS: third, ROW: second}
    assert tuned_tiles("other", table) == {ROW: second}
    assert tuned_tiles("a third", table) == {}


def test_the_table_goes_before_the_rule() -> None:
    tuned = {CANVAS: TileShape(128, 128, 8, 3)}

    def tile(rows: int, head_dim: int = 128) -> TileShape:
        return tile_shape(head_dim, 4, rows, 2, 227 * 1024, tuned)

    assert tile(32) == tile(100) == tuned[CANVAS]
    assert tile(1) == tile_shape(128, 4, 1, 2, 227 * 1024)
    assert tile(32, head_dim=64) == tile_shape(64, 4, 32, 2, 227 * 1024)


@pytest.mark.parametrize("processors", [None, 12])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_attention_in_tuned_tiles(
    monkeypatch: pytest.MonkeyPatch, processors: int | None, dtype: torch.dtype
) -> None:
    case = make_case([Segment(9, 75, 1), Segment(5, 133, 0)], dtype)
    present = launch_for(case).tile
    own = present._replace(block_n=2 * present.block_n)
    kind = TileKind(32, present.block_m, dtype.itemsize)
    monkeypatch.setattr(attention_launch, "tuned_tiles", lambda name: {kind: own})
    assert launch_for(case).tile == own
    assert_as_good_as_eager(case, processors=processors)
