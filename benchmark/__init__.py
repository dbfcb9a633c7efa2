"""What the files of this folder share: errors in one line, tables, the name of the machine."""

import argparse
import csv
import json
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


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows with the same keys, at least one, under a header. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def merge_runs(
    folder: Path, read: list[tuple[dict, list[dict]]], column: str, order: list[str]
) -> None:
    """Put runs into runs.csv, a row each, and curves.csv, its points.

    They replace those that agree with one of them in `column`; others stay. Sorted by the place of
    that column's cell in `order`, otherwise as they were.
    """
    mine = {row[column] for row, _ in read}
    points = [point for _, curve in read for point in curve]
    for path, fresh in (
        (folder / "runs.csv", [row for row, _ in read]),
        (folder / "curves.csv", points),
    ):
        kept = [row for row in (read_csv(path) if path.exists() else []) if row[column] not in mine]
        write_csv(path, sorted(kept + fresh, key=lambda row: order.index(row[column])))


def check_config(folder: Path, wanted: dict) -> dict:
    """The config.json of a run's folder.

    Raises UserError where there is none, or where its flags are not the wanted ones: then a report
    would state flags that never ran.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        made = config["args"]
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise UserError(f"{folder} has no config.json that can be read: {reason!r}") from reason
    for name, value in json.loads(json.dumps(wanted)).items():
        if made.get(name, value) != value:
            what = f"{name} {made[name]} instead of {value}"
            raise UserError(f"{folder} ran with {what}; remove the folder, or give another")
    return config


def markdown(rows: list[dict]) -> str:
    """Rows with the same keys, at least one, as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


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
