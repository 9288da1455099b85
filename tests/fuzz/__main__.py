# SPDX-License-Identifier: Apache-2.0
"""The long run: `python -m tests.fuzz --bodies 2000 --seed 0`. Exits with 1 at a failure."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz import bodies, exchange
from tests.serving.keeper import Keeper


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--bodies", type=int, default=2000, help="how many are sent")
    parser.add_argument("--seed", type=int, default=0, help="other bodies for another seed")
    parser.add_argument("--first", type=int, default=0, help="leave out the bodies before this one")
    parser.add_argument("--group", type=int, default=4, help="bodies that are sent at once")
    parser.add_argument(
        "--replay", type=Path, help='a file with a call a line: ["/v1/completions", {...}]'
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="print every failure; start a dead server again"
    )
    parser.add_argument("--logs", type=Path, help="folder for the server's logs")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[bodies.Call]:
    """The calls that the command line asks for."""
    if options.replay:
        lines = options.replay.read_text().splitlines()
        return [bodies.Call(*json.loads(line)) for line in lines if line]
    return bodies.generate(options.bodies, options.seed)[options.first :]


def main() -> int:
    """Send all; print counts by status and what failed."""
    options = arguments()
    calls = chosen(options)
    logs = options.logs or Path(tempfile.mkdtemp(prefix="fuzz-"))
    logs.mkdir(parents=True, exist_ok=True)
    statuses: Counter[int] = Counter()
    failures = 0
    with Keeper(logs) as keeper:
        expected = exchange.record(keeper.server())
        for start in range(0, len(calls), options.group):
            group = calls[start : start + options.group]
            answered, wrong = exchange.send(keeper.server(), group, expected)
            statuses.update(answer.status for answer in answered)
            if not wrong:
                continue
            failures += 1
            print(f"--- bodies {options.first + start} to {options.first + start + len(group) - 1}")
            print(keeper.report(wrong), flush=True)
            if not options.keep_going:
                break
    counts = ", ".join(f"HTTP {status or 'none'}: {n}" for status, n in sorted(statuses.items()))
    print(f"{statuses.total()} bodies, {counts}; {failures} groups failed, logs in {logs}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
