"""What the README says about the scripts is true: commands parse, links exist, each detail stands in the named line."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from benchmark import readme

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


def test_there_is_something_to_check():
    assert "ppo_cartpole" in SCRIPTS and len(COMMANDS) > 8


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".py" in c])
def test_every_quoted_command_of_a_script_parses(command):
    for part in command.split("&&"):
        words = shlex.split(part)
        for at, word in enumerate(words):
            if word.endswith(".py"):
                assert (ROOT / word).exists()
                if "/" not in word:  # a script; the tools of benchmark/ have tests of their own
                    script = importlib.import_module(Path(word).stem)
                    script.parse_args(script.Args, words[at + 1 :]).check()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", README))))
def test_every_linked_file_exists(target):
    assert (ROOT / target).exists()


def test_the_details_stand_where_the_table_says_and_the_numbers_are_the_committed_ones():
    assert readme.renew(README) == README, "run python benchmark/readme.py"
    rows = re.findall(r"^\| (\d+) \| (.*\[\d+\]\(\w+\.py#L\d+\).*) \|$", README, re.M)
    for n, row in rows:
        links = re.findall(r"\[(\d+)\]\((\w+\.py)#L\1\)", row)
        assert {script for _, script in links} == set(readme.SCRIPTS)
        for line, script in links:
            assert f"[detail {n}]" in (ROOT / script).read_text().splitlines()[int(line) - 1]
    assert [int(n) for n, _ in rows] == list(range(1, 14))


@pytest.mark.parametrize(("script", "limit"), [("ppo_cartpole", 250), ("ppo_continuous", 350)])
def test_what_people_read_fits_in_one_sitting(script, limit):
    lines = (ROOT / f"{script}.py").read_text().rstrip().splitlines()
    first = next(i for i, line in enumerate(lines) if line.endswith(" ENVIRONMENTS"))
    last = next(i for i, line in enumerate(lines) if line.endswith(" AROUND THE RUN"))
    read = "\n".join(lines[first:last]).rstrip().splitlines()
    assert len(read) <= limit
