"""Bad input to ppo_cartpole.py: one line that names the culprit, exit code 2, no traceback, nothing left on disk."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import TINY

import ppo_cartpole as ppo


def tree(folder: Path) -> dict:
    """Every file below a folder with its content, and every folder."""
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def is_one_line(outcome, *said: str) -> None:
    assert (outcome.code, outcome.out) == (2, [])
    assert len(outcome.err) == 1, outcome.err
    assert re.match(r"error: \S", outcome.err[0])
    for fragment in said:
        assert fragment in outcome.err[0]


# command line: what the message says
FLAGS = {
    # environments
    "--env-id CartPol-v1": "'CartPol-v1': Environment `CartPol` doesn't exist. Did you mean: `CartPole`?",
    "--env-id CartPole-v9": "versioned environments: [ `v0`, `v1` ]",
    "--env-id LunarLanderr-v3": "Did you mean: `LunarLander`?",
    "--env-id Cart*Pole": "Malformed environment ID: Cart*Pole",
    "--env-id=": "cannot make the environment ''",
    "--env-id no_such_module:CartPole-v1": "No module named 'no_such_module'",
    "--env-id a:b:c": "cannot make the environment 'a:b:c'",
    "--env-id Pendulum-v1": "Pendulum-v1 takes Box(-2.0, 2.0, (1,), float32) actions",
    "--env-id conftest:ManyActions-v0": "takes MultiDiscrete([2 3]) actions",
    "--env-id FrozenLake-v1": "observes Discrete(16)",
    "--env-id conftest:Image-v0": "observes Box(0, 255, (8, 8, 3), uint8)",
    "--env-id conftest:Dict-v0": "observes Dict('position'",
    "--env-id conftest:Broken-v0": "'conftest:Broken-v0': the simulator's licence has run out",
    "--env-id conftest:Lever-v0 --capture-video": "cannot render conftest:Lever-v0",
    # objectives
    **{f"--objective={text}": f"{text!r} is no objective" for text in ("", "clip", "clip:", "clip:-1", "clip:nan")},
    **{f"--objective={text}": f"{text!r} is no objective" for text in ("clip:inf", "clip:abc", "clip:0.2:0.2", "kl:0")},
    **{f"--objective={text}": f"{text!r} is no objective" for text in ("foo:1", "pg:1", "none:1", "adaptive", "PG")},
    # sizes
    "--num-envs 30 --num-minibatches 7": "30 x 64 = 1920 steps does not divide into 7 minibatches",
    "--num-minibatches 1024": "too few steps for 1024 minibatches",
    "--total-timesteps 0": "--total-timesteps must be between 1 and",
    "--num-envs -1": "--num-envs must be between 1 and 1048576, not -1",
    "--num-envs 1048577": "--num-envs must be between 1 and 1048576, not 1048577",
    "--num-steps 0": "--num-steps must be between 1 and",
    "--num-steps 1000000 --num-envs 10000": "a batch of 10000000000 steps is too large",
    "--update-epochs 0": "--update-epochs must be between 1 and",
    "--num-minibatches 0": "--num-minibatches must be between 1 and",
    "--num-minibatches -32": "--num-minibatches must be between 1 and",
    "--eval-episodes 0": "--eval-episodes must be between 1 and",
    f"--eval-episodes {10**12}": "--eval-episodes must be between 1 and",
    f"--total-timesteps {10**30}": f"--total-timesteps must be between 1 and 1000000000000, not {10**30}",
    f"--num-steps {10**400}": "--num-steps must be between 1 and",
    "--seed -1": "--seed must be between 0 and 2147483647, not -1",
    f"--seed {2**31}": "--seed must be between 0 and 2147483647, not 2147483648",
    "--checkpoint-every -1": "--checkpoint-every must be 0 or more, not -1",
    # numbers
    **{
        f"--{name} {value}": f"--{name} must be"
        for name, values in {
            "gamma": ("1.01", "-0.01", "inf", "nan"),
            "gae-lambda": ("1.01", "-0.01", "inf", "nan"),
            "learning-rate": ("0", "-1", "inf", "nan"),
            "value-clip": ("0", "-1", "inf", "nan"),
            "target-kl": ("0", "-1", "inf", "nan"),
            "vf-coef": ("-1", "inf", "nan"),
            "ent-coef": ("-1", "inf", "nan"),
            "max-grad-norm": ("0", "-inf", "nan"),
        }.items()
        for value in values
    },
    # the command line itself
    "--learning-rat 1": "--learning-rat, 1; did you mean --learning-rate?",
    "--epsilon 0.2 --gama 0.9": "--epsilon, 0.2, --gama, 0.9; did you mean --gamma?",
    "--norm-adv both": "argument '--norm-adv'. Expected one of ('batch', 'minibatch', 'none').",
    "--seed": "Missing value for argument '--seed'",
    "--seed one": "--seed: invalid literal for int() with base 10: 'one'",
    "--num-envs 1.5": "--num-envs: invalid literal for int() with base 10: '1.5'",
    "--gamma big": "--gamma: could not convert string to float: 'big'",
    "--anneal-lr yes": "Unrecognized options: yes",
    "junk": "Unrecognized options: junk",
    "-x": "Unrecognized options: -x",
    f"--{'z' * 100}": "Unrecognized options: --zzz",  # longer than a terminal is wide
    # the machine
    "--device tpu": "--device must be cpu or cuda, not 'tpu'",
    "--device cuda": "no CUDA",
    "--compile": "--compile needs a C++ compiler",
    "--run-dir /proc/nope": "cannot write to /proc/nope",
    # folders that are none
    "--resume nowhere": "nowhere is not a run folder",
    "--resume=": "is not a run folder",
    "--evaluate nowhere": "nowhere is not a run folder",
    "--evaluate=": "is not a run folder",
}


@pytest.mark.filterwarnings("ignore:.*render_mode")  # Gymnasium's, where an environment cannot render
@pytest.mark.parametrize("command", FLAGS)
def test_a_bad_flag(command, main, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    is_one_line(main(*command.split(" ")), FLAGS[command])
    assert tree(tmp_path) == {}


def edit(**changes):
    """Change these flags in a run folder's config.json."""

    def change(run: Path):
        config = json.loads((run / "config.json").read_text())
        config["args"] |= changes
        (run / "config.json").write_text(json.dumps(config))

    return change


def config_is(text: str):
    return lambda run: (run / "config.json").write_text(text)


def without(name: str):
    return lambda run: (run / name).unlink()


def nothing(run: Path) -> None:
    pass


# command line, what was done to the finished run in the folder `run` before, what the message says
FOLDERS = [
    ("--run-dir run", nothing, "run is not empty; choose another --run-dir, or --resume run"),
    ("--run-dir run --checkpoint-every 1", nothing, "run is not empty"),
    ("--run-dir run/config.json", nothing, "cannot write to run/config.json: File exists"),
    ("--run-dir run/config.json/below", nothing, "cannot write to run/config.json/below: Not a directory"),
    ("--resume run --seed 1", nothing, "--seed cannot stand beside --resume"),
    ("--seed=1 --resume=run", nothing, "--seed cannot stand beside --resume"),
    ("--resume run --no-anneal-lr", nothing, "anneal-lr cannot stand beside --resume"),
    ("--resume run --total_timesteps 99999", nothing, "--total-timesteps cannot stand beside --resume"),
    ("--resume run --eval-episodes 3", nothing, "--eval-episodes cannot stand beside --resume"),
    ("--resume run --evaluate run", nothing, "--evaluate cannot stand beside --resume"),
    ("--resume run", without("config.json"), "run is not a run folder that can be read"),
    ("--resume run", config_is('{"script": "ppo_cart'), "run is not a run folder that can be read"),
    ("--resume run", config_is("[1, 2]"), "run is not a run folder that can be read"),
    ("--resume run", config_is('{"script": "ppo_cartpole"}'), "run is not a run folder that can be read: 'args'"),
    ("--resume run", config_is('{"script": "ppo_cartpole", "args": []}'), "run is not a run folder that can be read"),
    ("--resume run", edit(horizon=5), "unexpected keyword argument 'horizon'"),
    ("--resume run", edit(seed=2), "config.json has changed since the checkpoint was written"),
    ("--resume run", config_is('{"script": "ppo_atari", "args": {"threads": 1}}'), "run is a run of ppo_atari.py, not"),
    ("--resume run", without("metrics.csv"), "cannot write to run/metrics.csv: No such file"),
    ("--resume run", lambda run: (run / "episodes.csv").write_text(""), "run/episodes.csv is shorter than when"),
    ("--resume run/config.json", nothing, "run/config.json is not a run folder that can be read"),
    ("--evaluate run --seed 2", nothing, "--seed cannot stand beside --evaluate"),
    ("--evaluate run --device cuda", nothing, "--device cannot stand beside --evaluate"),
    ("--evaluate run --eval-episodes 0", nothing, "--eval-episodes must be between 1 and"),
    ("--evaluate run --eval-episodes 1", lambda run: (run / "evaluation.json.tmp").mkdir(), "evaluation.json.tmp"),
    ("--evaluate run", without("checkpoint.pt"), "run has no checkpoint yet; go on with the run: --resume run"),
]


@pytest.mark.parametrize(("command", "change", "said"), FOLDERS, ids=[f"{c} {i}" for i, (c, *_) in enumerate(FOLDERS)])
def test_a_bad_folder(command, change, said, finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    change(tmp_path / "run")
    before = tree(tmp_path)
    is_one_line(main(*command.split()), said)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "said", "encoding"),
    [
        ("--env-id CartPol-v1", "Did you mean: `CartPole`?", "utf-8"),
        ("--learning-rat 1", "Unrecognized options: --learning-rat, 1; did you mean --learning-rate?", "utf-8"),
        ("--seed one", "--seed: invalid literal for int() with base 10: 'one'", "ascii"),  # tyro draws another box
        ("--resume nowhere", "nowhere is not a run folder", "ascii"),
    ],
)
def test_the_same_in_a_process_of_its_own(command, said, encoding, process, tmp_path):
    is_one_line(process(*command.split(), PYTHONIOENCODING=encoding), said)
    assert tree(tmp_path) == {}


def test_the_table_of_bad_flags_spares_the_good_ones_beside_them(main, tmp_path):
    """The edges of what the cases above cross are allowed."""
    edges = f"--gamma 1 --gae-lambda 0 --max-grad-norm inf --vf-coef 0 --seed {2**31 - 1} --num-minibatches 16"
    assert main(*TINY.split(), *edges.split(), "--run-dir", "new").code == 0
    (tmp_path / "there").mkdir()
    assert main(*TINY.split(), "--run-dir", "there").code == 0  # an empty folder may be there already


def test_a_run_compiled_elsewhere_is_evaluated_without_a_compiler(finished, main, monkeypatch, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    edit(compile=True, device="cuda")(tmp_path / "run")
    args = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    real = ppo.load_checkpoint
    monkeypatch.setattr(ppo, "load_checkpoint", lambda path: real(path) | {"args": args})
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main("--evaluate", "run", "--eval-episodes", 1).code == 0
    is_one_line(main("--resume", "run"), "--compile needs")


def test_help_explains_every_flag(main, tmp_path):
    code, out, err = main("--help")
    text = " ".join(line.strip(" │|") for line in out)
    assert code == 0 and err == [] and tree(tmp_path) == {}
    assert "PPO for discrete actions" in text
    names, kinds = [field.name.replace("_", "-") for field in fields(ppo.Args)], r"(?: (?:[A-Z]+\b|\{[^}]*\}))*"
    starts = {name: re.search(rf"(?<![\w-])--{name}(?:, --no-{name})?{kinds}", text) for name in names}
    assert all(starts.values()), starts
    ends = [*[match.start() for match in starts.values()][1:], len(text)]
    for (name, match), end in zip(starts.items(), ends, strict=True):
        explained, _, default = text[match.end() : end].partition("(default:")
        assert len(explained.split()) >= 3, name
        assert default.strip(" )"), name
