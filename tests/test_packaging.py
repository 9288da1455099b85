# SPDX-License-Identifier: Apache-2.0
"""What is installed: the wheel's content, the editable install, the set-up script."""

import email
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import vllm_nbdiff

ROOT = Path(__file__).resolve().parent.parent
IGNORE = shutil.ignore_patterns("__pycache__")


def run(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """Run a command; returns its standard output, fails the test on another exit status."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + (done.stderr if status else "")


def run_python(code: str, cwd: Path) -> str:
    return run(sys.executable, "-c", code, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves its products in the source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "vllm_nbdiff", "kernels"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=IGNORE)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", source / "dist", source, cwd=source)
    return next((source / "dist").glob("vllm_nbdiff-*.whl"))


def test_wheel_holds_every_module_and_no_top_level_kernels(wheel: Path) -> None:
    expected = {f"vllm_nbdiff/{path}" for path in modules(ROOT / "vllm_nbdiff")}
    expected |= {f"vllm_nbdiff/kernels/{path}" for path in modules(ROOT / "kernels")}
    expected |= {"vllm_nbdiff/py.typed", "vllm_nbdiff/kernels/tuned_tiles.json"}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected


def modules(package: Path) -> list[Path]:
    return [path.relative_to(package) for path in package.rglob("*.py")]


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"vllm_nbdiff-{vllm_nbdiff.__version__}.dist-info"
    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert metadata["Name"] == "vllm-nbdiff"
    assert metadata["Version"] == vllm_nbdiff.__version__
    assert set(metadata.get_all("Provides-Extra", [])) == {
        *("cpu", "cuda", "ray", "adapt", "demo", "test")
    }
    # Which vLLM, and so which torch, is the user's choice of extra.
    assert all("extra ==" in line for line in metadata.get_all("Requires-Dist", []))
    entry_points = archive.read(f"{info}/entry_points.txt").decode().split()
    assert entry_points == ["[vllm.general_plugins]", "nbdiff", "=", "vllm_nbdiff:register"]


def test_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile")
    run(*pip, "--target", tmp_path, wheel, cwd=tmp_path)
    code = "import vllm_nbdiff.kernels as k, vllm_nbdiff; print(k.__file__); vllm_nbdiff.register"
    assert run_python(code, cwd=tmp_path).startswith(str(tmp_path))


def test_editable_install_from_another_directory(tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys, vllm_nbdiff, vllm_nbdiff.kernels\n"
        "print(vllm_nbdiff.kernels.__file__)\n"
        "print(importlib.util.find_spec('kernels') and 'shadowed')\n"
        "print({'torch', 'vllm', 'transformers', 'numpy'} & {*sys.modules})"
    )
    kernels, shadow, heavy = run_python(code, cwd=tmp_path).split("\n")[:3]
    assert kernels == str(ROOT / "kernels" / "__init__.py")
    assert shadow == "None"
    assert heavy == "set()"


def test_transformers_imports_beside_the_checkout() -> None:
    """`kernels/` is importable here, under the name of a package that transformers looks for."""
    run_python("from transformers import LlamaForCausalLM, Trainer", cwd=ROOT)


def test_vllm_command(tmp_path: Path) -> None:
    """It looks its own version up under the distribution name `vllm`, whatever it is told to do."""
    command = Path(sys.executable).with_name("vllm")
    assert "--hf-overrides" in run(command, "serve", "--help=ModelConfig", cwd=tmp_path)


@pytest.mark.parametrize("arguments", [(), ("tpu",)])
def test_setup_refuses_an_unknown_target(arguments: tuple[str, ...], tmp_path: Path) -> None:
    script = ROOT / "scripts" / "setup_env.py"
    text = run(sys.executable, script, *arguments, cwd=tmp_path, status=1)
    assert "{cpu,cuda}" in text


def test_setup_refuses_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "setup_env.py"))
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match=r"3\.11 or later.*is 3\.10\.4"):
        script["create_environment"]()


def test_make_without_a_python(tmp_path: Path) -> None:
    for name in ("Makefile", "setup.py", "scripts/setup_env.py", "vllm_nbdiff/mend.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text = run("make", "setup", "TARGET=cpu", "PYTHON=", cwd=tmp_path, status=2)
    assert "Python 3.11 or later is needed" in text


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("exec make test")
