"""What ppo_cartpole.py promises about its runs: the same bits after any interruption, refusal of any damaged file,
a stop at the first number that is none, and the files that a run leaves."""

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
from dataclasses import asdict, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPT, TINY, Poison, environment
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo_cartpole as ppo

# Three runs of 80 updates, different in all that a checkpoint has to carry.
SMALL = "--num-envs 4 --num-steps 16 --num-minibatches 2 --update-epochs 2 --eval-episodes 2 --total-timesteps 5120"
RUNS = {
    "clip": f"{SMALL} --checkpoint-every 7",
    "adaptive": f"{SMALL} --objective adaptive:0.01 --checkpoint-every 1 --seed 5 --value-clip 0.2 --target-kl 0.5",
    "pg": f"{SMALL} --objective pg --env-id conftest:Lever-v0 --checkpoint-every 25 --no-anneal-lr --norm-adv batch",
}
LOSSES = "policy_loss value_loss entropy kl approx_kl old_approx_kl clipfrac grad_norm kl_after_update"
METRICS = ["update", "global_step", "seed", "objective"]
METRICS += [f"charts/{name}" for name in ("episodic_return", "episodic_length", "SPS", "learning_rate", "beta")]
METRICS += [f"losses/{name}" for name in f"{LOSSES} explained_variance".split()]
CLOCKS = {"wall_seconds", "seconds", "sps"}


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
    """All that must come out the same: everything a run leaves, its clocks apart."""
    saved, summary = ppo.load_checkpoint(run / "checkpoint.pt"), json.loads((run / "summary.json").read_text())
    return {
        "metrics": [{k: v for k, v in row.items() if k != "charts/SPS"} for row in rows(run / "metrics.csv")],
        "episodes": (run / "episodes.csv").read_bytes(),
        "weights": plain(saved["agent"]),
        "rest": plain({k: saved[k] for k in ("optimizer", "actions", "minibatches", "state", "recent", "dims")}),
        "summary": [{k: v for k, v in row.items() if k not in CLOCKS} for row in summary],
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
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return path

    return make


@pytest.fixture
def launch(tmp_path):
    """Starts the script, or other arguments of Python, in a process that is killed, if need be, with the test."""
    started = []

    def start(*argv, program=(str(SCRIPT),)) -> subprocess.Popen:
        # a shell that runs pytest in the background has it ignore Ctrl-C, and its children would inherit that
        fresh = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "env": environment()}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, *program, *map(str, argv)], cwd=tmp_path, **pipes, **fresh))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for_row(process: subprocess.Popen, path: Path, count: int) -> None:
    """Until metrics.csv has `count` rows, its header aside, or the process has ended."""
    deadline = time.monotonic() + 60
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > count):
        assert time.monotonic() < deadline, f"no row {count} in {path}"
        time.sleep(0.001)


# ------------------------------------------------------------------------------------------------- the same bits
def test_a_seed_is_the_whole_run_and_another_seed_another_run(reference, main, process, tmp_path):
    assert process(*RUNS["clip"].split(), "--run-dir", "again").code == 0
    same_bits(tmp_path / "again", reference("clip"))
    assert main(*RUNS["clip"].split(), "--seed", 2, "--run-dir", "other").code == 0
    ours, theirs = bits(tmp_path / "other"), bits(reference("clip"))
    assert all(ours[name] != theirs[name] for name in ("metrics", "episodes", "weights"))
    losses = {row["losses/policy_loss"] for run in ("again", "other") for row in rows(tmp_path / run / "metrics.csv")}
    assert len(losses) == 2 * len(ours["metrics"])  # nothing was shared, from the first update on


@pytest.mark.parametrize("name", RUNS)
def test_sigkill_at_random_moments_changes_no_bit(name, reference, launch, tmp_path):
    run, rng, row, kills = tmp_path / "run", random.Random(f"kill {name}"), 0, []
    command = [*RUNS[name].split(), "--run-dir", run]
    for _ in range(4):
        row, pause = row + rng.randint(1, 12), rng.uniform(0, 0.02)  # how far on, and when within an update
        process = launch(*command)
        wait_for_row(process, run / "metrics.csv", row)
        time.sleep(pause)
        process.kill()
        process.communicate()
        kills.append((row, round(pause, 4), process.returncode))
        row, command = (run / "metrics.csv").read_bytes().count(b"\n"), ["--resume", run]
    print(f"{name}: killed at (row, seconds later, exit code) {kills}")  # pytest shows it where the test fails
    assert [code for *_, code in kills] == [-signal.SIGKILL] * 4
    assert not (run / "summary.json").exists()
    process = launch("--resume", run)
    assert process.wait(60) == 0, process.stderr.read()
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
    """Within the write, between write and rename, right after the rename; then before summary.json is there."""
    run, command, sizes = tmp_path / "run", [*RUNS["adaptive"].split(), "--run-dir", tmp_path / "run"], []
    # moment, file, its how-manieth writing by this process; the update of the checkpoint that must be there then
    for moment, name, which, update in (
        ("half", "checkpoint.pt", 4, 3),
        ("before", "checkpoint.pt", 4, 6),
        ("after", "checkpoint.pt", 4, 10),
        ("before", "summary.json", 1, 80),
    ):
        process = launch(moment, name, which, *command, program=("-c", SABOTEUR))
        assert process.wait(60) == -signal.SIGKILL, process.stderr.read()
        state = ppo.load_checkpoint(run / "checkpoint.pt")["state"]
        assert state["update"] == update
        assert state["beta"] != 1.0  # where an adaptive beta starts
        left = run / f"{name}.tmp"
        sizes.append(left.stat().st_size / (run / "checkpoint.pt").stat().st_size if left.exists() else 0)
        command = ["--resume", run]
    assert sizes == pytest.approx([0.5, 1.0, 0.0, 0.0], abs=0.05)  # half a file, a whole one, none, a small one
    assert not (run / "summary.json").exists()
    before = {name: (run / name).read_bytes() for name in ("checkpoint.pt", "metrics.csv", "episodes.csv")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "collect", None)  # only the evaluation is left to do
        assert main("--resume", run).code == 0
    assert before == {name: (run / name).read_bytes() for name in before}
    same_bits(run, reference("adaptive"))


def stop_in_update(monkeypatch, number: int) -> None:
    """Ctrl-C in the middle of the `number`-th update from here."""
    real, calls = ppo.update, []

    def update(*args):
        calls.append(0)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(ppo, "update", update)


def test_ctrl_c_says_one_line_exits_130_and_can_be_resumed(reference, launch, main, monkeypatch, tmp_path):
    process = launch(*RUNS["clip"].split(), "--run-dir", "run")
    wait_for_row(process, tmp_path / "run" / "metrics.csv", 30)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    note, line = err.splitlines()
    assert process.returncode == 130
    assert note.startswith("note: --checkpoint-every") and "--resume" in line
    with monkeypatch.context() as patch:
        stop_in_update(patch, 1)  # long enough to see that the CSVs are cut back to the checkpoint
        assert main("--resume", "run").code == 130
    last = rows(tmp_path / "run" / "metrics.csv")[-1]
    assert int(last["update"]) == ppo.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["state"]["update"] >= 28
    finished_by = [int(row["global_step"]) for row in rows(tmp_path / "run" / "episodes.csv")]
    assert 0 < finished_by[-1] <= int(last["global_step"])
    assert main("--resume", "run").code == 0
    same_bits(tmp_path / "run", reference("clip"))


@pytest.mark.parametrize("stops", [[20], [1, 1], [5, 29]])
def test_without_a_checkpoint_a_run_starts_over_in_its_folder(stops, reference, main, monkeypatch, tmp_path):
    """The "pg" run writes its first checkpoint after 25 updates."""
    command = [*RUNS["pg"].split(), "--run-dir", "run"]
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_in_update(patch, stop)
            assert main(*command).code == 130
        assert (tmp_path / "run" / "metrics.csv").read_bytes().count(b"\n") == (stop if stop > 1 else 0)
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


# ------------------------------------------------------------------------------------------- damaged and hostile
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
    assert ppo.load_checkpoint(path)["state"]["update"] == 4

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
    for number, data in enumerate((pickle.dumps(Hostile(tmp_path / "0")), torch_bytes([Hostile(tmp_path / "1")]))):
        pickle.loads(data) if number == 0 else torch.load(io.BytesIO(data), weights_only=False)
        assert (tmp_path / str(number)).is_dir()


# what is done to a checkpoint, given its bytes, what it holds and a folder that hostile ones would make; what is said
ATTACKS = {
    "empty": (lambda good, saved, canary: b"", "truncated or damaged"),
    "half": (lambda good, saved, canary: good[: len(good) // 2], "truncated or damaged"),
    "bit flipped": (lambda good, saved, canary: flip(good, 4 * len(good)), "truncated or damaged"),
    "unsigned": (lambda good, saved, canary: good[:-32], "truncated or damaged"),
    "pickle": (lambda good, saved, canary: pickle.dumps(Hostile(canary), 2), "truncated or damaged"),
    "pickle, signed": (lambda good, saved, canary: signed(pickle.dumps(Hostile(canary), 2)), "not a checkpoint"),
    "zip": (lambda good, saved, canary: torch_bytes(saved | {"script": Hostile(canary)}), "truncated or damaged"),
    "zip, signed": (lambda good, saved, canary: signed(torch_bytes([saved, Hostile(canary)])), "not a checkpoint"),
    "not a dict": (lambda good, saved, canary: signed(torch_bytes([1, 2])), "not a checkpoint"),
    "incomplete": (lambda good, saved, canary: signed(torch_bytes({"script": "ppo_cartpole"})), "not a checkpoint"),
    "another script's": (
        lambda good, saved, canary: signed(torch_bytes(saved | {"script": "ppo_atari"})),
        "written by ppo_atari.py, not by ppo_cartpole.py",
    ),
}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_checkpoint_that_is_none_is_refused_by_name_and_never_run(attack, flag, finished, good, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    change, said = ATTACKS[attack]
    bad = change(good, ppo.load_checkpoint(finished / "checkpoint.pt"), tmp_path / "canary")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(bad)
    files = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    code, out, err = main(flag, "run")
    assert code == 2 and out == [] and len(err) == 1
    assert err[0].startswith("error: ") and "checkpoint.pt" in err[0] and said in err[0]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # no canary
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_config_edited_after_the_checkpoint_is_refused(flag, finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["args"]["learning_rate"] *= 2
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    code, _, (line,) = main(flag, "run")
    assert code == 2 and "config.json has changed since the checkpoint" in line


# ----------------------------------------------------------------------------------------- numbers that are none
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


def stopped_well(run: Path, outcome, source: str, update: int, checkpoints: list[bytes]) -> None:
    """Exit code 3, one line that names both, the last good checkpoint as it was written, and no summary.json."""
    assert outcome.code == 3 and outcome.out == []
    assert [line.split(":")[0] for line in outcome.err] == ["note", "error"]
    assert re.match(rf"error: {source} not finite in update {update};", outcome.err[1])
    assert not (run / "summary.json").exists()
    assert len(checkpoints) == (update - 1) // 2 > 0
    assert (run / "checkpoint.pt").read_bytes() == checkpoints[-1]
    saved = ppo.load_checkpoint(run / "checkpoint.pt")
    assert saved["state"]["update"] == 2 * len(checkpoints)
    assert all(weights.isfinite().all() for weights in saved["agent"].values())
    assert len(rows(run / "metrics.csv")) == update - 1  # each written in full before the bad number came


# Four copies take 16 steps an update: steps 257 and 258 are the first of update 5, step 320 is its last.
@pytest.mark.filterwarnings("ignore:.*not within the observation space")  # Gymnasium's
@pytest.mark.parametrize("env_id", ["Poison-obs-nan-v0", "Poison-obs-inf-v0", "Poison-rewards-nan-v0"])
def test_an_environment_that_emits_a_number_that_is_none_stops_the_run(env_id, main, checkpoints, tmp_path):
    Poison.steps = 0
    outcome = main(*f"{SMALL} --checkpoint-every 2 --run-dir run --env-id conftest:{env_id}".split())
    stopped_well(tmp_path / "run", outcome, env_id.split("-")[1], 5, checkpoints)


def test_the_same_in_a_process_of_its_own(process, tmp_path):
    flags = f"{SMALL} --checkpoint-every 2 --run-dir run --env-id conftest:Poison-rewards-nan-v0"
    outcome = process(*flags.split())
    written = [(tmp_path / "run" / "checkpoint.pt").read_bytes()]
    stopped_well(tmp_path / "run", outcome, "rewards", 5, [b"", *written])


@pytest.mark.parametrize("source", ["policy_loss", "grad_norm", "weights"])
def test_a_loss_a_gradient_or_a_weight_that_is_none_stops_the_run(source, main, checkpoints, monkeypatch, tmp_path):
    real_update, real_gradient, updates = ppo.update, ppo.gradient, []

    def gradient(agent, parameters, minibatch, *rest):
        if len(updates) == 4 and source == "policy_loss":
            minibatch = minibatch | {"advantages": minibatch["advantages"] * math.nan}
        metrics = real_gradient(agent, parameters, minibatch, *rest)
        if len(updates) == 4 and source == "grad_norm":
            metrics["grad_norm"] = torch.tensor(math.inf)
        return metrics

    def update(agent, *rest):
        metrics = real_update(agent, *rest)
        updates.append(0)
        if len(updates) == 5 and source == "weights":
            with torch.no_grad():
                agent.actor[0].bias[0] = math.nan
        return metrics

    monkeypatch.setattr(ppo, "gradient", gradient)
    monkeypatch.setattr(ppo, "update", update)
    outcome = main(*f"{SMALL} --checkpoint-every 2 --run-dir run".split())
    stopped_well(tmp_path / "run", outcome, source, 5, checkpoints)


# --------------------------------------------------------------------------------------------- what a run leaves
@pytest.mark.parametrize("objective", ["clip:0.2", "kl:1", "adaptive:0.01", "none", "pg"])
def test_everything_a_run_leaves(objective, main, monkeypatch, tmp_path):
    real, first = ppo.write_file, []

    def write_file(path, data):
        if not first:
            first.extend([path.name, *(other.name for other in path.parent.iterdir())])
        real(path, data)

    monkeypatch.setattr(ppo, "write_file", write_file)
    flags = {"objective": objective, "seed": 11, "num_envs": 2, "num_steps": 32, "num_minibatches": 4}
    flags |= {"total_timesteps": 1000, "eval_episodes": 3, "gamma": 0.9, "max_grad_norm": math.inf}
    code, (line,), err = main(*(text for name, value in flags.items() for text in (f"--{name}", value)))
    assert code == 0 and err == []
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"CartPole-v1__ppo_cartpole__11__\d{{8}}-\d{{6}}-{os.getpid()}", run.name)
    left = ["checkpoint.pt", "config.json", "episodes.csv", "metrics.csv", "summary.json"]
    assert sorted(path.name for path in run.iterdir()) == left
    assert first == ["config.json"]  # written first, into an empty folder

    config = json.loads((run / "config.json").read_text())
    assert config["script"] == "ppo_cartpole"
    assert config["args"] == asdict(ppo.Args(**flags)) | {"checkpoint_every": 50 * 500 // 32 + 1}
    versions = {name: version(name) for name in ("torch", "numpy", "gymnasium", "tyro")}
    assert config["versions"].items() >= (versions | {"python": platform.python_version()}).items()
    git = ["git", "-C", SCRIPT.parent, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    assert (config["git_commit"] or "").removesuffix("-dirty") == commit
    assert re.match(r"\d{4}-\d\d-\d\dT", config["started"])

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
    assert all(float(row["return"]) == int(row["length"]) for row in episodes)  # CartPole pays 1 a step
    lengths = [int(row["length"]) for row in episodes if int(row["global_step"]) <= 64 * 8][-100:]
    assert float(metrics[7]["charts/episodic_return"]) == pytest.approx(sum(lengths) / len(lengths))

    summary = json.loads((run / "summary.json").read_text())
    assert isinstance(summary, list) and len(summary) == 1
    keys = "env_id seed objective total_timesteps transitions wall_seconds seconds sps last_100_return"
    assert list(summary[0]) == f"{keys} eval_return_mean eval_return_std eval_episodes diverged_at".split()
    assert ppo.load_checkpoint(run / "checkpoint.pt")["seconds"]["starts"] == 1
    assert list(summary[0]["seconds"]) == ["environment", "policy", "update"]
    assert 0 < sum(summary[0]["seconds"].values()) < summary[0]["wall_seconds"] and summary[0]["sps"] > 0
    expected = {"env_id": "CartPole-v1", "seed": 11, "objective": objective, "eval_episodes": 3, "diverged_at": None}
    assert expected.items() <= summary[0].items()
    finishing = sum(int(row["global_step"]) <= 1022 for row in episodes)  # their resets have had a row
    assert summary[0]["total_timesteps"] == 1024 and summary[0]["transitions"] == 1024 - finishing
    assert summary[0]["last_100_return"] == float(metrics[-1]["charts/episodic_return"])
    assert f"{summary[0]['eval_return_mean']:.1f}" in line and run.name in line


def test_episodic_means_are_empty_before_the_first_episode_ends(main, tmp_path):
    flags = "--num-envs 2 --num-steps 4 --num-minibatches 2 --total-timesteps 160 --eval-episodes 1 --run-dir run"
    assert main(*flags.split()).code == 0
    metrics, episodes = rows(tmp_path / "run" / "metrics.csv"), rows(tmp_path / "run" / "episodes.csv")
    for name in ("charts/episodic_return", "charts/episodic_length"):
        empty = [row["global_step"] for row in metrics if row[name] == ""]
        assert empty == [str(8 * i) for i in range(1, (int(episodes[0]["global_step"]) - 1) // 8 + 1)] != []


def test_evaluate_writes_evaluation_json_and_says_one_line(finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (summary,) = json.loads((finished / "summary.json").read_text())
    results = {}
    for flags in ("", "--eval-episodes 6", "--eval-episodes 6 --sample-actions", "--eval-episodes 6 --sample-actions"):
        code, (line,), err = main("--evaluate", "run", *flags.split())
        (result,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        how = "sampled" if "sample" in flags else "greedy"
        assert code == 0 and err == []
        assert list(result) == ["seed", "objective", "actions", "eval_return_mean", "eval_return_std", "returns"]
        assert result["actions"] == how and len(result["returns"]) == (6 if flags else 20)
        assert result["eval_return_mean"] == pytest.approx(sum(result["returns"]) / len(result["returns"]))
        assert line.startswith("run, seed ") and how in line and f"{result['eval_return_mean']:.1f}" in line
        assert results.setdefault(flags, result) == result  # the same question twice has one answer
    greedy, sampled = (results[f"--eval-episodes 6{how}"]["returns"] for how in ("", " --sample-actions"))
    assert greedy != sampled and greedy == results[""]["returns"][:6]
    closing = greedy[: summary["eval_episodes"]]  # the evaluation that ends a run has the same episodes
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
        assert video.suffix == ".mp4" and video.read_bytes()[4:8] == b"ftyp" and video.stat().st_size > 1000


TRACKED = [*TINY.split(), "--track", "--run-dir", "run"]


def wandb_free(tmp_path: Path) -> dict:
    """No account, no settings, an empty home."""
    (tmp_path / "home").mkdir()
    names = [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"]
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
    seen = []
    fake = SimpleNamespace(
        login=lambda: None, Error=OSError, init=lambda **given: seen.append(given) or SimpleNamespace(log=len)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for folder in ("a/1", "b/1"):
        args = ppo.Args(run_dir=folder, track=True, gamma=0.9 if folder == "a/1" else 0.8)
        ppo.Run(args, {"env_id": "E"}, 1, None).bar.close()
    args = ppo.Args(run_dir="a/1", resume="a/1", track=True, gamma=0.9)
    saved = {"recent": [[]], "seconds": {"wall": 1.0}, "lengths": {"metrics.csv": 0, "episodes.csv": 0}}
    ppo.Run(args, {"env_id": "E"}, 1, saved | {"state": {"global_step": 0}}).bar.close()
    ids = [given["id"] for given in seen]
    assert ids[0] == ids[2] != ids[1] and all(re.fullmatch("[0-9a-f]{32}", x) for x in ids)
    assert {given["name"] for given in seen} == {"1__1__clip-0.2"}

    def refuse(**_):
        raise OSError("no network")

    fake.init = refuse
    with pytest.raises(ppo.UserError, match=r"^--track: no network; or set WANDB_MODE=offline$"):
        ppo.Run(ppo.Args(run_dir="c", track=True), {"env_id": "E"}, 1, None)


def test_track_without_a_key_is_one_line_and_leaves_nothing(process, tmp_path):
    code, out, err = process(*TRACKED, **wandb_free(tmp_path))
    assert code == 2 and out == [] and len(err) == 1
    assert re.match("error: --track: .*API key.*WANDB_MODE=offline", err[0])
    assert [path.name for path in tmp_path.iterdir()] == ["home"] and list((tmp_path / "home").iterdir()) == []


def test_an_environment_of_the_user_whose_actions_start_at_one(process, tmp_path):
    """Lever raises at an action that it does not have, and pays 1 a step only for the last one, number 3."""
    flags = "--env-id conftest:Lever-v0 --total-timesteps 8192 --num-envs 8 --num-steps 32 --num-minibatches 8"
    code, (line,), _ = process(*flags.split(), "--run-dir", "run")
    assert code == 0 and line.startswith("conftest:Lever-v0, seed 1")
    (summary,) = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_return_mean"] == 5.0 and summary["last_100_return"] > 4
    assert {row["length"] for row in rows(tmp_path / "run" / "episodes.csv")} == {"5"}


def test_every_flag_of_args_is_in_the_config_that_resume_reads(finished):
    args, saved = ppo.load_run(ppo.Args, str(finished))
    config = json.loads((finished / "config.json").read_text())["args"]
    assert config.keys() == {field.name for field in fields(ppo.Args)}
    assert asdict(args) == config | {"run_dir": str(finished), "resume": str(finished)} and saved["args"] == config
