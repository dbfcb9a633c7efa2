"""What TRL's GRPOTrainer makes of the same log-probabilities, masks and rewards as grpo_toy.py: advantages and losses.

    pip install -r requirements-peers.txt && python benchmark/trl_reference.py

writes tests/trl_expected.json, which the tests compare with where TRL is not installed; where it is, they ask TRL
itself, through reference(). The trainer is a real one, on a model of a few weights. Only its inputs are replaced: the
answers, and the log-probabilities that its model would give them.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = ROOT / "tests/trl_expected.json"
GROUPS, GROUP_SIZE, MAX_LENGTH, WORDS = 3, 4, 6, 5  # the sizes of the example
CASES = [  # flags of grpo_toy.py; what is not named is at its default there
    {"loss_agg": "grpo", "clip_high": 0.28, "kl_coef": 0.04},
    {"loss_agg": "dr_grpo", "clip_high": 0.28, "kl_coef": 0.04},
    {"loss_agg": "dapo", "clip_high": 0.28, "kl_coef": 0.04},
    {"ratio": "sequence-mean", "clip_low": 0.05, "clip_high": 0.1, "kl_coef": 0.04},
    {"ratio": "sequence-mean", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.0},
    {"loss_agg": "dr_grpo", "scale_rewards": "none", "kl_coef": 0.0},
    {"scale_rewards": "batch", "kl_coef": 0.0},
    {"kl_coef": 0.2, "kl_estimator": "k3-corrected"},
]


def example() -> dict:
    """Answers of several lengths, one of them without an end, and three policies that differ enough for ratios to be
    clipped on both sides, as nested lists: what a batch of grpo_toy.py holds."""
    rng = torch.Generator().manual_seed(0)
    count = GROUPS * GROUP_SIZE
    tokens = torch.randint(1, WORDS, (count, MAX_LENGTH), generator=rng)
    lengths = torch.randint(1, MAX_LENGTH + 1, (count,), generator=rng)
    lengths[:2] = torch.tensor([MAX_LENGTH, 1])
    for row, length in enumerate(lengths.tolist()):
        end = length - 1 if row > 0 else length  # the first answer has no end token
        tokens[row, end:] = 0  # the end token, and nothing after it
    logits = torch.randn(count, MAX_LENGTH, WORDS, generator=rng)
    moved = (logits + 0.4 * torch.randn(logits.shape, generator=rng) for _ in range(2))
    new, old, reference = (x.log_softmax(-1) for x in (logits, *moved))
    rewards = torch.tensor([[0.0, 1.0, 0.25, 0.0], [0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 0.0, 1.0]])
    parts = {
        "tokens": tokens,
        "lengths": lengths,
        "rewards": rewards,
        "new": new,
        "old": old,
        "reference": reference,
    }
    return {name: x.tolist() for name, x in parts.items()}


def trainer(flags: dict, rewards: list[float], folder: str):
    """A GRPOTrainer with these flags of grpo_toy.py on a tiny model, whose answers get these rewards."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = {str(i): i for i in range(WORDS)} | {"<pad>": WORDS}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="1")),
        eos_token="0",
        pad_token="<pad>",
    )
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS + 1, **sizes))
    config = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=GROUPS * GROUP_SIZE,
        gradient_accumulation_steps=1,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_LENGTH,
        importance_sampling_level="token" if flags.get("ratio", "token") == "token" else "sequence",
        loss_type=flags.get("loss_agg", "grpo"),
        scale_rewards=flags.get("scale_rewards", "group"),
        epsilon=flags.get("clip_low", 0.2),
        epsilon_high=flags.get("clip_high", 0.2),
        beta=0.0,
        use_bias_correction_kl=flags.get("kl_estimator") == "k3-corrected",
    )
    made = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["1"] * GROUPS}),
        processing_class=tokenizer,
    )
    made.beta = flags["kl_coef"]  # in GRPOConfig it would make TRL download a reference model
    made.ref_model = torch.nn.Identity()
    made.model.train()
    made.current_gradient_accumulation_steps = 1  # else set by the training loop
    return made


def reference(data: dict, flags: dict) -> dict:
    """TRL's advantages [N] and loss for example() under these flags."""
    tokens = torch.tensor(data["tokens"])
    logps = {
        name: torch.tensor(data[name]).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        for name in ("new", "old", "reference")
    }
    answers = [row[:length] for row, length in zip(data["tokens"], data["lengths"], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(flags, [reward for group in data["rewards"] for reward in group], folder)
        texts = [" ".join(map(str, answer)) for answer in answers]
        made._generate = lambda prompts, *_: (
            [[1]] * len(prompts),
            answers,
            None,
            texts,
            None,
            {},
            None,
            None,
        )
        made._get_per_token_logps_and_entropies = lambda model, *_, **__: (
            logps["reference" if model is made.ref_model else "new"],
            torch.zeros(tokens.shape),
            None,
        )
        inputs = made._generate_and_score_completions([{"prompt": "1"}] * len(answers))
        inputs["old_per_token_logps"] = logps["old"]
        loss = made._compute_loss(made.model, inputs)
    return {"flags": flags, "advantages": inputs["advantages"].tolist(), "loss": loss.item()}


def main() -> None:
    data = example()
    names = ("trl", "transformers", "torch")
    result = {"versions": {name: version(name) for name in names}, "example": data}
    result["cases"] = [reference(data, flags) for flags in CASES]
    EXPECTED.write_text(json.dumps(result) + "\n")
    for case in result["cases"]:
        print(case["loss"], case["flags"], file=sys.stderr)


if __name__ == "__main__":
    main()
