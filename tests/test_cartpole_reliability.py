"""What ppo_cartpole.py promises about its runs.

The same bits after any interruption; refusal of any damaged file; a stop at the first number that
is not finite; the files that a run leaves; the policy that is loaded from them.
"""

import csv
import hashlib
import io
import json
import math
import os
import pickle
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import LIMIT, SCRIPT, TINY, Poison, environment
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo_cartpole as ppo

# Three runs of 80 updates, different in all that a checkpoint has to carry.
SMALL = "--num-envs 4 --num-steps 16 --num-minibatches 2 --update-epochs 2"
SMALL += " --total-timesteps 5120 --eval-episodes 2"
RUNS = {
    "clip": f"{SMALL} --checkpoint-every 7",
    "adaptive": f"{SMALL} --checkpoint-every 1 --objective adaptive:0.01 --seed 5",
    "pg": f"{SMALL} --checkpoint-every 25 --objective pg --env-id conftest:Lever-v0 --no-anneal-lr",
}
RUNS["adaptive"] += " --value-clip 0.2 --target-kl 0.5"
RUNS["pg"] += " --update-epochs 1 --num-minibatches 1 --norm-adv batch --no-bootstrap-truncated"
METRICS = ["update", "global_step", "seed", "objective"]
METRICS += ["charts/episodic_return", "charts/episodic_length", "charts/SPS"]
METRICS += ["charts/learning_rate", "charts/beta"]
METRICS += ["losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/kl"]
METRICS += ["losses/approx_kl", "losses/old_approx_kl", "losses/clipfrac", "losses/grad_norm"]
METRICS += ["losses/kl_after_update", "losses/explained_variance"]
SUMMARY = ["env_id", "seed", "objective", "total_timesteps", "transitions", "wall_seconds", "sps"]
SUMMARY += ["last_100_return", "eval_return_mean", "eval_return_std", "eval_episodes"]
SUMMARY += ["diverged_at"]
CLOCKS = ("wall_seconds", "sps")
PARTS = ("agent", "optimizer", "action_rng", "minibatch_rng", "state", "recent")


def plain(x):
    """Tensors as bytes, all the way down, so that == compares bits."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), x.numpy().tobytes()
    if isinstance(x, dict):
        return {name: plain(value) for name, value in x.items()}
    return [plain(value) for value in x] if isinstance(x, list | tuple) else x


def rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def bits(run: Path) -> dict:
    """All that must come out the same: everything a run leaves, but for its clocks."""
    saved = ppo.load_checkpoint(run / "checkpoint.pt")
    metrics = rows(run / "metrics.csv")
    (summary,) = json.loads((run / "summary.json").read_text())
    for row in metrics:
        del row["charts/SPS"]
    for name in CLOCKS:
        del summary[name]
    return {
        "metrics": metrics,
        "episodes": (run / "episodes.csv").read_bytes(),
        "checkpoint": {name: plain(saved[name]) for name in PARTS},
        "summary": summary,
    }


def same_bits(run: Path, reference: Path) -> None:
    ours, theirs = bits(run), bits(reference)
    for name in ours:
        assert ours[name] == theirs[name], name


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Folder of the run of this name that nothing interrupted, made by a process of its own."""

    @cache
    def make(name: str) -> Path:
        path = tmp_path_factory.mktemp("reference") / name
        command = [sys.executable, SCRIPT, *RUNS[name].split(), "--run-dir", path]
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=LIMIT
        )
        assert done.returncode == 0, done.stderr
        return path

    return make


@pytest.fixture
def launch(tmp_path):
    """Starts the script, or another program of Python. What still runs, dies with the test."""
    started = []

    def start(*argv, program=(str(SCRIPT),)) -> subprocess.Popen:
        started.append(
            subprocess.Popen(
                [sys.executable, *program, *map(str, argv)],
                cwd=tmp_path,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                # a shell that runs pytest in the background has it, and its children, ignore Ctrl-C
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for_row(process: subprocess.Popen, path: Path, count: int) -> None:
    """Until metrics.csv has `count` rows, its header aside, or the process has ended."""
    deadline = time.monotonic() + LIMIT
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > count):
        assert time.monotonic() < deadline, f"no row {count} in {path}"
        time.sleep(0.001)


# --------------------------------------------------------------------------------- the same bits
def test_a_seed_is_the_whole_run_and_another_seed_another_run(reference, main, process, tmp_path):
    assert process(*RUNS["clip"].split(), "--run-dir", "again").code == 0
    same_bits(tmp_path / "again", reference("clip"))
    assert main(*RUNS["clip"].split(), "--seed", 2, "--run-dir", "other").code == 0
    ours, theirs = bits(tmp_path / "other"), bits(reference("clip"))
    assert all(ours[name] != theirs[name] for name in ("metrics", "episodes", "checkpoint"))
    for one, another in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert one["losses/policy_loss"] != another["losses/policy_loss"]  # from the first on


@pytest.mark.parametrize("name", RUNS)
def test_sigkill_at_random_moments_changes_no_bit(name, reference, launch, tmp_path):
    run, rng = tmp_path / "run", random.Random(f"kill {name}")
    command = [*RUNS[name].split(), "--run-dir", run]
    row, kills = 0, []
    for _ in range(2):  # the second one strikes a run that was resumed
        row += rng.randint(1, 24)  # how far on
        pause = rng.uniform(0, 0.02)  # when within an update
        process = launch(*command)
        wait_for_row(process, run / "metrics.csv", row)
        time.sleep(pause)
        process.kill()
        process.communicate()
        kills.append((row, round(pause, 4), process.returncode))
        row = (run / "metrics.csv").read_bytes().count(b"\n")
        command = ["--resume", run]
    print(f"{name}: killed at (row, seconds later, exit code) {kills}")  # shown where it fails
    assert [code for *_, code in kills] == [-signal.SIGKILL] * 2
    assert not (run / "summary.json").exists()
    process = launch("--resume", run)
    assert process.wait(LIMIT) == 0, process.stderr.read()
    same_bits(run, reference(name))


SABOTEUR = """
import os, signal, sys
import ppo_cartpole

moment, name, countdown = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv[1:4] = []
replace = os.replace


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_write(path, *how, **named):
    global countdown
    file = open(path, *how, **named)
    if os.path.basename(path).startswith(name) and "w" in how[0]:
        countdown -= 1
        if countdown == 0 and moment == "half":
            write = file.write
            file.write = lambda data: (write(data[: len(data) // 2]), file.flush(), die())
    return file


def watched_replace(source, target):
    if os.path.basename(target) == name and countdown == 0:
        if moment == "after":
            replace(source, target)
        die()
    replace(source, target)


ppo_cartpole.open, os.replace = half_a_write, watched_replace
ppo_cartpole.main()
"""


def test_sigkill_while_a_file_is_being_written_changes_no_bit(reference, launch, main, tmp_path):
    """Within the write, before the rename, right after it; then before summary.json is there."""
    run, sizes = tmp_path / "run", []
    command = [*RUNS["adaptive"].split(), "--run-dir", run]
    # moment, file, its how-manieth writing by this process; updates in the checkpoint that is there
    for moment, name, which, updates in (
        ("half", "checkpoint.pt", 4, 3),
        ("before", "checkpoint.pt", 4, 6),
        ("after", "checkpoint.pt", 4, 10),
        ("before", "summary.json", 1, 80),
    ):
        process = launch(moment, name, which, *command, program=("-c", SABOTEUR))
        assert process.wait(LIMIT) == -signal.SIGKILL, process.stderr.read()
        state = ppo.load_checkpoint(run / "checkpoint.pt")["state"]
        assert state["updates"] == updates
        assert state["beta"] != 1.0  # where an adaptive beta starts
        left = run / f"{name}.tmp"
        size = left.stat().st_size if left.exists() else 0
        sizes.append(size / (run / "checkpoint.pt").stat().st_size)
        command = ["--resume", run]
    # half a file, a whole one, none, a small one
    assert sizes == pytest.approx([0.5, 1.0, 0.0, 0.0], abs=0.05)
    assert not (run / "summary.json").exists()
    names = ("checkpoint.pt", "metrics.csv", "episodes.csv")
    before = {name: (run / name).read_bytes() for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "collect", None)  # only the evaluation is left to do
        assert main("--resume", run).code == 0
    assert before == {name: (run / name).read_bytes() for name in before}
    same_bits(run, reference("adaptive"))


def stop_in_update(monkeypatch, number: int) -> None:
    """Ctrl-C in the middle of the `number`-th update from here."""
    real, calls = ppo.update, []

    def update(**given):
        calls.append(0)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(**given)

    monkeypatch.setattr(ppo, "update", update)


def test_ctrl_c_says_one_line_exits_130_and_can_be_resumed(
    reference, launch, main, monkeypatch, tmp_path
):
    process = launch(*RUNS["clip"].split(), "--run-dir", "run")
    wait_for_row(process, tmp_path / "run" / "metrics.csv", 30)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT)
    note, line = err.splitlines()
    assert process.returncode == 130
    assert note.startswith("note: --checkpoint-every") and "--resume" in line
    with monkeypatch.context() as patch:
        stop_in_update(patch, 1)  # long enough to see that the CSVs are cut back to the checkpoint
        assert main("--resume", "run").code == 130
    last = rows(tmp_path / "run" / "metrics.csv")[-1]
    saved = ppo.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert int(last["update"]) == saved["state"]["updates"] >= 28
    finished_by = [int(row["global_step"]) for row in rows(tmp_path / "run" / "episodes.csv")]
    assert 0 < finished_by[-1] <= int(last["global_step"])
    assert main("--resume", "run").code == 0
    same_bits(tmp_path / "run", reference("clip"))


@pytest.mark.parametrize("stops", [[20], [1, 1], [5, 29]])
def test_without_a_checkpoint_a_run_starts_over_in_its_folder(
    stops, reference, main, monkeypatch, tmp_path
):
    """The "pg" run writes its first checkpoint after 25 updates."""
    command = [*RUNS["pg"].split(), "--run-dir", "run"]
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_in_update(patch, stop)
            assert main(*command).code == 130
        lines = (tmp_path / "run" / "metrics.csv").read_bytes().count(b"\n")
        assert lines == (stop if stop > 1 else 0)  # a header, and a row for each update before
        assert (tmp_path / "run" / "checkpoint.pt").exists() == (stop > 25)
        command = ["--resume", "run"]
    assert main(*command).code == 0
    same_bits(tmp_path / "run", reference("pg"))


def test_a_csv_shorter_than_its_checkpoint_says_is_refused(main, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        stop_in_update(patch, 10)
        assert main(*RUNS["clip"].split(), "--run-dir", "run").code == 130
    path = tmp_path / "run" / "metrics.csv"
    path.write_bytes(path.read_bytes()[:200])
    code, _, err = main("--resume", "run")
    assert code == 2 and err[-1].startswith("error: ") and "metrics.csv" in err[-1]
    assert path.stat().st_size == 200


# --------------------------------------------------------------------------- damaged and hostile
@pytest.fixture(scope="module")
def good(finished) -> bytes:
    return (finished / "checkpoint.pt").read_bytes()


def flip(good: bytes, bit: int) -> bytes:
    return good[: bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1 :]


DAMAGES = {
    "truncated": lambda good, draw: good[: draw(st.integers(0, len(good) - 1))],
    "flipped": lambda good, draw: flip(good, draw(st.integers(0, 8 * len(good) - 1))),
    "appended": lambda good, draw: good + draw(st.binary(min_size=1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_to_a_checkpoint_goes_unseen(damage, good, tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(good)
    assert ppo.load_checkpoint(path)["state"]["updates"] == 4

    @settings(deadline=None, max_examples=150, database=None)
    @given(st.data())
    def check(data):
        path.write_bytes(DAMAGES[damage](good, data.draw))
        with pytest.raises(ppo.UserError, match=r"checkpoint\.pt is truncated or damaged"):
            ppo.load_checkpoint(path)

    check()


class Hostile:
    """Unpickled, it makes the folder `canary`."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def torch_bytes(x) -> bytes:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getvalue()


def signed(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()


def test_the_hostile_pickles_of_the_next_test_are_live(tmp_path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "0")))
    torch.load(io.BytesIO(torch_bytes([Hostile(tmp_path / "1")])), weights_only=False)
    assert (tmp_path / "0").is_dir() and (tmp_path / "1").is_dir()


# What stands in a checkpoint's place, made of its bytes, of what it holds and of a folder that a
# hostile one would make; and what is said of it.
DAMAGED = "is truncated or damaged"
FOREIGN = "is not a checkpoint of this repository"
ATTACKS = {
    "empty": (lambda good, saved, canary: b"", DAMAGED),
    "half": (lambda good, saved, canary: good[: len(good) // 2], DAMAGED),
    "bit flipped": (lambda good, saved, canary: flip(good, 4 * len(good)), DAMAGED),
    "unsigned": (lambda good, saved, canary: good[:-32], DAMAGED),
    "pickle": (lambda good, saved, canary: pickle.dumps(Hostile(canary), 2), DAMAGED),
    "pickle, signed": (
        lambda good, saved, canary: signed(pickle.dumps(Hostile(canary), 2)),
        FOREIGN,
    ),
    "zip": (
        lambda good, saved, canary: torch_bytes(saved | {"script": Hostile(canary)}),
        DAMAGED,
    ),
    "zip, signed": (
        lambda good, saved, canary: signed(torch_bytes([saved, Hostile(canary)])),
        FOREIGN,
    ),
    "not a dict": (lambda good, saved, canary: signed(torch_bytes([1, 2])), FOREIGN),
    "incomplete": (
        lambda good, saved, canary: signed(torch_bytes({"script": "ppo_cartpole"})),
        FOREIGN,
    ),
    "another script's": (
        lambda good, saved, canary: signed(torch_bytes(saved | {"script": "ppo_atari"})),
        "was written by ppo_atari.py, not by ppo_cartpole.py",
    ),
}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_checkpoint_that_is_none_is_refused_by_name_and_never_run(
    attack, flag, finished, good, main, tmp_path
):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    change, fragment = ATTACKS[attack]
    bad = change(good, ppo.load_checkpoint(finished / "checkpoint.pt"), tmp_path / "canary")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(bad)
    files = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    code, out, err = main(flag, "run")
    assert code == 2 and out == [] and len(err) == 1
    assert err[0].startswith("error: ") and f"checkpoint.pt {fragment}" in err[0]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # no canary
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_run_of_an_older_version_is_refused(flag, finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    saved = ppo.load_checkpoint(finished / "checkpoint.pt")
    ppo.save_checkpoint(tmp_path / "run" / "checkpoint.pt", saved | {"state": {"update": 4}})
    code, _, (line,) = main(flag, "run")
    assert code == 2 and line == "error: run was made by another version of ppo_cartpole.py"


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_config_edited_after_the_checkpoint_is_refused(flag, finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["args"]["learning_rate"] *= 2
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    code, _, (line,) = main(flag, "run")
    assert code == 2 and "config.json has changed since the checkpoint; undo" in line


# ------------------------------------------------------------------------- numbers that are none
@pytest.fixture
def checkpoints(monkeypatch) -> list[bytes]:
    """Every checkpoint that this process writes, as it was written."""
    real, written = ppo.write_file, []

    def write_file(path, data):
        real(path, data)
        if path.name == "checkpoint.pt":
            written.append(data)

    monkeypatch.setattr(ppo, "write_file", write_file)
    return written


def test_clocks_go_on_where_a_run_was_stopped(monkeypatch, tmp_path):
    clock = iter([0.0, 10.0, 14.0, 100.0, 106.0])
    fake = SimpleNamespace(perf_counter=lambda: next(clock), strftime=time.strftime)
    monkeypatch.setattr(ppo, "time", fake)
    args = ppo.Args(run_dir=str(tmp_path / "run"), num_envs=2, num_steps=32)
    task, who, losses = {"env_id": "E"}, {"seed": 1, "objective": "pg"}, {"kl_after_update": 0.0}
    run = ppo.Run(args, task, who, None)
    run.log(1, [], {}, losses)
    run.log(2, [], {}, losses)
    saved = run.checkpoint({"updates": 2, "transitions": 0, "diverged_at": None}, {})
    run.close()
    again = ppo.Run(replace(args, resume=args.run_dir), task, who, saved)
    assert again.sps == 16.0
    again.log(3, [], {}, losses)
    summary = again.finish(saved["state"] | {"updates": 3}, [1.0, 5.0])
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        speeds = [float(row["charts/SPS"]) for row in csv.DictReader(file)]
    assert speeds == pytest.approx([64 / 10, 64 / 4, 64 / 6])
    assert (summary["wall_seconds"], summary["eval_return_std"]) == (20.0, 2.0)


def stopped_well(run: Path, outcome, source: str, update: int, checkpoints: list[bytes]) -> None:
    """Exit code 3, one line that names both, the last good checkpoint as it was written.

    And no summary.json.
    """
    assert outcome.code == 3 and outcome.out == []
    assert [line.split(":")[0] for line in outcome.err] == ["note", "error"]
    said = rf"error: (.*, update {update}: )?{source} not finite in update {update}(;|$)"
    from_outside = bool(re.match(said, outcome.err[1])[1])
    assert from_outside == (source in ("obs", "rewards"))
    assert not (run / "summary.json").exists()
    # one more where the environment is to blame: what was learned before is saved
    assert len(checkpoints) == (update - 1) // 2 + from_outside > 0
    assert (run / "checkpoint.pt").read_bytes() == checkpoints[-1]
    saved = ppo.load_checkpoint(run / "checkpoint.pt")
    assert saved["state"]["updates"] == 4 == update - 1
    assert all(weights.isfinite().all() for weights in saved["agent"].values())
    written = rows(run / "metrics.csv")
    assert len(written) == update - 1  # each in full, before the bad number came


# Four copies take 16 steps an update: the first of update 5 are 257 and 258, its last is 320.
@pytest.mark.filterwarnings("ignore:.*not within the observation space")  # Gymnasium's
@pytest.mark.parametrize(
    "env_id", ["Poison-obs-nan-v0", "Poison-obs-inf-v0", "Poison-rewards-nan-v0"]
)
def test_an_environment_that_emits_a_number_that_is_none_stops_the_run(
    env_id, main, checkpoints, tmp_path
):
    Poison.steps = 0
    flags = f"{SMALL} --checkpoint-every 2 --run-dir run --env-id conftest:{env_id}"
    outcome = main(*flags.split())
    stopped_well(tmp_path / "run", outcome, env_id.split("-")[1], 5, checkpoints)


def test_the_same_in_a_process_of_its_own(process, tmp_path):
    flags = f"{SMALL} --checkpoint-every 2 --run-dir run --env-id conftest:Poison-rewards-nan-v0"
    outcome = process(*flags.split())
    written = [(tmp_path / "run" / "checkpoint.pt").read_bytes()]
    stopped_well(tmp_path / "run", outcome, "rewards", 5, [b"", b"", *written])


@pytest.mark.parametrize("source", ["policy_loss", "grad_norm", "weights"])
def test_a_loss_a_gradient_or_a_weight_that_is_none_stops_the_run(
    source, main, checkpoints, monkeypatch, tmp_path
):
    real_update, real_gradient, updates = ppo.update, ppo.gradient, []

    def gradient(agent, minibatch, *rest):
        if len(updates) == 4 and source == "policy_loss":
            minibatch = minibatch | {"advantages": minibatch["advantages"] * math.nan}
        grad, metrics = real_gradient(agent, minibatch, *rest)
        if len(updates) == 4 and source == "grad_norm":
            metrics["grad_norm"] = torch.tensor(math.inf)
        return grad, metrics

    def update(agent, **rest):
        metrics = real_update(agent=agent, **rest)
        updates.append(0)
        if len(updates) == 5 and source == "weights":
            with torch.no_grad():
                agent.actor[0].bias[0] = math.nan
        return metrics

    monkeypatch.setattr(ppo, "gradient", gradient)
    monkeypatch.setattr(ppo, "update", update)
    outcome = main(*f"{SMALL} --checkpoint-every 2 --run-dir run".split())
    stopped_well(tmp_path / "run", outcome, source, 5, checkpoints)


# ----------------------------------------------------------------------------- what a run leaves
@pytest.mark.parametrize("objective", ["clip:0.2", "kl:1", "adaptive:0.01", "none", "pg"])
def test_everything_a_run_leaves(objective, main, monkeypatch, tmp_path):
    real, first = ppo.write_file, []

    def write_file(path, data):
        if not first:
            first.extend([path.name, *(other.name for other in path.parent.iterdir())])
        real(path, data)

    monkeypatch.setattr(ppo, "write_file", write_file)
    flags = {"objective": objective, "seed": 11, "num_envs": 2, "num_steps": 32}
    flags |= {"total_timesteps": 1000, "eval_episodes": 3, "gamma": 0.9, "max_grad_norm": math.inf}
    flags |= {"num_minibatches": 4}
    if objective == "pg":
        flags |= {"num_minibatches": 1, "update_epochs": 1}
    words = []
    for name, value in flags.items():
        words += [f"--{name}", value]
    code, (line,), err = main(*words)
    assert code == 0 and err == []
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"CartPole-v1__ppo_cartpole__11__\d{{8}}-\d{{6}}-{os.getpid()}", run.name)
    left = ["checkpoint.pt", "config.json", "episodes.csv", "metrics.csv", "summary.json"]
    assert sorted(path.name for path in run.iterdir()) == left
    assert first[0] == "config.json"  # first, once the two that are locked are there, empty
    assert set(first[1:]) == {"metrics.csv", "episodes.csv"}

    config = json.loads((run / "config.json").read_text())
    assert config["script"] == "ppo_cartpole"
    assert config["args"] == asdict(ppo.Args(**flags)) | {"checkpoint_every": 50 * 500 // 32 + 1}
    versions = {name: version(name) for name in ("torch", "numpy", "gymnasium", "tyro")}
    assert config["versions"].items() >= (versions | {"python": platform.python_version()}).items()
    assert re.match(r"\d{4}-\d\d-\d\dT", config["started"])
    assert list(config) == ["script", "args", "versions", "started"]

    metrics, updates = rows(run / "metrics.csv"), 16  # 1000 steps in whole updates of 64
    assert list(metrics[0]) == METRICS and len(metrics) == updates
    for i, row in enumerate(metrics, 1):
        assert [row["update"], row["global_step"]] == [str(i), str(64 * i)]
        assert [row["seed"], row["objective"]] == ["11", objective]
        for name in METRICS[4:]:
            assert math.isfinite(float(row[name] or "0")), (i, name)
            assert row[name] != "" or name.startswith("charts/episodic")
    betas = {row["charts/beta"] for row in metrics}
    assert betas == {"0.0"} if objective in ("clip:0.2", "none", "pg") else "1.0" in betas
    assert (len(betas) > 1) == objective.startswith("adaptive")

    episodes = rows(run / "episodes.csv")
    assert list(episodes[0]) == ["global_step", "seed", "objective", "return", "length"]
    steps = [int(row["global_step"]) for row in episodes]
    assert steps == sorted(steps) and steps[0] >= 1 and steps[-1] <= 1024
    assert all(float(row["return"]) == int(row["length"]) for row in episodes)  # 1 a step
    lengths = [int(row["length"]) for row in episodes if int(row["global_step"]) <= 64 * 8][-100:]
    assert float(metrics[7]["charts/episodic_return"]) == pytest.approx(sum(lengths) / len(lengths))

    (summary,) = json.loads((run / "summary.json").read_text())
    assert list(summary) == SUMMARY
    assert summary["wall_seconds"] > 0 and summary["sps"] > 0
    expected = {"env_id": "CartPole-v1", "seed": 11, "objective": objective}
    expected |= {"total_timesteps": 1024, "eval_episodes": 3, "diverged_at": None}
    assert expected.items() <= summary.items()
    resets = sum(int(row["global_step"]) <= 1022 for row in episodes)  # each has had its row
    assert summary["transitions"] == 1024 - resets
    assert summary["last_100_return"] == float(metrics[-1]["charts/episodic_return"])
    assert line.startswith(f"CartPole-v1, {objective}, seed 11: evaluation ")
    assert f"{summary['eval_return_mean']:.1f}" in line and line.endswith(f"runs/{run.name}")


def test_an_episode_stands_at_the_step_that_ended_it(main, tmp_path):
    flags = "--num-envs 1 --num-steps 64 --num-minibatches 2 --total-timesteps 512"
    assert main(*flags.split(), "--eval-episodes", 1, "--run-dir", "run").code == 0
    episodes = rows(tmp_path / "run" / "episodes.csv")
    assert len(episodes) > 3
    step = 0
    for row in episodes:
        step += int(row["length"])
        assert int(row["global_step"]) == step
        step += 1  # the reset


def test_episodic_means_are_empty_before_the_first_episode_ends(main, tmp_path):
    flags = "--num-envs 2 --num-steps 4 --num-minibatches 2 --total-timesteps 160"
    assert main(*flags.split(), "--eval-episodes", 1, "--run-dir", "run").code == 0
    first = int(rows(tmp_path / "run" / "episodes.csv")[0]["global_step"])
    before = [str(step) for step in range(8, first, 8)]
    assert before
    for name in ("charts/episodic_return", "charts/episodic_length"):
        metrics = rows(tmp_path / "run" / "metrics.csv")
        assert [row["global_step"] for row in metrics if row[name] == ""] == before


def test_episodic_means_are_of_the_last_100_episodes(tmp_path):
    """150 episodes of returns 0 to 149, each twice as long, in three updates of 50."""
    who = {"seed": 1, "objective": "pg"}
    run = ppo.Run(ppo.Args(run_dir=str(tmp_path / "run")), {"env_id": "E"}, who, None)
    for update in (1, 2, 3):
        first = 50 * (update - 1)
        episodes = [(i, float(first + i), 2 * (first + i)) for i in range(50)]
        run.log(update, episodes, {}, {"kl_after_update": 0.0})
    summary = run.finish({"updates": 3, "transitions": 0, "diverged_at": None}, [0.0])
    assert summary["last_100_return"] == np.mean(range(50, 150))
    means = [float(row["charts/episodic_return"]) for row in rows(run.path / "metrics.csv")]
    assert means == [np.mean(range(50)), np.mean(range(100)), np.mean(range(50, 150))]
    last = rows(run.path / "metrics.csv")[-1]
    assert float(last["charts/episodic_length"]) == 2 * np.mean(range(50, 150))


def test_streams_stay_below_the_seeds_of_evaluations():
    """By the 2^20 environments that may count on from each; and they fill what is left."""
    bound = 2**30 - 2**20
    seeds = [ppo.stream(1, "environments", i) for i in range(20_000)]
    assert 0 <= min(seeds) < 0.001 * bound and 0.999 * bound < max(seeds) < bound


def test_evaluate_writes_evaluation_json_and_says_one_line(finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (summary,) = json.loads((finished / "summary.json").read_text())
    keys = ["seed", "objective", "actions", "eval_return_mean", "eval_return_std", "returns"]
    results = {}
    for flags, how, episodes in (
        ("", "greedy", 20),
        ("--eval-episodes 6", "greedy", 6),
        ("--eval-episodes 6 --sample-actions", "sampled", 6),
        ("--eval-episodes 6 --sample-actions", "sampled", 6),
    ):
        code, (line,), err = main("--evaluate", "run", *flags.split())
        (result,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        assert code == 0 and err == []
        assert list(result) == keys
        assert result["actions"] == how and len(result["returns"]) == episodes
        mean = sum(result["returns"]) / episodes
        assert result["eval_return_mean"] == pytest.approx(mean)
        assert line.startswith("run, seed 1: evaluation ")
        assert how in line and f"{result['eval_return_mean']:.1f}" in line
        assert results.setdefault((how, episodes), result) == result  # one answer to one question
    greedy, sampled = results["greedy", 6]["returns"], results["sampled", 6]["returns"]
    assert greedy != sampled and greedy == results["greedy", 20]["returns"][:6]
    closing = greedy[: summary["eval_episodes"]]  # a run ends with the same episodes
    assert summary["eval_return_mean"] == pytest.approx(sum(closing) / len(closing))
    for name in ("checkpoint.pt", "config.json", "metrics.csv", "episodes.csv", "summary.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("how", ["train", "evaluate"])
def test_capture_video_writes_an_mp4_of_every_evaluation_episode(how, finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "old")
    train = [*TINY.split(), "--run-dir", "run", "--capture-video"]
    evaluate = ["--evaluate", "old", "--eval-episodes", 2, "--capture-video"]
    assert main(*(train if how == "train" else evaluate)).code == 0
    videos = sorted((tmp_path / ("run" if how == "train" else "old") / "videos").iterdir())
    assert len(videos) == 2
    for video in videos:
        assert video.suffix == ".mp4"
        assert video.read_bytes()[4:8] == b"ftyp" and video.stat().st_size > 1000


TRACKED = [*TINY.split(), "--track", "--run-dir", "run"]


def wandb_free(tmp_path: Path) -> dict:
    """No account, no settings, an empty home."""
    (tmp_path / "home").mkdir()
    names = [name for name in os.environ if name.startswith("WANDB_")]
    names += ["NETRC", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"]
    return dict.fromkeys(names) | {"HOME": str(tmp_path / "home")}


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_track_needs_no_account_where_wandb_mode_says_so(mode, process, tmp_path):
    code, (line,), err = process(*TRACKED, **wandb_free(tmp_path), WANDB_MODE=mode)
    assert code == 0 and "evaluation" in line and all(text.startswith("wandb: ") for text in err)
    assert (tmp_path / "run" / "summary.json").exists()
    logs = list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert [log.stat().st_size > 1000 for log in logs] == ([True] if mode == "offline" else [])


def test_each_mirror_has_an_id_of_its_own_that_a_resumed_run_keeps(monkeypatch, tmp_path):
    """Folders with the same last part are not the same run."""
    monkeypatch.chdir(tmp_path)
    started, finished, mirrored = [], [], {}

    def init(**given):
        started.append(given)
        assert given["reinit"] == "create_new"  # or it would go on in a mirror that is still open
        end = partial(finished.append, given["id"])
        return SimpleNamespace(log=lambda row, step: None, summary=mirrored, finish=end)

    def refuse(**given):
        raise OSError("no network")

    fake = SimpleNamespace(login=lambda: None, init=init, Error=OSError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    task, who = {"env_id": "E"}, {"seed": 1, "objective": "pg"}
    lengths = {"metrics.csv": 0, "episodes.csv": 0}
    saved = {"recent": [], "sps": 1.0, "seconds": 1.0, "lengths": lengths, "args": {}}
    saved["state"] = {"updates": 0}
    a = ppo.Args(run_dir="a/1", track=True, gamma=0.9)
    b = ppo.Args(run_dir="b/1", track=True, gamma=0.8)
    for args, at_checkpoint in ((a, None), (b, None), (replace(a, resume="a/1"), saved)):
        ppo.Run(args, task, who, at_checkpoint).close()
    ids = [given["id"] for given in started]
    assert ids[0] == ids[2] != ids[1] and all(re.fullmatch("[0-9a-f]{32}", x) for x in ids)
    assert {given["name"] for given in started} == {"1"}

    flags = {"total_timesteps": 128, "num_envs": 2, "num_steps": 32, "num_minibatches": 2}
    _, summary = ppo.train(ppo.Args(**flags, eval_episodes=1, run_dir="c", track=True))
    assert mirrored == summary and finished == [started[-1]["id"]]

    fake.init = refuse
    with pytest.raises(ppo.UserError, match=r"^--track: no network; or set WANDB_MODE=offline$"):
        ppo.Run(ppo.Args(run_dir="d", track=True), task, who, None)


def test_track_without_a_key_is_one_line_and_leaves_nothing(process, tmp_path):
    code, out, err = process(*TRACKED, **wandb_free(tmp_path))
    assert code == 2 and out == [] and len(err) == 1
    assert re.match("error: --track: .*API key.*WANDB_MODE=offline", err[0])
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert list((tmp_path / "home").iterdir()) == []


def test_an_environment_of_the_user_whose_actions_start_at_one(process, tmp_path):
    """Lever raises at an action that it does not have; only the last one, number 3, pays."""
    flags = "--env-id conftest:Lever-v0 --total-timesteps 8192"
    flags += " --num-envs 8 --num-steps 32 --num-minibatches 8"
    code, (line,), _ = process(*flags.split(), "--run-dir", "run")
    assert code == 0 and line.startswith(
        "conftest:Lever-v0, clip:0.2, seed 1: evaluation 5.000 +- 0.000 in"
    )
    (summary,) = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_return_mean"] == 5.0 and summary["last_100_return"] > 4
    assert {row["length"] for row in rows(tmp_path / "run" / "episodes.csv")} == {"5"}


def test_an_environment_that_is_a_vector_only_is_evaluated_too(tmp_path):
    entry_point = "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"
    gym.register("OnlyVector-v0", vector_entry_point=entry_point)
    flags = {"env_id": "OnlyVector-v0", "total_timesteps": 128, "num_minibatches": 2}
    flags |= {"num_envs": 2, "num_steps": 32, "eval_episodes": 2, "run_dir": tmp_path / "run"}
    _, summary = ppo.train(ppo.Args(**flags))
    assert summary["eval_episodes"] == 2 and summary["eval_return_mean"] >= 8


def test_every_flag_of_args_is_in_the_config_that_resume_reads(finished):
    args, saved = ppo.load_run(str(finished))
    config = json.loads((finished / "config.json").read_text())["args"]
    assert config.keys() == {field.name for field in fields(ppo.Args)}
    assert asdict(args) == config | {"run_dir": str(finished), "resume": str(finished)}
    assert saved["args"] == config


# ----------------------------------------------------------------------------- the loaded policy
def test_load_policy_plays_the_episodes_of_the_evaluation(finished):
    (summary,) = json.loads((finished / "summary.json").read_text())
    policy = ppo.load_policy(str(finished))
    seed = 2**30 + ppo.stream(summary["seed"], "evaluation")
    env, returns = gym.make("CartPole-v1"), []
    for episode in range(summary["eval_episodes"]):
        obs, _ = env.reset(seed=seed + episode)
        returns.append(0.0)
        ended = False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            returns[-1] += reward
            ended = terminated or truncated
    assert summary["eval_return_mean"] == pytest.approx(np.mean(returns))


def test_load_policy_gives_the_environment_its_own_actions(tmp_path):
    """For one observation and for a batch, greedy and sampled; Lever's actions start at 1."""
    run = str(tmp_path / "run")
    flags = {"env_id": "conftest:Lever-v0", "total_timesteps": 256, "num_minibatches": 2}
    ppo.train(ppo.Args(**flags, num_envs=2, num_steps=32, eval_episodes=1, run_dir=run))
    agent, args = ppo.load_agent(run)
    assert (args.env_id, args.num_steps, args.device) == ("conftest:Lever-v0", 32, "cpu")
    greedy, sampled = ppo.load_policy(run), ppo.load_policy(run, sample_actions=True)
    obs = np.random.default_rng(0).uniform(-1, 1, (3000, 3))
    with torch.no_grad():
        probabilities = agent.policy(torch.from_numpy(obs).float()).exp().numpy()
    np.testing.assert_array_equal(greedy(obs), probabilities.argmax(-1) + 1)

    actions = sampled(obs)
    assert actions.shape == (3000,) and set(actions) == {1, 2, 3}
    counts = [(actions == action).sum() for action in (1, 2, 3)]
    deviations = np.sqrt((probabilities * (1 - probabilities)).sum(0))
    assert (np.abs(counts - probabilities.sum(0)) < 5 * deviations).all()
    assert (actions != sampled(obs)).any()  # other samples
    np.testing.assert_array_equal(ppo.load_policy(run, sample_actions=True)(obs), actions)

    env = gym.make("conftest:Lever-v0")
    for policy in (greedy, sampled):
        one, _ = env.reset()
        assert np.shape(policy(one)) == ()
        env.step(policy(one))  # raises where it has no such lever
    assert greedy(obs[0]) == greedy(obs)[0]
