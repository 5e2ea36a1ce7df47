"""The console script: it lists all commands, starts each, and is quick; also from a wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import launch.__main__ as console

ROOT = Path(__file__).parents[2]
HEAVY = ("jax", "torch", "flax", "matplotlib", "tokenizers", "tensorflow_datasets")
# What is read before a command line is.
QUICK = [*(
    f"launch.{name}"
    for name in ("__main__", "ablate.__main__", "benchmark.__main__", "codec.compare",
                 "codec.receptive_field",
                 "codec.train", "compile.__main__", "demo", "evaluate.__main__", "export",
                 "import_audiocraft", "make.random_checkpoint", "make.tagger", "make.text_encoder",
                 "recipe.__main__", "sample", "train")
), "tokenization.browse", "tokenization.check", "tokenization.job"]  # fmt: skip


def test_every_command_is_listed_with_one_line(capsys):
    console.main([])
    shown = capsys.readouterr().out
    assert "\n  sample " in shown and "\n  tokenization.job " in shown
    for name, line in console.commands().items():
        assert line and "\n" not in line, name
        assert f"  {name} " in shown


@pytest.mark.parametrize(
    ("words", "status", "shown"),
    [
        (["sample", "--help"], 0, "usage: python -m launch.sample"),
        (["tokenization.check", "--help"], 0, "usage: python -m tokenization.check"),
        (["compile", "decod"], 2, "error: unknown command decod: did you mean decode?"),
    ],
)
def test_a_command_is_started_as_by_its_module(words, status, shown):
    command = [sys.executable, "-m", "launch", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status and shown in done.stdout + done.stderr


def test_a_misspelt_command_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as exit_:
        console.main(["sampel"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: unknown command sampel: did you mean sample?\n"


def test_nothing_slow_is_loaded_before_a_command_line_is_read():
    code = (
        f"import importlib, sys\nfor name in {QUICK}:\n"
        f"    importlib.import_module(name); print(name, [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} []" for name in QUICK]


def test_a_wheel_holds_the_script_and_all_packages(tmp_path):
    build = [sys.executable, "-c", "from setuptools import build_meta as build; "
             f"build.build_wheel({str(tmp_path)!r})"]  # fmt: skip
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("magnet_jax", "launch", "tokenization", "configs", "pyproject.toml", "README.md",
                 "requirements.txt"):  # fmt: skip
        (copy / name).symlink_to(ROOT / name)
    subprocess.run(build, cwd=copy, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    (entry,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert "magnet-jax = launch.__main__:main" in entry.read_text()
    done = subprocess.run(
        [sys.executable, "-c", "from launch.__main__ import main; main()", "train", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: python -m launch.train" in done.stdout
