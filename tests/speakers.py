"""Models for the tests of generation: random ones, also as transformers', and some whose words are known."""

import copy
import functools
from pathlib import Path

import jax
import numpy as np
import torch
from models import model_config, random_params, small_tokenizer
from parity import transformers_model
from transformers import GPTNeoXConfig, PreTrainedModel

import polyglot_jax
from polyglot_jax.checkpoint import flatten, unflatten
from polyglot_jax.config import Config, DataConfig, ModelConfig, SampleConfig, TrainConfig
from polyglot_jax.language_model import LanguageModel
from polyglot_jax.model import split_layers

EOS = 2
VALID = 403


def config_of(model: ModelConfig, **sample: object) -> Config:
    return Config(
        model=model,
        data=DataConfig(valid_ids=VALID, eos_id=EOS),
        train=TrainConfig(sequence_length=min(model.context, 2048)),
        sample=SampleConfig(**sample),
    )


@functools.cache
def tokenizer():
    return small_tokenizer()


def pair(path: Path, seed: int = 11, **changes: object) -> tuple[PreTrainedModel, LanguageModel]:
    """A random model of transformers', and ours of the same weights, loaded from its folder, which `path` becomes."""
    theirs = {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "rotary_pct": 0.5,
    }
    model, _, _ = transformers_model(GPTNeoXConfig(**theirs | changes), seed=seed)
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer().to_json(), encoding="utf-8")
    return model, polyglot_jax.load(path)


@functools.cache
def _silent() -> LanguageModel:
    model = model_config(layers=1, embed=512, heads=1, mlp=8, context=128)
    params = jax.tree.map(np.zeros_like, random_params(model, seed=0))
    return LanguageModel(config_of(model), split_layers(params), tokenizer())


def _changed(**leaves: np.ndarray) -> LanguageModel:
    """A model of one layer, all of whose weights are 0 but for these; what is compiled is shared."""
    lm = copy.copy(_silent())
    lm.params = unflatten(flatten(lm.params) | {name.replace("__", "/"): leaf for name, leaf in leaves.items()})
    return lm


def constant(logits: np.ndarray) -> LanguageModel:
    """A model with these logits, whatever it reads."""
    head = np.zeros((512, 512), np.float32)
    head[:, 0] = logits
    return _changed(final_norm__bias=np.eye(512, dtype=np.float32)[0], head__kernel=head)


def script(ids: list[int]) -> LanguageModel:
    """A model that, after a token of `ids`, makes the next one. No token may come twice."""
    assert len(set(ids)) == len(ids)
    head = np.zeros((512, 512), np.float32)
    head[ids[1:], ids[:-1]] = 1
    ones = np.ones(512, np.float32)
    return _changed(embed__kernel=np.diag(ones), final_norm__scale=ones, head__kernel=head)


@functools.cache
def pieces() -> tuple[str, list[int], str]:
    """A prompt, ids, and the text of those after the prompt; none comes twice, some are bytes of a character."""
    prompt, text = "리", "마을 사람들은 강가에 깡🙂a 옛날 오면"
    ids = tokenizer().encode(prompt) + tokenizer().encode(text)
    assert tokenizer().decode(ids) == prompt + text
    parts = [tokenizer().decode([i]) for i in ids]
    assert parts.count("\ufffd") > 5
    assert " 사람들은" in parts
    return prompt, ids, text


def tokens_of(lm: LanguageModel, prompts: list[list[int]], eos: int | None = EOS, samples: int = 1, first: int = 0,
              **sample: object) -> list[list[int]]:  # fmt: skip
    """The tokens that `generate` would turn into text."""
    with lm._on_mesh():
        ends = [] if eos is None else [eos]
        (made,) = lm._generator.run(lm.params, prompts, SampleConfig(**sample), ends, samples, first)
    return [row.ids for row in made]


def their_tokens(
    model: PreTrainedModel, prompts: list[list[int]], eos: int, count: int, **settings: object
) -> list[list[int]]:
    """The tokens that transformers makes greedily after each prompt, alone; ids of padding are never made."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
            suppress_tokens=list(range(VALID, 512)),
            **settings,
        )
        rows.append(made[0, len(prompt) :].tolist())
    return rows
