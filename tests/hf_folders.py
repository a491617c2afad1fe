"""A Hugging Face folder as Polyglot-Ko's are, written and read without the converters; and what changes one."""

import json
from collections.abc import Callable
from pathlib import Path

from models import model_config, random_tensors
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

MODEL = model_config(vocab=512, embed=48, heads=3, mlp=80, context=64)
# What Polyglot-Ko's own config.json say besides the sizes.
PLAIN = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "classifier_dropout": 0.1,
    "hidden_act": "gelu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 64,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "num_steps": "global_step320000",
    "rotary_emb_base": 10000,
    "rotary_pct": 0.5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.29.2",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 512,
}


def make(path: Path) -> Path:
    """A folder of a random float32 model: config.json as Polyglot-Ko's, one file of tensors."""
    path.mkdir()
    configure(path)
    save_file(random_tensors(MODEL, seed=2), path / "model.safetensors")
    return path


def configure(path: Path, without: tuple[str, ...] = (), **changes: object) -> None:
    """Write config.json: PLAIN without some settings and with others changed."""
    config = {key: value for key, value in PLAIN.items() if key not in without} | changes
    (path / "config.json").write_text(json.dumps(config))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrite the file of tensors after `change` has had them."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def raw(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Key -> (dtype, shape, bytes) over all safetensors of a folder, read without our code."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                array = opened.get_tensor(key)
                assert key not in tensors
                tensors[key] = (str(array.dtype), array.shape, array.tobytes())
    return tensors
