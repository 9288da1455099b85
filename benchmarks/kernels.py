# SPDX-License-Identifier: Apache-2.0
"""Times the kernels against their memory floor and against what else could do the job.

    python -m benchmarks.kernels                  # on a CUDA GPU
    python -m benchmarks.kernels --toy            # on any CPU: the same code on toy shapes, in
                                                  # Triton's interpreter; its times mean nothing

Shapes are those of a denoise step of NBDiff-7B: 32 query rows per request, 32/8 heads of 128, bf16,
vocabulary 153376, 8 rows of logits per request (one sub-block). Every contender runs from a CUDA
graph with a cold L2 cache; `bytes` are those that must move at least once, `share` compares their
rate with the copy bandwidth measured in the same run. Keys and values lie as in the engine's cache.
A contender's result is checked before it is timed; of one that fails a comment says why, and the
rest go on. Exit status 1 where one of ours failed. Columns are tab-separated.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

if "--toy" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch

from benchmarks.attention_cases import attention_case, uneven_case
from benchmarks.kernel_cases import NBDIFF_7B, TOY, Case, Shapes, other_cases
from benchmarks.timing import Measure, copy_bandwidth, describe, fits, measure_of

# The paged cache, its gathered copy, half of it on the way there, and the check of one request.
COPIES_OF_KV = 3


def cases(shapes: Shapes, requests: list[int], contexts: list[int]) -> Iterator[Case]:
    for count in requests:
        for context in contexts:
            if fits(COPIES_OF_KV * shapes.kv_bytes(count, context), shapes.device):
                yield attention_case(shapes, count, context)
                if count > 1:
                    yield uneven_case(shapes, count, context)
            else:
                print(f"# {count} requests of {context} tokens do not fit in memory: skipped")
        yield from other_cases(shapes, count)


def report(case: Case, measure: Measure, bandwidth: float) -> list[str]:
    """Print a row per contender. Returns the names of those that failed."""
    failed = []
    for name, contender in case.contenders.items():
        label = f"{case.kernel}\t{case.requests}\t{case.context}\t{name}"
        try:
            contender.check(contender.run())
            seconds = measure(contender.run)
        except Exception as reason:
            failed.append(name)
            why = " ".join(f"{type(reason).__name__}: {reason}".split())
            print(f"# failed: {label}\t{why}", flush=True)
            continue
        share = case.num_bytes / seconds / bandwidth
        figures = f"{seconds * 1e6:.1f}\t{case.num_bytes / 1e6:.3f}\t{share:.3f}"
        print(f"{label}\t{figures}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--toy", action="store_true", help="toy shapes in the interpreter, on CPU")
    parser.add_argument("--requests", type=int, nargs="+", help="default 1 8 32 128; toy 1 3")
    parser.add_argument("--contexts", type=int, nargs="+", help="default 512 to 32768; toy 0 45")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        parser.error("no CUDA GPU; --toy runs on CPU")
    shapes = TOY if options.toy else NBDIFF_7B
    requests = options.requests or ([1, 3] if options.toy else [1, 8, 32, 128])
    contexts = options.contexts or ([0, 45] if options.toy else [512, 2048, 8192, 32768])

    torch.manual_seed(0)
    measure, bandwidth = measure_of(shapes.device), copy_bandwidth(shapes.device)
    print(f"# {describe(shapes.device)}")
    print(f"# copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    print("kernel\trequests\tcontext\tcontender\tus\tMB\tshare")
    failed = []
    for case in cases(shapes, requests, contexts):
        failed += report(case, measure, bandwidth)
    return int(any(name.startswith("ours") for name in failed))


if __name__ == "__main__":
    sys.exit(main())
