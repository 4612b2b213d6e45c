"""Environments with the versions that Colab and Kaggle serve; all else, torch above all, is this one's."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

STACKS = {  # what pip installs
    "colab": "ipykernel==6.17.1 ipython==7.34.0 jupyter_client==6.1.12 ipython_genutils ipywidgets==7.7.1",
    "kaggle": "ipykernel==6.17.1 ipython==7.34.0 jupyter_client==8.6.3 ipywidgets==8.1.5",
    "newest": "",
}
LAB_WIDGETS = {"colab": "jupyterlab_widgets==1.1.11", "kaggle": "jupyterlab_widgets==3.0.13"}  # in JupyterLab


def version(stack: str, package: str) -> str | None:
    """The version of a package that a stack asks for."""
    return dict(name.split("==") for name in STACKS[stack].split() if "==" in name).get(package)


def kernel_spec(python: Path, name: str) -> str:
    """The content of a kernel.json."""
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    return json.dumps({"argv": argv, "display_name": name, "language": "python"})


def interpreter(stack: str, home: Path, *more: str) -> Path:
    """The Python of a stack, in a new environment in `home`; `more`: packages beside it, alone."""
    if not STACKS[stack]:
        return Path(sys.executable)
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    python = home / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--retries", "1"]
    own = [name for name in STACKS[stack].split() if not name.startswith("ipywidgets")]
    widgets = f"ipywidgets=={version(stack, 'ipywidgets')}"
    for names in (own, ["--no-deps", widgets, *more]):  # ipywidgets 7 would bring a whole notebook server
        done = subprocess.run([*pip, *names], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip cannot install {names}: {done.stderr.strip().splitlines()[-1]}")
    packages = next(home.glob("lib/python*/site-packages"))
    (packages / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python
