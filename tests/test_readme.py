"""What the README says is true: commands parse, links exist, details stand in the named lines."""

import ast
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest

import grpo_toy
from benchmark import (
    Parser,
    atari,
    classic,
    collapse,
    grids,
    grpo,
    lockstep,
    ratchet,
    read_csv,
    readme,
    speed,
    sweep,
    table1,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark/results"
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
                if "/" not in word:  # a script; the tools of benchmark/ have a test of their own
                    check(importlib.import_module(Path(word).stem), words[at + 1 :])


def check(script, argv: list[str]) -> None:
    """Raises where a script would refuse these flags."""
    args = script.parse_args(argv)
    if script is grpo_toy:
        script.check_args(args, script.choose_task(args, None))
    else:
        script.check_args(args)


QUOTED = [*COMMANDS, *re.findall(r"`([^`\n]*)`", README), *re.findall(r"^    (.*)", README, re.M)]
FOUND = [re.match(r"(?:python )?(benchmark/\w+\.py.*)", text) for text in QUOTED]
TOOLS = {match[1].strip(" )") for match in FOUND if match}


@pytest.mark.parametrize("command", sorted(TOOLS))
def test_every_quoted_command_of_a_tool_parses(command, monkeypatch):
    class Parsed(Exception):
        pass

    def parse_args(self, argv, real=Parser.parse_args):
        real(self, argv)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse_args)
    tool, *words = command.partition("#")[0].split()
    module = importlib.import_module(tool.removesuffix(".py").replace("/", "."))
    if module is lockstep:  # whose flags are those of the script
        assert lockstep.crowd_args(*lockstep.parse_args(words))
    else:
        with pytest.raises(Parsed):
            module.main(words)


def test_many_agents_are_quoted():
    assert any(tool.startswith("benchmark/lockstep.py --") for tool in TOOLS)


def test_the_python_snippets_use_what_there_is():
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    for snippet, function in zip(snippets, ("train", "load_agent"), strict=True):
        imported, assigned = ast.parse(snippet).body
        script = importlib.import_module(imported.module)
        assert all(hasattr(script, alias.name) for alias in imported.names)
        assert assigned.value.func.id == function
        (args,) = assigned.value.args
        flags = getattr(args, "keywords", ())
        script.check_args(script.Args(**{x.arg: ast.literal_eval(x.value) for x in flags}))


def reports() -> dict:
    """Committed report -> what writes it from the committed CSVs, into the folder it is given."""

    def speed_table(suite: str):
        def write(folder: Path) -> None:
            rows = sweep.read(folder / f"{suite}.csv")
            (folder / f"{suite}.md").write_text(speed.report(suite, rows))

        return write

    def module(tool):
        def write(folder: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tool, "RESULTS", folder)
                tool.main(["--report"])

        return write

    def of_preset(preset: str):
        def write(folder: Path) -> None:
            objectives = {row["objective"] for row in read_csv(folder / "runs.csv")}
            seeds = {row["seed"] for row in read_csv(folder / "runs.csv")}
            flags = ["--report", "--preset", preset, "--results", str(folder)]
            table1.main([*flags, "--objectives", *objectives, "--seeds", *seeds])

        return write

    def collapsed(folder: Path) -> None:
        collapse.main(["--report", "--task", folder.name, "--results", str(folder.parent)])

    found = {f"collapse/{task}/summary.md": collapsed for task in grids.TASKS}
    found |= {f"speed/{suite}.md": speed_table(suite) for suite in speed.SUITES}
    for tool in (classic, grpo, atari, ratchet):
        found[f"{tool.__name__.rpartition('.')[2]}/summary.md"] = module(tool)
    found |= {
        "table1/summary.md": of_preset("paper"),
        "table1-bootstrapped/summary.md": of_preset("paper"),
        "table1-modern/summary.md": of_preset("modern"),
    }
    return {path: write for path, write in found.items() if (RESULTS / path).exists()}


@pytest.mark.parametrize("path", reports())
def test_every_report_is_what_its_csvs_say(path, tmp_path):
    folder = tmp_path / Path(path).parent.name
    shutil.copytree((RESULTS / path).parent, folder)
    committed = (folder / Path(path).name).read_text()
    reports()[path](folder)
    assert (folder / Path(path).name).read_text() == committed


@pytest.mark.parametrize("anchor", sorted(set(re.findall(r"\]\(#([^)]+)\)", README))))
def test_every_linked_section_exists(anchor):
    titles = re.findall(r"^#+ (.*)", README, re.M)
    # as GitHub names them
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert anchor in headings or f'<a id="{anchor}">' in README


TARGETS = sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", README)))


@pytest.mark.parametrize("target", TARGETS)
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


LIMITS = {"ppo_cartpole": 540, "ppo_continuous": 645, "ppo_atari": 700}


@pytest.mark.parametrize("script", LIMITS)
def test_what_people_read_fits_in_one_sitting(script):
    """The algorithm: before it are the flags, after it their checks and what is around the run."""
    lines = (ROOT / f"{script}.py").read_text().rstrip().splitlines()
    first = next(i for i, line in enumerate(lines) if line.endswith(" ENVIRONMENTS"))
    last = next(i for i, line in enumerate(lines) if line.endswith(" FLAGS"))
    read = "\n".join(lines[first:last]).rstrip().splitlines()
    assert len(read) <= LIMITS[script]
