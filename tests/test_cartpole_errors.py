"""Bad input to ppo_cartpole.py: no traceback, exit code 2, nothing left on disk.

What tyro cannot read, it explains in a box. All else is one line that names the culprit.
"""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import TINY

import ppo_cartpole as ppo
import ppo_continuous


def tree(folder: Path) -> dict:
    """Every file below a folder with its content, and every folder."""
    found = {}
    for path in folder.rglob("*"):
        found[path.relative_to(folder)] = path.is_file() and path.read_bytes()
    return found


def is_one_line(outcome, *fragments: str, notes: int = 0) -> None:
    """Of an error with these fragments; so many notes, a line each, may stand above it."""
    assert (outcome.code, outcome.out) == (2, [])
    *above, line = outcome.err
    assert len(above) == notes, outcome.err
    assert all(note.startswith("note: ") for note in above)
    assert re.match(r"error: \S", line)
    for fragment in fragments:
        assert fragment in line


def is_a_box(outcome, *fragments: str) -> None:
    """tyro's, with these fragments, wherever its lines break."""
    assert (outcome.code, outcome.out) == (2, [])
    lines = [line.strip(" │|") for line in outcome.err]
    text = " ".join(line for line in lines if line.strip("-─╭╮╰╯"))
    assert "For full helptext" in text and "Traceback" not in text and "error:" not in text
    for fragment in fragments:
        assert fragment in text


# command line: what the line says
NO_OBJECTIVES = ["", "clip", "clip:", "clip:-1", "clip:nan", "clip:inf", "clip:abc", "clip:0.2:0.2"]
NO_OBJECTIVES += ["kl:0", "foo:1", "pg:1", "none:1", "adaptive", "PG"]
INTERVALS = {  # and values that are in none
    "gamma": ("0 and 1", "1.01", "-0.01", "inf", "nan"),
    "gae-lambda": ("0 and 1", "1.01", "-0.01", "inf", "nan"),
    "learning-rate": ("1e-12 and 1000000000000.0", "0", "-1", "inf", "nan"),
    "value-clip": ("1e-12 and 1000000000000.0", "0", "-1", "inf", "nan"),
    "target-kl": ("1e-12 and 1000000000000.0", "0", "-1", "inf", "nan"),
    "vf-coef": ("0 and 1000000000000.0", "-1", "inf", "nan"),
    "ent-coef": ("0 and 1000000000000.0", "-1", "inf", "nan"),
    "max-grad-norm": ("1e-12 and inf", "0", "-inf", "nan"),
    "total-timesteps": ("1 and 1000000000000", "0", str(10**30)),
    "num-envs": ("1 and 1048576", "-1", "1048577"),
    "num-steps": ("2 and 1048576", "0", "1", str(10**400)),
    "update-epochs": ("1 and 1048576", "0"),
    "num-minibatches": ("1 and 1048576", "0", "-32"),
    "eval-episodes": ("1 and 1048576", "0", str(10**12)),
    "seed": ("0 and 2147483647", "-1", str(2**31)),
    "checkpoint-every": ("0 and 1000000000000.0", "-1"),
}
LINES = {
    # environments
    "--env-id CartPol-v1": "'CartPol-v1': NameNotFound: Environment `CartPol` doesn't exist. Did",
    "--env-id CartPole-v9": "versioned environments: [ `v0`, `v1` ]",
    "--env-id LunarLanderr-v3": "Did you mean: `LunarLander`?",
    "--env-id Cart*Pole": "Malformed environment ID: Cart*Pole",
    "--env-id=": "cannot make '': Error: Malformed environment ID",
    "--env-id no_such_module:CartPole-v1": "No module named 'no_such_module'; is its folder in PYT",
    "--env-id a:b:c": "cannot make 'a:b:c': ModuleNotFoundError: No module named",
    "--env-id Pendulum-v1": "takes Box(-2.0, 2.0, (1,), float32) actions; this script wants",
    "--env-id conftest:ManyActions-v0": "takes MultiDiscrete([2 3]) actions",
    "--env-id FrozenLake-v1": "observes Discrete(16); this script wants",
    "--env-id conftest:Image-v0": "observes Box(0, 255, (8, 8, 3), uint8)",
    "--env-id conftest:Dict-v0": "observes Dict('position'",
    "--env-id conftest:Broken-v0": "Broken-v0': RuntimeError: the simulator's licence has run out",
    "--env-id conftest:Lever-v0 --capture-video": "conftest:Lever-v0",
    "--env-id conftest:Blind-v0 --capture-video": "cannot render conftest:Blind-v0 here",
    # objectives
    **{f"--objective={text}": f"{text!r} is no objective: clip:EPS, kl" for text in NO_OBJECTIVES},
    "--objective pg": "eq. 2 can use a batch once only: add --update-epochs 1 --num-minibatches 1",
    "--objective pg --update-epochs 1": "--objective pg: eq. 2 can use a batch once only",
    "--objective pg --num-minibatches 1": "--objective pg: eq. 2 can use a batch once only",
    # sizes
    "--num-envs 30 --num-minibatches 7": "30 x 64 = 1920 steps does not divide into 7 minibatches",
    "--num-minibatches 1024": "32 x 64 = 2048 steps is too small for 1024 minibatches",
    "--num-steps 1000000 --num-envs 10000": "10000 x 1000000 = 10000000000 steps is too large",
    # numbers
    **{
        f"--{name} {value}": f"--{name} must be between {interval}, not "
        for name, (interval, *values) in INTERVALS.items()
        for value in values
    },
    # the machine
    "--device tpu": "--device must be cpu or cuda, not 'tpu'",
    "--device cuda": "there is no CUDA here; use --device cpu",
    "--compile": "--compile needs a C++ compiler such as g++; use --no-compile",
    "--run-dir /proc/nope": "cannot write to /proc/nope",
    # switches
    "--anneal-lr False": "--anneal-lr takes no value: it is --anneal-lr or --no-anneal-lr",
    "--anneal_lr=0": "--anneal_lr takes no value: it is --anneal-lr or --no-anneal-lr",
    "--seed 2 --no-bootstrap-truncated yes": "takes no value: it is --bootstrap-truncated or --no-",
    # folders that are none
    "--resume nowhere": "nowhere is not a run folder",
    "--resume=": "is not a run folder",
    "--resume nowhere --gama 1": "--gama cannot stand beside --resume",
    "--evaluate nowhere": "nowhere is not a run folder",
    "--evaluate=": "is not a run folder",
}

# command line: what tyro's box says
BOXES = {
    "--learning-rat 1": "options: --learning-rat, 1 Perhaps you meant: --learning-rate FLOAT",
    "--epsilon 0.2 --gama 0.9": "--epsilon, 0.2, --gama, 0.9 Arguments similar to --gama: --gamma",
    "--norm-adv both": "argument '--norm-adv'. Expected one of ('batch', 'minibatch', 'none').",
    "--seed": "Missing value for argument '--seed'",
    "--seed one": "--seed: invalid literal for int() with base 10: 'one'",
    "--num-envs 1.5": "--num-envs: invalid literal for int() with base 10: '1.5'",
    "--gamma big": "--gamma: could not convert string to float: 'big'",
    "--preset paper": "Unrecognized options: --preset",
    "--seeds 1 2": "Unrecognized options: --seeds, 1, 2",
    "junk": "Unrecognized options: junk",
    "-x": "Unrecognized options: -x",
    f"--{'z' * 100}": "Unrecognized options: --zzz",  # longer than a terminal is wide
}


@pytest.fixture
def bare(monkeypatch):
    """A machine with neither a compiler nor CUDA."""
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.filterwarnings("ignore:.*render")  # Gymnasium's, where it cannot render
@pytest.mark.parametrize("command", LINES)
def test_a_bad_flag_is_one_line(command, bare, main, tmp_path):
    is_one_line(main(*command.split(" ")), LINES[command])
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("module", [ppo, ppo_continuous])
def test_films_need_moviepy(module, monkeypatch):
    """Said before the training: Gymnasium would ask for it after it."""
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(module.UserError, match="--capture-video needs moviepy"):
        module.check_args(module.Args(capture_video=True))


@pytest.mark.parametrize("command", BOXES)
def test_what_tyro_cannot_read_it_explains_in_a_box(command, bare, main, tmp_path):
    is_a_box(main(*command.split(" ")), BOXES[command])
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


NOT_READ = "run is not a run folder that can be read"
# command line, what was done to the finished run in the folder `run` before, what the message says
FOLDERS = [
    ("--run-dir run", nothing, "run is not empty; choose another --run-dir, or --resume run"),
    ("--run-dir run --checkpoint-every 1", nothing, "run is not empty"),
    ("--run-dir run/config.json", nothing, "/run/config.json: File exists"),
    ("--run-dir run/config.json/below", nothing, "/run/config.json/below: Not a directory"),
    ("--resume run --seed 1", nothing, "--seed cannot stand beside --resume"),
    ("--seed=1 --resume=run", nothing, "--seed cannot stand beside --resume"),
    ("--resume run --no-anneal-lr", nothing, "anneal-lr cannot stand beside --resume"),
    (
        "--resume run --total_timesteps 99999",
        nothing,
        "--total_timesteps cannot stand beside --resume",
    ),
    ("--resume run --eval-episodes 3", nothing, "--eval-episodes cannot stand beside --resume"),
    ("--resume run --evaluate run", nothing, "--evaluate cannot stand beside --resume"),
    ("--resume run", without("config.json"), NOT_READ),
    ("--resume run", config_is('{"script": "ppo_cart'), NOT_READ),
    ("--resume run", config_is("[1, 2]"), NOT_READ),
    ("--resume run", config_is('{"script": "ppo_cartpole"}'), f"{NOT_READ}: 'args'"),
    ("--resume run", config_is('{"script": "ppo_cartpole", "args": []}'), NOT_READ),
    ("--resume run", edit(horizon=5), "this script has no flags horizon"),
    ("--resume run", edit(seed=2), "config.json has changed since the checkpoint; undo the change"),
    (
        "--resume run",
        config_is('{"script": "ppo_atari", "args": {"threads": 1}}'),
        "of ppo_atari.py, not",
    ),
    ("--resume run", without("metrics.csv"), "/run/metrics.csv: No such file"),
    (
        "--resume run",
        lambda run: (run / "episodes.csv").write_text(""),
        "run/episodes.csv is shorter than at the checkpoint",
    ),
    ("--resume run/config.json", nothing, "run/config.json is not a run folder that can be read"),
    ("--evaluate run --seed 2", nothing, "--seed cannot stand beside --evaluate"),
    ("--evaluate run --device cuda", nothing, "--device cannot stand beside --evaluate"),
    ("--evaluate run --eval-episodes 0", nothing, "--eval-episodes must be between 1 and"),
    (
        "--evaluate run",
        without("checkpoint.pt"),
        "run has no checkpoint yet; go on with the run: --resume run",
    ),
]


@pytest.mark.parametrize(
    ("command", "change", "fragment"),
    FOLDERS,
    ids=[f"{command} {i}" for i, (command, *_) in enumerate(FOLDERS)],
)
def test_a_bad_folder(command, change, fragment, finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    change(tmp_path / "run")
    before = tree(tmp_path)
    is_one_line(main(*command.split()), fragment, notes="--checkpoint-every" in command)
    assert tree(tmp_path) == before


def test_where_evaluation_json_cannot_be_written_the_result_is_printed_first(
    finished, main, tmp_path
):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/evaluation.json.tmp").mkdir()
    code, out, err = main("--evaluate", "run", "--eval-episodes", 1)
    assert code == 2 and len(out) == len(err) == 1
    assert out[0].startswith("run, seed 1: evaluation ")
    assert "evaluation.json.tmp: Is a directory" in err[0]


@pytest.mark.parametrize("flag", [{"num_envs": "2"}, {"anneal_lr": "False"}, {"norm_adv": "both"}])
def test_a_config_whose_values_are_of_another_type(flag, finished, main, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/checkpoint.pt").unlink()
    edit(**flag)(tmp_path / "run")
    ((name, value),) = flag.items()
    is_one_line(main("--resume", "run"), f"{name} must be ", f", not {value!r}", notes=1)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro's box is of other characters
@pytest.mark.parametrize(
    ("command", "form", "fragment"),
    [
        ("--env-id CartPol-v1", is_one_line, "Did you mean: `CartPole`?"),
        ("--resume nowhere", is_one_line, "nowhere is not a run folder"),
        ("--seed one", is_a_box, "--seed: invalid literal for int() with base 10: 'one'"),
    ],
)
def test_the_same_in_a_process_of_its_own(command, form, fragment, encoding, process, tmp_path):
    form(process(*command.split(), PYTHONIOENCODING=encoding), fragment)
    assert tree(tmp_path) == {}


def test_the_tables_of_bad_flags_spare_the_good_ones_beside_them(main, tmp_path):
    """The edges of what the cases above cross are allowed."""
    edges = "--gamma 1 --gae-lambda 0 --max-grad-norm inf --vf-coef 0 --num-minibatches 16"
    edges += f" --seed {2**31 - 1} --run-dir new"
    assert main(*TINY.split(), *edges.split()).code == 0
    (tmp_path / "there").mkdir()
    assert main(*TINY.split(), "--run-dir", "there").code == 0  # an empty folder may be there
    once = "--objective pg --num-minibatches 1 --update-epochs 1 --run-dir once"
    assert main(*TINY.split(), *once.split()).code == 0


def test_a_run_compiled_elsewhere_is_evaluated_without_a_compiler(
    finished, bare, main, monkeypatch, tmp_path
):
    shutil.copytree(finished, tmp_path / "run")
    edit(compile=True, device="cuda")(tmp_path / "run")
    args = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    real = ppo.load_checkpoint
    monkeypatch.setattr(ppo, "load_checkpoint", lambda path: real(path) | {"args": args})
    assert main("--evaluate", "run", "--eval-episodes", 1).code == 0
    is_one_line(main("--resume", "run"), "--device cuda: there is no CUDA here")


def test_help_explains_every_flag(main, tmp_path):
    code, out, err = main("--help")
    text = " ".join(line.strip(" │|") for line in out)
    assert code == 0 and err == [] and tree(tmp_path) == {}
    assert "PPO for discrete actions" in text
    kinds = r"(?: (?:[A-Z]+\b|\{[^}]*\}))*"
    starts = []
    for field in fields(ppo.Args):
        name = field.name.replace("_", "-")
        starts.append(re.search(rf"(?<![\w-])--{name}(?:, --no-{name})?{kinds}", text))
        assert starts[-1], name
    ends = [match.start() for match in starts[1:]] + [len(text)]
    for match, end in zip(starts, ends, strict=True):
        explained, _, default = text[match.end() : end].partition("(default:")
        assert len(explained.split()) >= 3, match[0]
        assert default.strip(" )"), match[0]


def test_the_value_of_a_flag_may_look_like_a_switch():
    assert ppo.parse_args(["--run-dir", "track=1"]).run_dir == "track=1"
    assert ppo.given_flags(["--wandb-project", "compile", "1"]) == ["wandb_project"]
