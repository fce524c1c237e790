"""The wheel, installed in an environment of its own, trains in an empty folder."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import mqat
from mqat.plan.catalogue import recipes

ROOT = Path(__file__).parents[2]
SMALL = [
    "trainer.max_steps=2", "model.pretrain.max_steps=2", "model.pipeline_model_parallel_size=1",
    "model.optim.sched.warmup_steps=0", "trainer.limit_val_samples=8", "exp_manager.sample_tokens=2",
    "export.inference_tensor_parallel=1", "quantization.compare_with_finetuned=false",
    "trainer.precision=32",
]  # fmt: skip
pytestmark = pytest.mark.slow


def _run(*command, folder, status=0):
    """Output of a command that sees nothing of this repository."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "WORLD_SIZE")}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=550,
    )  # fmt: skip
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from copies, so that no earlier build's files are in it."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("setuptools, which builds the wheel, is not installed")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"setuptools {version} does not know licence expressions: 77 or newer")
    source = tmp_path_factory.mktemp("source")
    for name in ("mqat", "conf"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    _run(*build, "-w", source / "dist", source, folder=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of scripts of an environment with the wheel; its packages are those that are here."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home)
    packages = Path(sysconfig.get_path("purelib", vars={"base": home, "platbase": home}))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    install = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "-q"]
    _run(*install, "--no-deps", "--force-reinstall", wheel, folder=home)
    return home / "bin"


@pytest.fixture
def folder(tmp_path):
    """Where nothing is."""
    path = tmp_path / "empty"
    path.mkdir()
    return path


def test_the_wheel_holds_the_recipes_and_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        said = archive.read(metadata).decode()
    conf = {path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.*")}
    assert {n.removeprefix("mqat/conf/") for n in names if n.startswith("mqat/conf/")} == conf
    assert len(conf) > 30 and not [name for name in names if name.startswith(("conf/", "tests/"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.10", "Summary: Quant"):
        assert line in said
    assert "Provides-Extra: completion" in said and "Classifier: Typing :: Typed" in said


def test_commands_of_the_installed_package(installed, folder):
    home = _run(installed / "python", "-c", "import mqat; print(mqat.__file__)", folder=folder)
    assert str(installed.parent) in home and str(ROOT) not in home
    assert _run(installed / "mqat", "--version", folder=folder) == f"mqat {mqat.__version__}\n"
    listed = _run(installed / "mqat", "recipes", folder=folder).splitlines()
    assert [line.split()[0] for line in listed] == list(recipes())
    said = _run(installed / "mqat", "config", "model.optim.lr", folder=folder)
    assert "number, at least 0" in said and "peak learning rate" in said
    check = ["recipes", "check", "ptq_llama3_70b_fp8"]
    assert "fits 8 processes" in _run(installed / "mqat", *check, folder=folder)
    assert not list(folder.iterdir())


def test_it_trains_in_an_empty_folder_with_torchrun_inside_or_around(installed, folder):
    mqat_ = installed / "mqat"
    _run(mqat_, "recipes", "cp", "qat_tiny", "own.yaml", folder=folder)
    said = _run(mqat_, "run", "own.yaml", "--nproc-per-node", 2, *SMALL, folder=folder)
    assert "verified" in said
    ran = folder / "runs" / "qat_tiny"
    said = _run(mqat_, "verify", ran / "trtllm", "--reference", ran / "checkpoint", folder=folder)
    assert "every tensor equal to the checkpoint" in said
    torchrun = [installed / "python", "-m", "torch.distributed.run", "--standalone"]
    around = [
        *torchrun,
        "--nproc-per-node",
        2,
        "-m",
        "mqat.cli",
        "ptq",
        "--config",
        "own.yaml",
        *SMALL,
    ]
    assert "verified" in _run(*around, "exp_manager.exp_dir=runs/ptq", folder=folder)
    assert "command: ptq" in (folder / "runs" / "ptq" / "config.yaml").read_text("utf-8")
    wrong = ["run", "own.yaml", "--nproc-per-node", 2, *SMALL, "model.data.seq_length=4096"]
    (line,) = _run(mqat_, *wrong, folder=folder, status=2).splitlines()
    assert line.startswith("error: model.data.seq_length=4096 exceeds")
