# SPDX-License-Identifier: Apache-2.0
"""One command that shows on a GPU what works: `make gpu-check`."""
