"""benchmark/grpo.py at toy size, and the claim that its `ramble` demonstrates, computed exactly."""

import json
import shutil

import pandas as pd
import pytest
import torch

import grpo_toy
from benchmark import UserError, grpo, read_csv, sweep

SMALL = "--total-timesteps 32 --num-prompts 2 --group-size 4 --eval-prompts 4 --pass-k 2"


# ------------------------------------------------------------------------------------------- ramble
def test_ramble_looks_at_the_first_word_alone():
    task = grpo.ramble_task()
    for prompt in task.prompts + task.held_out:
        for answer in (
            [prompt[0], "<end>"],
            [prompt[0], ".", ".", "<end>"],
            [prompt[0]] * task.max_length,
        ):
            assert task.verify(prompt, answer) == 1.0
            assert task.verify(prompt, ["." if answer[0] != "." else "A", *answer]) == 0.0
    assert task.verify(["A", "1"], ["<end>"]) == 0.0
    assert not {tuple(prompt) for prompt in task.prompts} & {
        tuple(prompt) for prompt in task.held_out
    }


@pytest.mark.parametrize(("advantage", "direction"), [(-1.0, -1), (1.0, 1)])
def test_one_over_length_makes_wrong_answers_longer_and_right_ones_shorter(advantage, direction):
    """The expected gradient of each loss by the logit of ending; its sign is that of the change.

    The policy ends an answer with probability 1/2 at every word. All its answers of at most 4
    words are there, as often as they occur.
    """
    lengths = torch.tensor([1] * 8 + [2] * 4 + [3] * 2 + [4] * 2)
    tokens = torch.ones(16, 4, dtype=torch.long)
    for row, length in enumerate(
        lengths[:-1].tolist()
    ):  # of the two longest, one ends with its fourth word
        tokens[row, length - 1 :] = 0
    mask = torch.arange(4) < lengths.unsqueeze(1)
    logit, even = torch.zeros((), requires_grad=True), torch.full((16, 4, 2), 0.5).log()
    batch = {"tokens": tokens, "mask": mask, "log_probs": even, "ref_log_probs": even}
    batch["advantages"] = torch.full((16,), advantage)
    change = {}
    for loss_agg in ("grpo", "dr_grpo", "dapo"):
        log_probs = torch.stack([logit, torch.zeros(())]).log_softmax(0).expand(16, 4, 2)
        loss, _ = grpo_toy.grpo_loss(
            log_probs, batch, 4, grpo_toy.Args(loss_agg=loss_agg, kl_coef=0.0)
        )
        (gradient,) = torch.autograd.grad(loss, logit)
        change[loss_agg] = -gradient.item()
    assert direction * change["grpo"] > 0.1
    assert change["dr_grpo"] == pytest.approx(0, abs=1e-7) and change["dapo"] == pytest.approx(
        0, abs=1e-7
    )


# ---------------------------------------------------------------------------------------- ablations
VARIES = {
    "baseline": {"baseline"},
    "mu": {"num_iterations"},
    "beta": {"kl_coef"},
    "aggregation": {"loss_agg"},
}
VARIES["group-size"] = {"group_size", "num_prompts"}


def test_the_flags_of_every_run_are_those_of_the_script_and_differ_within_an_ablation():
    calls = grpo.calls(list(grpo.ABLATIONS))
    assert len(calls) == 5 * (2 + 4 + 5 + 4 + 5 + 3)
    assert len({call.path for call in calls}) == len(calls)
    for name, ablation in grpo.ABLATIONS.items():
        assert set(ablation.panels) <= set(grpo.METRICS)
        if ablation.default is None:
            continue
        runs = []
        for flags in ablation.values.values():
            args = grpo_toy.parse_args(f"{ablation.flags} {flags} --seed 1".split())
            task = grpo.ramble_task() if args.task == "ramble" else grpo_toy.TASKS[args.task]()
            grpo_toy.check_args(args, task)
            runs.append(args)
        assert len({args.batch_size for args in runs}) == 1
        assert len({json.dumps(vars(args)) for args in runs}) == len(runs)
        default = vars(runs[list(ablation.values).index(ablation.default)])
        assert default == vars(grpo_toy.parse_args([*ablation.flags.split(), "--seed", "1"]))
        for args in runs:
            differ = {flag for flag, value in vars(args).items() if value != default[flag]}
            assert differ <= VARIES[name]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Two ablations of two seeds of toy runs, in this process; gives the list of runs started."""
    started = []

    def local(calls, layout, tick, jobs):
        for call in calls:
            started.append(call)
            try:
                yield call, sweep.work(call, layout)
            except UserError as reason:
                yield call, reason

    few = {"mu": ["mu=1", "mu=2"], "aggregation": ["grpo", "dapo"]}
    for name, values in few.items():
        ablation = grpo.ABLATIONS[name]
        kept = {value: ablation.values[value] for value in values}
        small = ablation._replace(flags=f"{ablation.flags} {SMALL}", values=kept)
        monkeypatch.setitem(grpo.ABLATIONS, name, small)
    monkeypatch.setattr(grpo, "SEEDS", range(1, 3))
    monkeypatch.setattr(grpo, "RUNS", tmp_path / "runs/grpo")
    monkeypatch.setattr(grpo, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sweep, "local", local)
    return started


RUN = ["--ablations", "mu", "aggregation"]


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_runs_are_made_once_and_the_report_is_always_the_same(small, tmp_path, capsys):
    grpo.main(RUN)
    assert len(small) == 8 and capsys.readouterr().out.endswith("summary.md\n")
    first = contents(tmp_path / "results")
    assert sorted(first) == ["aggregation.png", "curves.csv", "mu.png", "runs.csv", "summary.md"]
    grpo.main(RUN)
    grpo.main(["--ablations", "mu"])  # of the other one, what the CSVs have stays
    grpo.main(["--report"])
    assert len(small) == 8 and contents(tmp_path / "results") == first

    runs, points = (read_csv(tmp_path / "results" / name) for name in ("runs.csv", "curves.csv"))
    assert [(run["ablation"], run["value"], run["seed"]) for run in runs[:3]] == [
        ("mu", "mu=1", "1"), ("mu", "mu=1", "2"), ("mu", "mu=2", "1"),
    ]  # fmt: skip
    assert {run["total_timesteps"] for run in runs} == {"32"} and len(points) == 8 * 4
    metrics = read_csv(tmp_path / "runs/grpo/mu/mu=2/1/metrics.csv")
    mine = [point for point in points if (point["value"], point["seed"]) == ("mu=2", "1")]
    assert [float(p["entropy"]) for p in mine] == pytest.approx(
        [float(m["entropy"]) for m in metrics], rel=1e-5
    )
    summary = first["summary.md"].decode()
    assert summary.count("\n## ") == 2 and "![" in summary and "| 32 |" in summary
    for label in ("| mu=1 |", "| mu=2 |", "| grpo |", "| dapo |"):
        assert summary.count(label) == 1


def test_an_interrupted_run_goes_on_and_one_with_other_flags_is_refused(
    small, monkeypatch, tmp_path
):
    real, calls = grpo_toy.update, []

    def update(*args):
        calls.append(0)
        if len(calls) == 3:
            raise OSError("the disk is full")
        return real(*args)

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"1 of 4 calls failed: .*grpo/1 failed: the disk is full"),
    ):
        patch.setattr(grpo_toy, "update", update)
        grpo.main(["--ablations", "aggregation"])
    assert not (tmp_path / "results/summary.md").exists()
    grpo.main(["--ablations", "aggregation"])
    assert (tmp_path / "results/summary.md").exists()
    config = tmp_path / "runs/grpo/aggregation/dapo/2/config.json"
    changed = json.loads(config.read_text())
    changed["args"]["kl_coef"] = 0.5
    config.write_text(json.dumps(changed))
    count = len(small)
    with pytest.raises(UserError, match=r"dapo/2 ran with kl_coef 0.5 instead of 0.0"):
        grpo.main(["--ablations", "aggregation"])
    assert len(small) == count
    shutil.rmtree(config.parent)
    with pytest.raises(UserError, match=r"no config.json"):
        sweep.collect(grpo.calls(["aggregation"])[-1], grpo.LAYOUT)


def test_a_failed_run_is_named_and_the_others_are_made(small, monkeypatch, tmp_path):
    broken = grpo.ABLATIONS["mu"]
    monkeypatch.setitem(
        grpo.ABLATIONS, "mu", broken._replace(values=broken.values | {"mu=0": "--num-iterations 0"})
    )
    with pytest.raises(
        UserError, match=r"2 of 6 calls failed: .*failed: --num-iterations must be between 1"
    ):
        grpo.main(["--ablations", "mu"])
    assert len(list(tmp_path.glob("runs/grpo/mu/*/*/summary.json"))) == 4


def test_outcomes_and_differences_by_hand():
    ablation = grpo.ABLATIONS["aggregation"]._replace(values={"grpo": "", "dapo": ""})
    lengths = {
        ("grpo", "1"): (9, 4),
        ("grpo", "2"): (8, 4),
        ("dapo", "1"): (5, 5),
        ("dapo", "2"): (4, 4),
    }
    points, runs = [], []
    for (value, seed), (wrong, right) in lengths.items():
        cells = {
            "completions/mean_wrong_length": str(wrong),
            "completions/mean_right_length": str(right),
        }
        cells["frac_right"] = "0.25"
        who = {"value": value, "seed": seed}
        empty = dict.fromkeys(cells, "") | {
            "completions/mean_right_length": "99",
            "frac_right": "0.25",
        }
        points += [who | {"global_step": "1"} | cells, who | {"global_step": "2"} | empty]
        passes = {f"pass@{k}_{when}": "0.5" for k in "1k" for when in ("before", "after")}
        seconds = {"wall_seconds": "3", "warmup_seconds": "1"}
        runs.append(
            {"value": value, "seed": seed, "k": "16", "total_timesteps": "9"} | seconds | passes
        )
    wrong_minus_right, *_ = names = list(ablation.outcomes)
    points, runs = pd.DataFrame(points), pd.DataFrame(runs)
    found = grpo.outcome(points, ablation.outcomes[wrong_minus_right])
    assert {label: values.tolist() for label, values in found.items()} == {
        "grpo": [5, 4],
        "dapo": [0, 0],
    }
    first, second = grpo.table(ablation, runs, points)
    difference = f"{wrong_minus_right}: difference from grpo"
    assert first[wrong_minus_right] == "4.500 (4.000 to 5.000)" and first[difference] == ""
    assert second[difference] == "-4.500 (-5.000 to -4.000)"
    assert names[1] == "share of right answers" and second[names[1]] == "0.250 (0.250 to 0.250)"
    mine = points[points["value"] == "grpo"]
    same = grpo.table(ablation, runs, pd.concat([mine, mine.assign(value="dapo")]))
    assert same[1][difference] == "+0.000 (+0.000 to +0.000), no difference seen"


def test_every_sampled_answer_weighs_the_same():
    points = [
        {"value": "mu=2", "seed": "1", "global_step": step, "frac_right": x}
        for step, x in (("3", "0"), ("4", "1"))
    ]
    found = grpo.outcome(pd.DataFrame(points), grpo.RIGHT["share of right answers"])
    assert found["mu=2"].tolist() == [0.25]
