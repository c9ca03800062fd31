"""The presets are found wherever qspin is: in a wheel, in a bare checkout, and installed as editable."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

SHIPPED = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "presets").rglob("*") if path.is_file())
NAMES = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))

ASK = """
import qspin
from pathlib import Path
from qspin.config import load_config
from qspin.config_files import preset_names
data = load_config("quickstart").data
assert Path(data.source).is_file() and Path(data.heldout_source).is_file()
templates = {load_config(name).chat.template for name in preset_names()} - {None}
assert templates and all(Path(template).is_file() for template in templates)
print(Path(qspin.__file__).parent)
print(*preset_names())
"""


def run(command: list[str], folder: Path) -> str:
    """What a command prints when it is called from another folder, and knows no PYTHONPATH."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a build/ folder behind, and would pack what an older one holds."""
    checkout = tmp_path_factory.mktemp("checkout") / "qspin"
    checkout.mkdir()
    for path in ("pyproject.toml", "cli.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / path, checkout)
    for path in ("qspin", "presets", "tests"):
        shutil.copytree(ROOT / path, checkout / path, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    # the environment has setuptools (a development dependency), so that nothing is fetched
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), "."]
    run([sys.executable, "-m", "pip", *build], checkout)
    [built] = out.iterdir()
    return built


def test_the_wheel_holds_the_package_and_its_presets_and_no_more(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "qspin").rglob("*.py")}
    assert names == {*modules, "qspin/py.typed", "qspin/figures/report.html.j2", *(f"qspin/{name}" for name in SHIPPED)}
    data = {"quickstart.yaml", "house-style/train.jsonl", "sizes/7b.yaml", "templates/plain.jinja"}
    assert {f"qspin/presets/{name}" for name in data} <= names


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [metadata] = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    needs = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(needs) == len(project["dependencies"]) + sum(map(len, project["optional-dependencies"].values()))
    assert "Requires-Python: >=3.11" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    for name in ("LICENSE", "NOTICE"):
        [shipped] = [found for found in archive.namelist() if found.endswith(f".dist-info/licenses/{name}")]
        assert archive.read(shipped) == (ROOT / name).read_bytes()
    [scripts] = [archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert scripts.split() == ["[console_scripts]", "qspin", "=", "qspin.__main__:main"]


def test_the_wheel_finds_its_presets(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    import yaml

    libraries = Path(yaml.__file__).parents[1]  # -I leaves out the user's folders and variables; these are read last
    set_path = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); sys.path.append({str(libraries)!r})"
    said = run([sys.executable, "-I", "-c", f"{set_path}\n{ASK}"], tmp_path)
    assert said.splitlines() == [str(tmp_path / "site" / "qspin"), " ".join(NAMES)]


def test_the_command_of_a_wheel_lists_the_presets(wheel: Path, tmp_path: Path) -> None:
    import yaml

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    run([sys.executable, "-m", "pip", *install], tmp_path)
    [site] = (tmp_path / "venv" / "lib").glob("*/site-packages")
    (site / "libraries.pth").write_text(f"{Path(yaml.__file__).parents[1]}\n")  # a folder's own .pth files are not read

    listed = run([str(python.with_name("qspin")), "presets"], tmp_path)
    assert sorted({line.split()[0] for line in listed.splitlines() if line} & set(NAMES)) == NAMES
    assert run([str(python), "-c", "import qspin; print(qspin.__file__)"], tmp_path).startswith(str(site))


def test_an_sdist_is_the_checkout(tmp_path: Path) -> None:
    """Whoever packs qspin for a distribution can run its tests."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout: this is an sdist itself")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT).split("\0")
    files = {name for name in listed if name and (ROOT / name).is_file()}
    checkout = tmp_path / "qspin"
    for name in files:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "qspin" / "__pycache__").mkdir()
    (checkout / "qspin" / "__pycache__" / "stale.pyc").touch()

    run([sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('..')"], checkout)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        inside = {member.name.partition("/")[2] for member in packed.getmembers() if member.isfile()}
    written = {"PKG-INFO", "setup.cfg", *(name for name in inside if name.startswith("qspin.egg-info/"))}
    assert inside - written == files


def test_a_bare_checkout_finds_its_presets(tmp_path: Path) -> None:
    # elsewhere than the checkout that is installed, so that it is this one that answers
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    shutil.copy(ROOT / "cli.py", checkout)
    for name in ("qspin", "presets"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "presets" / "only-here.yaml").write_text("seed: 1\n")
    (tmp_path / "elsewhere").mkdir()

    assert "Usage: cli.py" in run([sys.executable, str(checkout / "cli.py"), "--help"], tmp_path / "elsewhere")
    unknown = [sys.executable, str(checkout / "cli.py"), "run", "nothing-like-it", "--out", "x"]
    done = subprocess.run(unknown, cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=False)
    assert ", ".join(sorted([*NAMES, "only-here"])) in done.stderr


def test_the_editable_install_finds_its_presets(tmp_path: Path) -> None:
    said = run([sys.executable, "-c", ASK], tmp_path)
    assert said.splitlines() == [str(ROOT / "qspin"), " ".join(NAMES)]


def test_everything_that_is_imported_is_declared() -> None:
    """A package that only comes along with another may stay away with its next release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {re.split(r"[^\w.-]", need)[0].replace("-", "_").lower() for need in needs}
    imported = set()
    for path in (ROOT / "qspin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    imported -= {*sys.stdlib_module_names, "qspin", "triton"}  # torch brings Triton, or ours goes without
    names = {"yaml": "pyyaml", "llama_cpp": "llama_cpp_python", "sklearn": "scikit_learn"}
    assert {names.get(name, name) for name in imported} <= declared
    assert {"torch", "yaml", "jinja2"} <= imported, "the search finds imports"
