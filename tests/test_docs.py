"""What README and docs say can be pasted: each command's own parser takes it."""

import functools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from launch.make.docs_check import blocks, commands
from magnet_jax import cli
from magnet_jax.errors import UserError

ROOT = Path(__file__).parents[1]
OURS = ("launch", "tokenization")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Parsed(Exception):
    """The words of a command were understood."""


def pasted():
    """Page and words of every command that is one of ours."""
    for page in PAGES:
        for language, block in blocks(page.read_text(encoding="utf-8")):
            for command in commands(block) if language == "bash" else ():
                for words in map(shlex.split, re.split(r"&&|\|", command.rstrip("& "))):
                    while words and re.fullmatch(r"\w+=\S*|taskset|-c|\d+", words[0]):
                        words = words[1:]
                    if words[:2] != ["python", "-m"] or words[2].split(".")[0] not in OURS:
                        continue
                    if "..." in words or "$" in " ".join(words):
                        continue  # stands for options of one's own
                    if "--init-from" in words:  # whose settings are read along with the words
                        words[words.index("--init-from") + 1] = "demo"
                    yield pytest.param(words[2], words[3:], id=f"{page.name}: {command[:90]}")


@pytest.mark.parametrize(("module", "words"), pasted())
def test_a_command_is_understood(module, words, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    parse = cli.parse

    @functools.wraps(parse)
    def only_parse(*args, **keywords):
        parse(*args, **keywords)
        raise Parsed

    monkeypatch.setattr(cli, "parse", only_parse)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except UserError as error:
            pytest.fail(str(error))


def test_every_link_within_the_pages_leads_somewhere():
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]*)(?:#[^)]*)?\)", text):
            if target and not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert not missing


def test_every_heading_that_is_linked_is_there():
    def anchors(page):
        heads = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
        return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}

    missing = []
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", page.read_text("utf-8")):
            there = page if not target else page.parent / target
            if there.exists() and anchor not in anchors(there):
                missing.append(f"{page.name}: {target}#{anchor}")
    assert not missing


def test_the_readme_is_a_page_for_newcomers():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
