"""Checkpoints as GPT-NeoX writes them: reference ones, made by its rules from a random model of `transformers`.

They share no code with the program: tensors are named and split by hand. Also what changes one, and what opening it
then says.
"""

import random

import numpy as np
import pytest
import torch
import yaml
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from convert.neox_folder import NeoxFolder
from polyglot_jax import names
from polyglot_jax.config import InputError

LAYERS, HEADS, EMBED, MLP, VOCAB = 2, 4, 32, 64, 512
STEP = 7


def theirs(residual="parallel", tied=False, activation="gelu", seed=0):
    """A random model of transformers, with biases and norms that matter."""
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=EMBED,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        max_position_embeddings=64,
        rotary_pct=0.5,
        use_parallel_residual=residual == "parallel",
        tie_word_embeddings=tied,
        hidden_act=activation,
        attn_implementation="eager",
    )
    model = GPTNeoXForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            parameter.copy_(noise * scale + float("norm" in name and name.endswith("weight")))
    return model


def settings(residual="parallel", tied=False, ranks=1, form="pipeline", **changes):
    """Two files of settings, one spelled with -, one with _."""
    first = {
        "pipe-parallel-size": int(form == "pipeline"),
        "model-parallel-size": ranks,
        "num-layers": LAYERS,
        "hidden-size": EMBED,
        "num-attention-heads": HEADS,
        "seq-length": 64,
        "max-position-embeddings": 64,
        "norm": "layernorm",
        "pos-emb": "rotary",
        "rotary-pct": 0.5,
        "no-weight-tying": not tied,
        "gpt-j-residual": residual == "parallel",
        "output-layer-parallelism": "column",
        "intermediate-size": MLP,
    }
    second = {
        "tokenizer_type": "HFTokenizer",
        "vocab_file": "absent/tokenizer.json",
        "optimizer": {"type": "Adam", "params": {"lr": 0.0002, "betas": [0.9, 0.95]}},
        "fp16": {"enabled": True, "loss_scale": 0},
        "attention_config": [[["global"], LAYERS]],
        "train_iters": 10,
        "model_parallel_size": ranks,
    }
    for key, value in changes.items():
        spelled = key.replace("_", "-")
        first.pop(spelled, None)
        second[key] = value
    return {"model.yml": first, "run.yml": second}


def summands(bias, ranks, generator):
    """Unequal parts that sum to the bias (nearly: in float32)."""
    parts = [torch.randn(bias.shape, generator=generator).to(bias.dtype) for _ in range(ranks - 1)]
    return [*parts, bias - sum(parts)] if parts else [bias]


def reference_layers(model, residual, ranks, legacy, buffers):
    """{number of the layer file: {name: the tensor on each rank}}"""
    state, generator = model.state_dict(), torch.Generator().manual_seed(1)
    up, down = ("dense_h_to_4h", "dense_4h_to_h") if legacy else ("linear1", "linear2")
    layers = {0: {"word_embeddings.weight": state["gpt_neox.embed_in.weight"].chunk(ranks, 0)}}
    for i in range(LAYERS):
        key = f"gpt_neox.layers.{i}."
        layer = layers[i + 2] = {}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            for part in ("weight", "bias"):
                layer[f"{norm}.{part}"] = [state[f"{key}{norm}.{part}"]] * ranks
        for part in ("weight", "bias"):
            layer[f"attention.query_key_value.{part}"] = state[f"{key}attention.query_key_value.{part}"].chunk(ranks, 0)
            layer[f"mlp.{up}.{part}"] = state[f"{key}mlp.dense_h_to_4h.{part}"].chunk(ranks, 0)
        layer["attention.dense.weight"] = state[f"{key}attention.dense.weight"].chunk(ranks, 1)
        layer[f"mlp.{down}.weight"] = state[f"{key}mlp.dense_4h_to_h.weight"].chunk(ranks, 1)
        for name, bias in (
            ("attention.dense.bias", "attention.dense.bias"),
            (f"mlp.{down}.bias", "mlp.dense_4h_to_h.bias"),
        ):
            whole = state[key + bias]
            layer[name] = summands(whole, ranks, generator) if residual == "parallel" else [whole] * ranks
        if buffers:
            layer["attention.rotary_emb.inv_freq"] = [torch.ones(2)] * ranks
    layers[LAYERS + 3] = {
        f"norm.{part}": [state[f"gpt_neox.final_layer_norm.{part}"]] * ranks for part in ("weight", "bias")
    }
    if not model.config.tie_word_embeddings:
        layers[LAYERS + 4] = {"final_linear.weight": state["lm_head.weight"].chunk(ranks, 0)}
    return layers


def run_state(ranks, step=STEP, **more):
    """What GPT-NeoX and DeepSpeed keep in a mp_rank file."""
    return {
        "module": None,
        "optimizer": None,
        "lr_scheduler": {"total_num_steps": 10, "min_lr": 0.0},
        "csr_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": 14,
        "dp_world_size": 1,
        "mp_world_size": ranks,
        "iteration": step,
        "args": {
            "num_layers": LAYERS,
            "hidden_size": EMBED,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 64,
            "make_vocab_size_divisible_by": 128,
            "padded_vocab_size": VOCAB,
            "tokenizer_type": "HFTokenizer",
            "model_parallel_size": ranks,
        },
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    } | more


def reference(
    path, *, model=None, residual="parallel", ranks=1, legacy=False, form="pipeline", buffers=False, **changes
):
    """Write a checkpoint as GPT-NeoX does; returns the folder of its step."""
    model = model or theirs(residual)
    layers = reference_layers(model, residual, ranks, legacy, buffers)
    folder = path / f"global_step{STEP}"
    (folder / "configs").mkdir(parents=True)
    (path / "latest").write_text(f"{folder.name}\n")
    for rank in range(ranks):
        module = {}
        for number, tensors in layers.items():
            state = {name: parts[rank].clone() for name, parts in tensors.items()}
            if form == "pipeline":
                torch.save(state, folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
            else:
                module |= {f"sequential.{number}.{name}": tensor for name, tensor in state.items()}
        torch.save(run_state(ranks, module=module or None), folder / f"mp_rank_{rank:02d}_model_states.pt")
    tied = model.config.tie_word_embeddings
    for name, values in settings(residual, tied, ranks, form, **changes).items():
        # JSON is YAML, and how most of these files are written.
        (folder / "configs" / name).write_text(str(yaml.safe_dump(values, default_flow_style=True)))
    return folder


def layer_file(folder, number, rank=0):
    return folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt"


def rank_file(folder, rank=0):
    return folder / f"mp_rank_{rank:02d}_model_states.pt"


def edit(file, change):
    """Rewrite a .pt after `change` has had what is in it."""
    value = torch.load(file, weights_only=False)
    change(value)
    torch.save(value, file)


def configure(folder, **changes):
    """Change settings in run.yml."""
    file = folder / "configs" / "run.yml"
    values = yaml.safe_load(file.read_text()) | changes
    file.write_text(yaml.safe_dump(values))


def merged(opened):
    """Every tensor, by Hugging Face's key."""
    return {tensor.key: opened.theirs(tensor.key) for tensor in names.tensors(opened.config.model)}


def refused(folder, message, **more):
    """Opening `folder` and reading all of it says `message`."""
    with pytest.raises(InputError) as error:
        merged(NeoxFolder(folder, **more))
    assert message in str(error.value)
