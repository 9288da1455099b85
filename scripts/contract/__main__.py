# SPDX-License-Identifier: Apache-2.0
"""`python -m scripts.contract [RELEASE]`: a table, and exit status 1 where anything differs."""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from scripts.contract import release, reviewed
from scripts.contract.check import Contract, Row, check

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.contract", description=__doc__)
    parser.add_argument("release", nargs="?", help="of vLLM, 0.33.0; default: the installed one")
    parser.add_argument("--accept", action="store_true", help="note that all places were read")
    parser.add_argument("--diff", action="store_true", help="from the installed release's places")
    parser.add_argument("--all", action="store_true", help="a line for everything that is touched")
    parser.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        help="pytest, with these arguments, on the release's Python files and the compiled modules "
        "of the installed release",
    )
    arguments = parser.parse_args()
    own, folder = release.installed()
    name = arguments.release or own
    package = folder if name == own else release.fetched(name)
    if arguments.run is not None:
        return run_tests(release.with_compiled_parts(package), arguments.run)
    contract = contract_of(package)
    if arguments.diff:
        print_diff(contract_of(folder), contract)
    if arguments.accept:
        reviewed.accept(reviewed.load(), name, contract.digests())
    return report(contract, name, arguments.all)


def contract_of(package: Path) -> Contract:
    """What this checkout touches in vLLM's package."""
    return check(ROOT / "vllm_nbdiff", package, ROOT / "kernels")


def problems_of(contract: Contract, name: str) -> list[Row]:
    """What differs, places that are to be read included."""
    unread = reviewed.differences(reviewed.load(), name, contract.digests())
    rows = [row for row in contract.rows if row.problem is not None]
    return rows + [Row("text", place, "reviewed.json", why) for place, why in unread.items()]


def report(contract: Contract, name: str, everything: bool) -> int:
    """Print the table; the exit status."""
    problems = problems_of(contract, name)
    counts, wrong = Counter(row.kind for row in contract.rows), Counter(r.kind for r in problems)
    counts["text"] = len(contract.texts)
    print(f"vLLM {name}\n{'kind':10} {'touched':>8} {'differ':>8}")
    for kind, count in sorted(counts.items()):
        print(f"{kind:10} {count:8} {wrong[kind]:8}")
    for row in sorted(contract.rows if everything else (), key=lambda row: row.what):
        print(f"{row.kind:10} {row.what}  ({row.where})")
    for row in problems:
        print(f"DIFFERS {row.kind}: {row.what} {row.problem} ({row.where})")
    return int(bool(problems))


def print_diff(before: Contract, after: Contract) -> None:
    """How the text of each place differs."""
    for place, text in after.texts.items():
        old = before.texts.get(place, "")
        for line in difflib.unified_diff(
            old.splitlines(), text.splitlines(), place, place, "", "", 3, ""
        ):
            print(line)


def run_tests(folder: Path, arguments: list[str]) -> int:
    """pytest with a folder first on the path, in its processes too."""
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
