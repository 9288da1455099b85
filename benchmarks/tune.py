# SPDX-License-Identifier: Apache-2.0
"""Measures launch shapes of attention, and writes the fastest to `kernels/tuned_tiles.json`.

    python -m benchmarks.tune                     # on a CUDA GPU
    python -m benchmarks.tune --toy --table FILE  # on any CPU: toy shapes, times mean nothing

For canvases of 32 rows, and for single rows, of NBDiff-7B's heads or those given. A shape is timed
over `--requests` requests of `--context` tokens, its result checked before; of one that the device
has no room for the reason is printed. One that is not at least 2 % faster than what `tile_shape`
chooses is not written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

if "--toy" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from vllm_nbdiff.kernels.attention_launch import attention_launch
from vllm_nbdiff.kernels.attention_tile import resident
from vllm_nbdiff.kernels.device import device_name, shared_memory
from vllm_nbdiff.kernels.tuned_tiles import TABLE, TileKind, TileShape, write_tuned_tiles

from benchmarks.attention_cases import batch_of, check_of, our_attention
from benchmarks.kernel_cases import NBDIFF_7B, TOY, Shapes
from benchmarks.timing import Measure, describe, measure_of

GAIN = 0.02
BLOCKS_N, WARPS, STAGES = (32, 64, 128), (4, 8), (2, 3, 4, 5, 7)


def candidates(kind: TileKind, toy: bool, memory: int) -> Iterator[TileShape]:
    """Launch shapes of a kind on a device with so many bytes of shared memory."""
    choices = [(16, 32), (4,), (2,)] if toy else [BLOCKS_N, WARPS, STAGES]
    for own in product(*choices):
        shape = kind.block_m, *own
        held = resident(kind.head_dim, kind.itemsize, shape, memory)
        yield TileShape(*shape, held)


def fastest(
    shapes: Shapes, contexts: list[int], rows: int, measure: Measure, toy: bool
) -> tuple[TileKind, TileShape | None]:
    """The launch shape for segments of so many rows; None: the present one."""
    batch, longest = batch_of(shapes, contexts, rows), max(contexts) + rows
    inputs = batch.q, batch.k_cache, batch.table
    present = attention_launch(*inputs, max_query_len=rows).tile
    kind = TileKind(shapes.head_dim, present.block_m, batch.q.element_size())
    check, times = check_of(batch, rows), dict[TileShape, float]()
    memory = shared_memory(batch.q.device)
    for tile in dict.fromkeys([present, *candidates(kind, toy, memory)]):
        run = our_attention(batch, rows, longest, tile)
        try:
            check(run())
            times[tile] = measure(run)
        except Exception as reason:  # of a shape that does not fit, or is wrong
            why = " ".join(f"{type(reason).__name__}: {reason}".split())
            print(f"# {rows} rows\t{tuple(tile)}\t{why}", flush=True)
            continue
        print(f"{rows}\t{tuple(tile)}\t{times[tile] * 1e6:.1f}", flush=True)
    if not times:
        sys.exit(f"{rows} rows: no launch shape ran")
    best = min(times, key=lambda tile: times[tile])
    gains = best != present and times[best] <= (1 - GAIN) * times.get(present, float("inf"))
    return kind, best if gains else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--toy", action="store_true", help="toy shapes in the interpreter, on CPU")
    parser.add_argument("--heads", type=int, nargs=2, help="query and KV heads of a device")
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--table", type=Path, default=TABLE, help=f"default {TABLE.name}")
    given = parser.parse_args()
    if not given.toy and not torch.cuda.is_available():
        parser.error("no CUDA GPU; --toy runs on CPU")
    if given.toy and given.table == TABLE:
        parser.error("--toy needs --table: its times mean nothing")
    shapes = TOY if given.toy else NBDIFF_7B
    if given.heads:
        shapes = replace(shapes, q_heads=given.heads[0], kv_heads=given.heads[1])
    if given.head_dim:
        shapes = replace(shapes, head_dim=given.head_dim)
    torch.manual_seed(0)
    print(f"# {describe(shapes.device)}")
    print("rows\tblock_m, block_n, num_warps, num_stages, resident\tus")
    measure, contexts = measure_of(shapes.device), [given.context] * given.requests
    rows = (shapes.block,) if given.toy else (shapes.block, 1)  # those are of one kind
    found = dict(fastest(shapes, contexts, count, measure, given.toy) for count in rows)
    tiles = {kind: tile for kind, tile in found.items() if tile is not None}
    if tiles:
        write_tuned_tiles(device_name(torch.device(shapes.device)), tiles, given.table)
    print(f"# {len(tiles)} of {len(found)} written to {given.table}")


if __name__ == "__main__":
    main()
