"""`elastic_kernels` as a distribution of its own: its wheel, alone, runs the programs of its README."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import elastic_kernels

KERNELS = Path(__file__).parent.parent / "kernels"
BUILD = "import setuptools.build_meta as build, sys; print(build.build_wheel(sys.argv[1]))"
# Appended folders are searched, but their .pth files, which editable installations need, are not read; what
# an environment of the wheel and PyTorch would not have is made to fail where it is imported.
ALONE = """
import sys
wheel, packages, absent, *programs = sys.argv[1:]
sys.path[:0], sys.path[len(sys.path):] = [wheel], [packages]
sys.modules |= dict.fromkeys(absent.split())
import elastic_kernels
assert elastic_kernels.__file__.startswith(wheel)
print(elastic_kernels.__version__)
for program in programs:
    exec(compile(program, "README.md", "exec"), {})
print("ran", len(programs))
"""


def run(program: str, *arguments: str, cwd: Path, options: tuple[str, ...] = ()) -> str:
    command = [sys.executable, *options, "-c", program, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def needed_by(*names: str) -> set[str]:
    """These distributions and all that they ask for here, by normalised names."""
    reached, left = set(), list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name in reached:
            continue
        reached.add(name)
        lines = map(Requirement, importlib.metadata.requires(name) or [])
        left += [line.name for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})]
    return reached


def strangers(*names: str) -> str:
    """Modules of all other distributions, which an environment of only these would lack."""
    there, ours, others = needed_by(*names), {"elastic_kernels"}, {"poa"}
    for package in importlib.metadata.distributions():
        files = {file.parts[0].removesuffix(".py") for file in package.files or () if file.suffix == ".py"}
        (ours if canonicalize_name(package.metadata["Name"]) in there else others).update(files)
    return " ".join(name for name in others - ours if name.isidentifier())


def test_the_wheel_alone_runs_the_programs_of_its_readme(tmp_path: Path) -> None:
    source = shutil.copytree(
        KERNELS, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    )
    name = run(BUILD, str(tmp_path), cwd=source).splitlines()[-1]
    version = elastic_kernels.__version__
    assert name == f"elastic_kernels-{version}-py3-none-any.whl"
    with ZipFile(tmp_path / name) as wheel:
        wheel.extractall(tmp_path / "wheel")
    files = {str(p.relative_to(tmp_path / "wheel")) for p in (tmp_path / "wheel").rglob("*.py")}
    assert files == {str(p.relative_to(KERNELS)) for p in KERNELS.rglob("*.py") if "build" not in p.parts}
    assert (tmp_path / "wheel" / "elastic_kernels" / "py.typed").exists()
    (info,) = (tmp_path / "wheel").glob("*.dist-info")
    metadata = importlib.metadata.Distribution.at(info)
    needed = [line for line in metadata.requires or [] if "extra ==" not in line]
    assert [re.split(r"[<>=]", line)[0] for line in needed] == ["torch"]
    programs = re.findall(r"^```python\n(.*?)^```", (KERNELS / "README.md").read_text(), re.M | re.S)
    packages = Path(torch.__file__).parent.parent
    of_timm = [text for text in programs if "import timm" in text]
    assert len(programs) >= 7 and len(of_timm) == 1
    absent = strangers("torch")
    assert {"numpy", "poa", "triton"} - needed_by("torch") <= set(absent.split())
    runs = [(absent, [text for text in programs if text not in of_timm])]
    if (packages / "timm").exists():
        runs.append((strangers("torch", "timm"), of_timm))
    for absent, texts in runs:
        arguments = (str(tmp_path / "wheel"), str(packages), absent, *texts)
        said = run(ALONE, *arguments, cwd=tmp_path, options=("-I", "-S")).splitlines()
        assert said[0] == version and said[-1] == f"ran {len(texts)}"
