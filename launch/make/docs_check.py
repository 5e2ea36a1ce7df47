"""Runs the commands and the Python of the README as pasted, but for shorter training.

python -m launch.make.docs_check

It works in a temporary folder. What needs the network or sets up an environment is left out, and
said. The commands of the guides in docs/ are read by the commands' own parsers in the tests.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What these stand in is not run here: set-up, the hub, chips that are not there.
ELSEWHERE = ("make ", "pip install", "--checkpoint facebook/", "--codec facebook/", "runs/music_")
# Enough to write checkpoints of every kind.
SHORTER = {"launch.train": "--steps 10"}


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The language and the content of each block of code."""
    yield from re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", text)


def commands(block: str) -> list[str]:
    """The commands of a block, lines that end in a backslash joined, comments left out."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line and line[0] != "#"]


def shortened(command: str) -> str:
    for module, options in SHORTER.items():
        if f"python -m {module} " in command:
            command = re.sub(r" --steps \d+", "", command) + f" {options}"
    return command


def run(words: list[str], folder: Path) -> bool:
    """Runs what is there of the page, and says how long it took."""
    started = time.perf_counter()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        words, cwd=folder, env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(f"{'ok' if done.returncode == 0 else 'FAILED'} in {time.perf_counter() - started:.0f} s")
    if done.returncode:
        print(done.stdout[-3000:])
    return done.returncode == 0


def check(page: Path, folder: Path) -> bool:
    """Whether all of a page's commands and Python end well, in the order of the page."""
    for name in ("magnet_jax", "configs"):
        (folder / name).symlink_to(ROOT / name)
    good = True
    for language, block in blocks(page.read_text(encoding="utf-8")):
        if language == "python":
            print("Python of the page ...", end=" ", flush=True)
            good &= run([sys.executable, "-c", block], folder)
        for command in commands(block) if language == "bash" else ():
            if any(word in command for word in ELSEWHERE):
                print(f"left out: {command}")
                continue
            command = shortened(command)
            print(command, "...", end=" ", flush=True)
            good &= run(["bash", "-euo", "pipefail", "-c", command], folder)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, default=ROOT / "README.md")
    page = parser.parse_args().page
    with tempfile.TemporaryDirectory() as folder:
        if not check(page, Path(folder)):
            sys.exit(1)


if __name__ == "__main__":
    main()
