"""What the files of this folder share: errors in one line, tables, the name of the machine."""

import argparse
import csv
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: cli() prints it as one line and exits with code 2."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors and whose --help states the defaults."""

    def __init__(self, doc: str):
        super().__init__(
            description=doc,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise UserError(message)


def positive(text: str) -> int:
    """The type of a flag that counts something."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def cli(main: Callable[[list[str]], None]) -> None:
    """Run main(flags) and exit.

    0: done. 2: bad input, or a file that cannot be read or written. 130: interrupted.
    """
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as reason:
        print("error: " + " ".join(str(reason).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV with a header, cells as text. Raises OSError."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows) -> str:
    """Rows, a list of dicts or a DataFrame, as a Markdown table.

    Not padded: where one cell gets longer, one line of the file changes.
    """
    import pandas as pd  # here: lockstep.py, which this package holds too, goes without it
    from tabulate import DataRow, TableFormat

    row = DataRow("| ", " | ", " |")
    plain = TableFormat(
        lineabove=None,
        linebelowheader=lambda widths, _: f"| {' | '.join(['---'] * len(widths))} |",
        linebetweenrows=None,
        linebelow=None,
        headerrow=row,
        datarow=row,
        padding=0,
        with_header_hide=None,
    )
    as_it_is = {"disable_numparse": True, "stralign": None, "numalign": None}
    return pd.DataFrame(rows).to_markdown(index=False, tablefmt=plain, **as_it_is) + "\n"


def number(x: float) -> str:
    """A return, as tables show it."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}"


def two_figures(x: float) -> str:
    """A KL, as tables show it: two significant digits, above 100 whole numbers."""
    return f"{x:.2g}" if abs(x) < 99.5 else f"{x:,.0f}"


def git_commit() -> str:
    """Of this repository, with -dirty where a .py has changes; empty where there is no git."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "status"]
    git += ["--porcelain=v2", "--branch", "--untracked-files=no", "--", "*.py"]
    try:
        said = subprocess.run(git, capture_output=True, text=True).stdout
    except OSError:  # not even the program
        said = ""
    commit = re.search(r"^# branch.oid ([0-9a-f]{40,})$", said, re.M)
    return commit[1] + "-dirty" * bool(re.search("^[^#]", said, re.M)) if commit else ""


def machine() -> dict:
    """{"cpu": its model, "cores": how many}"""
    path = Path("/proc/cpuinfo")  # Linux alone has it
    model = re.search(r"model name\s*:\s*(.*)", path.read_text()) if path.exists() else None
    cpu = model[1] if model else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count()}
