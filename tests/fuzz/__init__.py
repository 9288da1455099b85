# SPDX-License-Identifier: Apache-2.0
"""Whole HTTP bodies, valid, edge and hostile, sent beside requests whose answers are known.

`python -m tests.fuzz --help` is the long run. `values` and `fields` say what a body may hold,
`bodies` puts bodies together, `exchange` sends and judges.
"""
