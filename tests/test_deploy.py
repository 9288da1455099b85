# SPDX-License-Identifier: Apache-2.0
"""What containers and the page about them name exists."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from scripts.contract.release import installed
from vllm_nbdiff.versions import SUPPORTED_VLLM

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
IMAGES = sorted((ROOT / "docker").iterdir())


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_an_image_copies_what_it_is_allowed_to(image: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = re.findall(r"^COPY (.+) \S+$", image.read_text(encoding="utf-8"), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert names == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in names)


def test_images_have_the_versions_that_setup_names() -> None:
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    tables = {ast.unparse(n.targets[0]): n.value for n in setup.body if isinstance(n, ast.Assign)}
    _, torch = ast.literal_eval(tables["EXTRAS"])["cpu"]
    assert f"{torch}+cpu" in (ROOT / "docker" / "Dockerfile.cpu").read_text(encoding="utf-8")
    major, minor = max(SUPPORTED_VLLM)
    for text in ((ROOT / "docker" / "Dockerfile.cuda").read_text(encoding="utf-8"), PAGE):
        assert f"VLLM_VERSION={major}.{minor}.0" in text


def test_flags_of_the_page_are_flags_of_the_server() -> None:
    parser = make_arg_parser(FlexibleArgumentParser())
    known = {flag for action in parser._actions for flag in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    others = {"--gpus", "--ipc", "--entrypoint", "--build-arg", "--no-deps"}  # of docker and pip
    assert "--max-num-seqs" in named and named - others <= known


def test_metrics_of_the_page_are_exported() -> None:
    """By vLLM, or by the plugin."""
    package = installed()[1] / "v1"
    sources = [
        *(package / "metrics").glob("*.py"),
        *(package / "spec_decode").glob("metrics.py"),
        ROOT / "vllm_nbdiff" / "compat" / "metrics.py",
    ]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    named = set(re.findall(r"vllm:\w+", PAGE))
    assert len(named) > 5 and {name for name in named if f'"{name}"' not in text} == set()


def test_the_kubernetes_example_is_one() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    spec = yaml.safe_load(example)["spec"]
    (container,) = spec["containers"]
    arguments = container["args"]
    grace = int(arguments[arguments.index("--shutdown-timeout") + 1])
    assert spec["terminationGracePeriodSeconds"] >= grace + 30
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["volumes"]}
    assert all(f"{kind}Probe" in container for kind in ("startup", "readiness", "liveness"))
