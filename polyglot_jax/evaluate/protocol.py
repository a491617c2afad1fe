"""From documents to pairs of token ids, by the letter of one of two protocols.

branch   lm-evaluation-harness, branch polyglot (2022), which made the published tables: test documents are shuffled by
         Random(42), and the same Random then draws the examples of each, in that order; context and continuation are
         encoded apart.
harness  lm-evaluation-harness 0.4: documents in order, examples drawn by Random(1234); spaces at the context's end
         belong to the continuation, and the two are encoded together and cut where the context alone ends. What the
         tokenizer puts before a text, as XGLM's puts </s>, stands there; under branch nothing does.

Each task begins with a Random of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from polyglot_jax.config import InputError
from polyglot_jax.evaluate.tasks import Protocol, Row, Task
from polyglot_jax.scoring import Pair
from polyglot_jax.tokenizer import Tokenizer

SEEDS: dict[Protocol, int] = {"branch": 42, "harness": 1234}


class Prompt(NamedTuple):
    """A test document as it is scored. Each continuation begins with a space; gold is the number of the right one."""

    context: str
    continuations: tuple[str, ...]
    gold: int


def make_prompts(
    task: Task, tests: Sequence[Row], train: Sequence[Row], shots: int, protocol: Protocol
) -> list[Prompt]:
    """The prompts of `tests`, in their order, each with `shots` examples drawn from `train`."""
    if shots > len(train):
        raise InputError(
            f"shots={shots}: there are only {len(train)} training documents of {task.folder}; ask for fewer"
        )
    generator = random.Random(SEEDS[protocol])
    order = list(range(len(tests)))
    if protocol == "branch":
        generator.shuffle(order)
    solved = [f"{task.text(row, protocol)} {task.choices(row)[row['label']]}\n\n" for row in train] if shots else []
    examples = {at: "".join(generator.sample(solved, shots)) for at in order}
    return [
        Prompt(
            examples[at] + task.text(row, protocol), tuple(f" {choice}" for choice in task.choices(row)), row["label"]
        )
        for at, row in enumerate(tests)
    ]


def encode(prompts: Sequence[Prompt], tokenizer: Tokenizer, protocol: Protocol) -> list[list[Pair]]:
    """Token ids of every prompt's context with each of its continuations."""
    is_joint = protocol == "harness"
    contexts = [prompt.context for prompt in prompts]
    texts = [text for prompt in prompts for text in prompt.continuations]
    if is_joint:
        texts = [prompt.context + text for prompt in prompts for text in prompt.continuations]
        contexts = [context.rstrip() for context in contexts]
    before, after = tokenizer.encode_batch(contexts, is_joint), iter(tokenizer.encode_batch(texts, is_joint))
    pairs = []
    for prompt, context in zip(prompts, before, strict=True):
        cut = len(context) if is_joint else 0
        pairs.append([Pair(context, next(after)[cut:]) for _ in prompt.continuations])
    return pairs
