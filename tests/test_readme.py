"""What the documents say is true: README.md, benchmark/README.md and docs/.

Commands parse, snippets run, links and anchors resolve, tables are the committed ones, details
stand in the named lines, and what each script says that it needs is what it imports.
"""

import ast
import importlib
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

import grpo_toy
from benchmark import (
    Parser,
    UserError,
    atari,
    classic,
    collapse,
    defaults,
    figure3,
    grids,
    grpo,
    humanoid,
    lockstep,
    number,
    ratchet,
    read_csv,
    readme,
    recurrent,
    speed,
    sweep,
    table1,
)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark/results"
DOCS = {name: (ROOT / name).read_text() for name in readme.documents()}
README = DOCS["README.md"]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", text, re.S)


COMMANDS = []
for text in DOCS.values():
    lines = "\n".join(blocks(text, "bash", "sh")).splitlines()
    COMMANDS += [line.partition("#")[0].strip() for line in lines]
COMMANDS = sorted({command for command in COMMANDS if command})
# copies of a script that a command makes: tests/test_examples.py makes and runs them
COPIES = {word for line in COMMANDS for word in re.findall(r"^patch -o (\S+)", line)}


def test_there_is_something_to_check():
    assert "ppo_cartpole" in SCRIPTS and len(COMMANDS) > 8
    assert {"README.md", "benchmark/README.md", "docs/details.md"} < set(DOCS)


def test_the_front_page_is_short():
    assert len(README.split()) <= 1500


RUN = [command for command in COMMANDS if ".py" in command and not command.startswith("patch ")]


@pytest.mark.parametrize("command", RUN)
def test_every_quoted_command_of_a_script_parses(command):
    for part in command.split("&&"):
        words = shlex.split(part)
        for at, word in enumerate(words):
            if word.endswith(".py") and word not in COPIES:
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


QUOTED = [*COMMANDS]
for text in DOCS.values():
    QUOTED += re.findall(r"`([^`\n]*)`", text) + re.findall(r"^    (.*)", text, re.M)
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


OTHERS = {"--index-url", "--with", "--nproc-per-node", "--name", "--help"}  # not ours


def test_every_flag_that_a_document_names_exists():
    flags = set(OTHERS)
    baselines = [f"benchmark.baselines.{name}" for name in ("trpo", "vpg", "a2c", "cem")]
    for script in [*SCRIPTS, *baselines]:
        for field in importlib.import_module(script).Args.__dataclass_fields__:
            flag = field.replace("_", "-")
            flags |= {f"--{flag}", f"--no-{flag}"}
    for path in ROOT.glob("benchmark/*.py"):
        flags |= set(re.findall(r'"(--[\w-]+)"', path.read_text()))
    for name, text in DOCS.items():
        for quoted in re.findall(r"`([^`\n]+)`", text):
            for flag in re.findall(r"(?<!\S)--[a-z][\w-]*\w(?![\w-])", quoted):
                assert flag in flags, f"{name}: {flag}"


def test_many_agents_are_quoted():
    assert any(tool.startswith("benchmark/lockstep.py --") for tool in TOOLS)


SNIPPETS = {name: blocks(text, "python") for name, text in DOCS.items()}


@pytest.mark.parametrize("name", [name for name, found in SNIPPETS.items() if found])
def test_the_python_snippets_run(name, tmp_path, monkeypatch):
    """One after the other; RUN_DIR is the run of the one before."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in SNIPPETS[name]:
        runs = sorted(str(path) for path in tmp_path.glob("runs/*"))
        assert runs or "RUN_DIR" not in snippet
        exec(snippet.replace("RUN_DIR", runs[0] if runs else ""), names)
    assert any("train(" in snippet for snippet in SNIPPETS[name])
    assert names["summary"]["total_timesteps"] >= 10_000


def test_snippets_are_in_the_front_page_and_in_the_flags():
    assert SNIPPETS["README.md"] and SNIPPETS["docs/flags.md"]


def pins(text: str) -> dict[str, str]:
    """The lines name[extra]==version of a requirements file: name -> extra and version."""
    found = re.findall(r"^([\w-]+)(\[[\w,-]+\])?==([\w.]+)", text, re.M)
    return {name: (set(extra.strip("[]").split(",")), version) for name, extra, version in found}


REQUIREMENTS = {}
for path in sorted(ROOT.glob("requirements*.txt")):
    REQUIREMENTS |= pins(path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_at_its_head_what_it_needs_and_no_more(script):
    """The block is as PEP 723 has it; its pins are those of requirements.txt."""
    text = (ROOT / f"{script}.py").read_text()
    (block,) = re.findall(r"(?m)^# /// script$\s((?:^#(?:| .*)$\s)+?)^# ///$", text)
    head = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    assert head["requires-python"] == ">=3.11,<3.14"

    needed = pins("\n".join(head["dependencies"]))
    assert len(needed) == len(head["dependencies"])
    of_all = pins((ROOT / "requirements.txt").read_text())
    for name, (extras, version) in needed.items():
        assert version == of_all[name][1] and extras <= of_all[name][0] | {""}

    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    imported -= sys.stdlib_module_names
    if "capture_video: bool" in text:
        imported.add("moviepy")  # Gymnasium imports it where that films
    assert set(needed) == imported


def test_the_requirements_are_those_of_the_scripts_together():
    of_all = pins((ROOT / "requirements.txt").read_text())
    of_scripts = {}
    for script in SCRIPTS:
        block = (ROOT / f"{script}.py").read_text().partition("# /// script")[2]
        found = pins("\n".join(re.findall(r'^#     "(.*)",', block, re.M)))
        for name, (extras, version) in found.items():
            of_scripts.setdefault(name, (set(), version))[0].update(extras - {""})
    assert of_scripts == {name: (extras - {""}, v) for name, (extras, v) in of_all.items()}


def test_the_documents_pin_what_the_requirements_pin():
    found = re.findall(r"([\w-]+)==([\w.]+)", "\n".join(COMMANDS))
    assert {"torch", "box2d"} <= {name for name, _ in found}
    for name, version in found:
        assert version == REQUIREMENTS[name][1]


def test_the_front_page_and_ci_install_alike():
    """Each step of the README's test command is one of .ci/run, which installs more, quietly."""
    ci = (ROOT / ".ci/run").read_text().splitlines()
    (command,) = [c for c in COMMANDS if c.endswith("-m pytest")]
    lines = [line.replace("--quiet ", "") for line in ci]
    for step in command.split(" && "):
        assert any(line.startswith(step) for line in lines), step


def test_the_citation_has_the_name_of_the_front_page():
    name = README.splitlines()[0].removeprefix("# ")
    (bibtex,) = blocks(README, "bibtex")
    assert f"title: {name}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"title = {{{name}}}" in bibtex.replace("{PPO}", "PPO").replace("{GRPO}", "GRPO")


def test_the_front_page_names_the_versions_that_the_scripts_ask_for():
    assert "Python 3.11, 3.12 or 3.13" in README
    assert "Python 3.11 to 3.13" in (ROOT / "requirements.txt").read_text()


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

    def of_folder(tool):
        return lambda folder: tool.main(["--report", "--results", str(folder)])

    def of_preset(preset: str, *more: str):
        def write(folder: Path) -> None:
            objectives = {row["objective"] for row in read_csv(folder / "runs.csv")}
            seeds = {row["seed"] for row in read_csv(folder / "runs.csv")}
            tasks = {row["env_id"] for row in read_csv(folder / "runs.csv")}
            flags = ["--report", "--preset", preset, "--results", str(folder), "--tasks", *tasks]
            table1.main([*flags, "--objectives", *objectives, "--seeds", *seeds, "--", *more])

        return write

    def collapsed(folder: Path) -> None:
        collapse.main(["--report", "--task", folder.name, "--results", str(folder.parent)])

    found = {f"collapse/{task}/summary.md": collapsed for task in grids.TASKS}
    found |= {f"speed/{suite}.md": speed_table(suite) for suite in speed.SUITES}
    for tool in (defaults, figure3):
        found[f"{tool.__name__.rpartition('.')[2]}/summary.md"] = of_folder(tool)
    for tool in (classic, grpo, atari, ratchet, humanoid, recurrent):
        found[f"{tool.__name__.rpartition('.')[2]}/summary.md"] = module(tool)
    found |= {
        "table1/summary.md": of_preset("paper"),
        "table1-bootstrapped/summary.md": of_preset("paper", "--bootstrap-truncated"),
        "time-limits/summary.md": of_preset("paper", "--bootstrap-truncated"),
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


def anchors(text: str) -> set[str]:
    """Where links into a document can point: its headings, as GitHub names them, and its ids."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)", text, re.M)
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    return headings | set(re.findall(r'<a id="([^"]+)">', text))


LINKS = []
for name, text in DOCS.items():
    targets = set(re.findall(r"\]\((?!https?:)([^)]+)\)", text))
    LINKS += [(name, target) for target in sorted(targets)]


@pytest.mark.parametrize("name, target", LINKS)
def test_every_link_leads_somewhere(name, target):
    path, _, anchor = target.partition("#")
    file = (ROOT / name).parent / path if path else ROOT / name
    assert file.exists()
    if anchor and file.suffix == ".md":
        assert anchor in anchors(file.read_text())
    elif anchor:
        assert 1 <= int(anchor.removeprefix("L")) <= len(file.read_text().splitlines())


@pytest.mark.parametrize("name", DOCS)
def test_what_is_generated_is_up_to_date(name):
    assert readme.renew(name, DOCS[name]) == DOCS[name], "run python benchmark/readme.py"


def test_no_document_lacks_its_blocks_and_none_has_unknown_ones():
    for name, text in DOCS.items():
        begun = re.findall(r"<!-- begin ([\w-]+) -->", text)
        assert sorted(begun) == sorted(readme.BLOCKS.get(name, {}))


NUMBER = re.compile(r"(?<![\w.,-])-?\d{1,3}(?:,\d{3})*(?:\.\d+)?(?![\w,.]*\d)")
CHAPTERS = DOCS["benchmark/README.md"]
TABLE1 = re.search(r"^## The paper's Table 1$(.*?)^### With today", CHAPTERS, re.S | re.M)[1]
FIGURE3 = re.search(r"<!-- end figure3 -->(.*?)^#", CHAPTERS, re.S | re.M)[1]
SENTENCES = {  # sentences with numbers in them -> the results that they tell of
    "Table 1": (TABLE1, ["table1", "table1-bootstrapped", "time-limits"]),
    "Figure 3": (FIGURE3, ["figure3"]),
    "the double pendulum": (
        DOCS["docs/double-pendulum.md"],
        ["collapse/InvertedDoublePendulum-v4", "table1", "time-limits", "defaults", "figure3"],
    ),
    "HalfCheetah": (
        DOCS["docs/halfcheetah.md"],
        ["collapse/HalfCheetah-v4", "table1", "time-limits"],
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_the_numbers_of_the_sentences_stand_in_the_results(name):
    """Those of three digits or more, zeros at the end not counted: round ones are thresholds."""
    text, folders = SENTENCES[name]
    known = set()
    for folder in folders:
        if (RESULTS / folder / "summary.md").exists():
            known |= set(NUMBER.findall((RESULTS / folder / "summary.md").read_text()))
        if (RESULTS / folder / "runs.csv").exists():
            runs = read_csv(RESULTS / folder / "runs.csv")
            known |= {number(float(run["last_100_return"])) for run in runs}
    text = re.sub(r"<!-- begin .*?<!-- end|```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S)
    numbers = [x for x in NUMBER.findall(text) if len(re.sub(r"\D", "", x).strip("0")) >= 3]
    assert len(numbers) >= 3
    assert [x for x in numbers if x not in known] == []


def test_the_core_details_stand_where_the_table_says():
    text = DOCS["docs/details.md"]
    rows = re.findall(r"^\| (\d+) \| (.*\[\d+\]\(\.\./\w+\.py#L\d+\).*) \|$", text, re.M)
    for n, row in rows:
        links = re.findall(r"\[(\d+)\]\(\.\./(\w+\.py)#L\1\)", row)
        assert [script for _, script in links] == list(readme.SCRIPTS)
        for line, script in links:
            assert f"[detail {n}]" in (ROOT / script).read_text().splitlines()[int(line) - 1]
    assert [int(n) for n, _ in rows] == list(range(1, 14))


def test_all_37_details_are_there():
    text = DOCS["docs/details.md"].partition("## 14 to 22")[2]
    numbers = [int(n) for n in re.findall(r"^\| (\d+) \|", text, re.M)]
    assert numbers == list(range(14, 38))


@pytest.mark.parametrize("name", DOCS)
def test_code_that_a_link_quotes_stands_in_its_line(name):
    links = re.findall(r"\[`([^`\n]+)`\]\((?:\.\./)*(\w+\.py)#L(\d+)\)", DOCS[name])
    assert links or name != "docs/details.md"
    for code, script, line in links:
        assert code in (ROOT / script).read_text().splitlines()[int(line) - 1]


def test_code_that_stands_nowhere_or_twice_is_an_error():
    for code in ("def nowhere", "import"):
        with pytest.raises(UserError, match="not in one"):
            readme.renew("docs/x.md", f"[`{code}`](../ppo_cartpole.py#L1)")


def test_a_result_has_its_chapter_once_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.chapter("new") == ""
    (tmp_path / "new").mkdir()
    sections = "## First\n\n[runs](runs.csv) [more](../old/runs.csv)\n\n## Second\n\nmore\n"
    (tmp_path / "new/summary.md").write_text(f"# A new result\n\n{sections}")
    text = readme.chapter("new")
    assert text.startswith('<a id="new"></a>\n\n### A new result\n\n#### First\n')
    assert "[runs](results/new/runs.csv) [more](results/old/runs.csv)" in text
    assert "Second" not in text
    assert text.endswith("[summary.md](results/new/summary.md).")


LIMITS = {"ppo_cartpole": 540, "ppo_continuous": 645, "ppo_atari": 700}


@pytest.mark.parametrize("script", LIMITS)
def test_what_people_read_fits_in_one_sitting(script):
    """The algorithm: before it are the flags, after it their checks and what is around the run."""
    lines = (ROOT / f"{script}.py").read_text().rstrip().splitlines()
    first = next(i for i, line in enumerate(lines) if line.endswith(" ENVIRONMENTS"))
    last = next(i for i, line in enumerate(lines) if line.endswith(" FLAGS"))
    read = "\n".join(lines[first:last]).rstrip().splitlines()
    assert len(read) <= LIMITS[script]
