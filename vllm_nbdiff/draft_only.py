# SPDX-License-Identifier: Apache-2.0
"""How a LoRA adapter says that it is draft-only: it acts in the rows of canvases alone."""

from __future__ import annotations

import json
from pathlib import Path

_FILE, _ROWS, _DRAFTS = "adapter_config.json", "nbdiff_rows", "drafts"


def is_draft_only(adapter: Path) -> bool:
    """Whether the adapter in this folder is; one that cannot be read is vLLM's to refuse."""
    try:
        config = json.loads((adapter / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get(_ROWS) == _DRAFTS


def mark_draft_only(adapter: Path) -> None:
    """Have an adapter that was saved say that it is."""
    config = json.loads((adapter / _FILE).read_text(encoding="utf-8")) | {_ROWS: _DRAFTS}
    (adapter / _FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
