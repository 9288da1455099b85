# SPDX-License-Identifier: Apache-2.0
"""Whether a release of vLLM has everything that the plugin touches: `python -m scripts.contract`.

Read from the sources of both, without a GPU and without importing vLLM. What is touched is derived
from the plugin's code:

- every name that is imported from vLLM, patched in it or named under "Upstream:" in a docstring;
- every attribute that is read of, and every argument that is passed to, something whose class is
  known: from an annotation, a constructor, the class that is patched, or a name (`vllm_config`);
- every method that is overridden, every abstract one, every kernel that has a stand-in;
- calls whose order a docstring relies on ("Order:").

`reviewed.json` has a digest of each place that somebody read in a release: overridden or patched
methods and what docstrings name. One that differs is a difference until it has been read.
"""
