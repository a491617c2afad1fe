"""Small random models for the tests, as Hugging Face tensors and as trees of ours. Nothing here needs torch."""

import numpy as np

from polyglot_jax import names
from polyglot_jax.checkpoint import flatten, unflatten
from polyglot_jax.config import ModelConfig
from polyglot_jax.tokenizer import Tokenizer, train_tokenizer

KOREAN = (
    "봄이 오면 마을 사람들은 강가에 모여 노래를 부른다.",
    "할머니는 아침마다 김치를 담그고 된장국을 끓이신다.",
    "아이들은 학교에서 돌아오면 고양이와 함께 마당에서 논다.",
    "겨울밤에는 눈이 내리고 사람들은 따뜻한 방에서 옛날이야기를 듣는다.",
    "옛날 옛날에 호랑이 한 마리가 마을 뒷산에 살았다.",
)


def small_tokenizer() -> Tokenizer:
    """A tokenizer of 403 ids, three of them the masks; Korean syllables of one, two and three tokens."""
    return train_tokenizer(KOREAN * 2, vocab_size=400, show_progress=False)


def model_config(**changes) -> ModelConfig:
    """A small architecture: 2 layers, with the vocabulary of `small_tokenizer` padded to 512."""
    return ModelConfig(**{"vocab": 512, "layers": 2, "embed": 64, "heads": 4, "mlp": 96, "context": 128} | changes)


def family_model(family: str, **changes) -> ModelConfig:
    """A small architecture of a family of Hugging Face's."""
    fixed = {field.removeprefix("model."): value for field, value in names.family(family).FIXED.items()}
    return model_config(**fixed | changes)


def random_tensors(model: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """float32 tensors under Hugging Face's names. Biases and LayerNorms are far from 0 and 1, so that they matter."""
    rng = np.random.default_rng(seed)

    def values(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, np.float32)
        if path.endswith("bias"):
            return 0.3 * noise
        if path.endswith("scale"):
            return 1 + 0.3 * noise
        return noise / np.float32(np.sqrt(shape[-1]))

    return {tensor.key: values(tensor.paths[0], tensor.shape) for tensor in names.tensors(model)}


def to_ours(model: ModelConfig, tensors: dict[str, np.ndarray]) -> dict:
    """Hugging Face's tensors -> our tree, layers stacked."""
    leaves: dict[str, list[np.ndarray]] = {}
    for tensor in names.tensors(model):
        for path, array in zip(tensor.paths, tensor.to_ours(tensors[tensor.key]), strict=True):
            leaves.setdefault(path, []).append(array)
    return unflatten({path: np.stack(a) if path.startswith("layers/") else a[0] for path, a in leaves.items()})


def to_theirs(model: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    """Our tree, layers stacked -> Hugging Face's tensors."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    return {
        tensor.key: tensor.to_theirs(
            [leaves[p] if tensor.layer is None else leaves[p][tensor.layer] for p in tensor.paths]
        )
        for tensor in names.tensors(model)
    }


def random_params(model: ModelConfig, seed: int) -> dict:
    return to_ours(model, random_tensors(model, seed))


def off_by(ours, theirs, scale=None) -> float:
    """Largest difference, as a share of the largest value of `scale` (of the reference, if there is none)."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs if scale is None else scale).max())
