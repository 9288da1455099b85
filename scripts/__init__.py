# SPDX-License-Identifier: Apache-2.0
"""Commands of a checkout; nothing here is installed."""
