# SPDX-License-Identifier: Apache-2.0
"""Which text of each place somebody has read, by release."""

from __future__ import annotations

import json
from pathlib import Path

from packaging.version import Version

FILE = Path(__file__).with_name("reviewed.json")
# {place: {release: digest}}
Reviewed = dict[str, dict[str, str]]


def load(file: Path = FILE) -> Reviewed:
    """What has been read."""
    return json.loads(file.read_text(encoding="utf-8"))


def differences(reviewed: Reviewed, release: str, digests: dict[str, str]) -> dict[str, str]:
    """What is to be read in a release, and why.

    Args:
        digests: of the places that are touched there.
    """
    found = {}
    for place, digest in digests.items():
        known = reviewed.get(place, {})
        if digest in known.values() and known.get(release, digest) == digest:
            continue
        if release in known:
            found[place] = f"is not what was read in {release}"
        elif known:
            found[place] = f"changed since {max(known, key=Version)}"
        else:
            found[place] = "was not read yet"
    return found


def accept(reviewed: Reviewed, release: str, digests: dict[str, str], file: Path = FILE) -> None:
    """Note that all places have been read in a release; forget those that are not touched."""
    kept = {place: reviewed.get(place, {}) | {release: digests[place]} for place in digests}
    ordered = {place: dict(sorted(kept[place].items())) for place in sorted(kept)}
    file.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
