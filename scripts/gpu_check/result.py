# SPDX-License-Identifier: Apache-2.0
"""What a stage found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "wrong", "failed", "skipped"]


@dataclass
class Result:
    """Of one stage.

    Attributes:
        status: `wrong` is a wrong result, `failed` none at all; both end the command with status 1.
        detail: in one line.
        figures: for the JSON file.
    """

    status: Status
    detail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Skip(Exception):
    """A stage that cannot run here; the message says why."""
