"""GPT-NeoX's settings: what a run's .yml files say is taken as it is meant, or refused by name."""

import shutil

import pytest
import yaml
from neox_checkpoints import EMBED, HEADS, LAYERS, MLP, VOCAB, configure, rank_file, reference, refused, theirs

from convert.__main__ import VERBS
from convert.neox_config import vocab_divisor
from convert.neox_folder import NeoxFolder
from polyglot_jax.checkpoint import Checkpoint
from polyglot_jax.cli import run


def test_defaults_are_those_of_gpt_neox(tmp_path):
    folder = reference(tmp_path, residual="sequential", model=theirs("sequential", tied=True))
    (folder / "configs" / "model.yml").write_text("pos_emb: rotary\nrotary_pct: 1.0\nlayernorm-epsilon: 1e-6\n")
    model = NeoxFolder(folder).config.model
    assert (model.residual, model.tied, model.activation) == ("sequential", True, "gelu")
    assert (model.rotary_pct, model.rotary_base, model.norm_eps, model.init_std) == (1.0, 10000.0, 1e-6, 0.02)
    # From the tensors and from mp_rank's args.
    assert (model.layers, model.embed, model.mlp, model.vocab, model.heads) == (LAYERS, EMBED, MLP, VOCAB, HEADS)


def test_settings_given_with_config(tmp_path, capsys):
    folder = reference(tmp_path / "save")
    files = [shutil.move(folder / "configs" / name, tmp_path / name) for name in ("model.yml", "run.yml")]
    refused(folder, "pos_emb='learned': this model is implemented for 'rotary' only; no file sets pos_emb")
    arguments = ["neox-to-orbax", str(folder), str(tmp_path / "ours"), "--config", *map(str, files)]
    assert run(VERBS, "prog", arguments) == 0
    assert Checkpoint(tmp_path / "ours").config.model.heads == HEADS
    for rank in folder.glob("mp_rank*"):
        rank.unlink()
    files[0].write_text("pos_emb: rotary\nno_weight_tying: true\n")
    refused(folder, "num_attention_heads is in no .yml", config_files=files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, "hidden_size=48"),
        ({"num_layers": 3}, "num_layers=3"),
        ({"intermediate_size": 128}, "intermediate_size=128, but "),
        ({"padded_vocab_size": 1024}, "padded_vocab_size=1024"),
        ({"model_parallel_size": 4}, "model_parallel_size=4"),
        ({"num_attention_heads": 8}, "num_attention_heads=8"),
    ],
)
def test_settings_that_contradict_the_checkpoint_are_refused(tmp_path, changes, message):
    folder = reference(tmp_path, **changes)
    refused(folder, message)


def test_sizes_are_held_against_the_tensors(tmp_path):
    folder = reference(tmp_path, num_layers=3)
    rank_file(folder).unlink()
    refused(folder, f"{folder / 'configs' / 'run.yml'}: num_layers=3, but {folder} has 2: these are not its settings")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "rmsnorm"}, "norm='rmsnorm': this model is implemented for 'layernorm' only"),
        ({"pos_emb": "alibi"}, "pos_emb='alibi': this model is implemented for 'rotary' only"),
        ({"gpt_j_tied": True}, "gpt_j_tied=True: this model"),
        ({"mlp_type": "llama"}, "mlp_type='llama': this model"),
        ({"use_bias_in_mlp": False}, "use_bias_in_mlp=False: this model"),
        ({"use_bias_in_norms": False}, "use_bias_in_norms=False: this model"),
        ({"num_kv_heads": 1}, "num_kv_heads=1: this model is implemented for num_attention_heads only, 4 here"),
        ({"num_unique_layers": 1}, "num_unique_layers=1: this model"),
        ({"use_qk_layernorm": True}, "use_qk_layernorm=True: this model"),
        ({"sliding_window_width": 32}, "sliding_window_width=32: this model"),
        ({"attention_config": [[["global", "sparse_fixed"], "all"]]}, "attention_config has 'sparse_fixed'"),
        (
            {"attention_config": [[["mamba"], 2]]},
            "attention_config has 'mamba': this model is implemented for global and",
        ),
        ({"soft_prompt_tuning": {"enabled": True}}, "soft_prompt_tuning=True: this model"),
        ({"moe_num_experts": 8}, "moe_num_experts=8: this model"),
        ({"use_mup": True}, "use_mup=True: this model"),
        ({"te_layernorm_mlp": True}, "te_layernorm_mlp=True: this model"),
        ({"activation": "swiglu"}, "activation='swiglu': this model has gelu, relu"),
        ({"gpt_j_residual": "yes"}, "gpt_j_residual='yes': must be true or false"),
        ({"gpt_j_residual": [[]]}, "gpt_j_residual=[[]]: must be true or false"),
        ({"no_weight_tying": False}, "final_linear.weight is there, but no_weight_tying is false or in no .yml"),
        ({"rotary_pct": 0.1}, "model.rotary_pct=0.1: gives 0 rotary dimensions of a head's 8"),
        ({"rotary_pct": "half"}, "model.rotary_pct='half': must be of type float"),
    ],
)
def test_other_models_are_refused(tmp_path, changes, message):
    folder = reference(tmp_path)
    configure(folder, **changes)
    model = yaml.safe_load((folder / "configs" / "model.yml").read_text())
    kept = {key: value for key, value in model.items() if key.replace("-", "_") not in changes}
    (folder / "configs" / "model.yml").write_text(yaml.safe_dump(kept))
    refused(folder, message)
    refused(folder, str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": HEADS},
        {"num_unique_layers": LAYERS},
        {"attention_config": [[["flash"], "all"]]},
        {"soft_prompt_tuning": {"enabled": False}},
        {"layernorm_epsilon": "1e-5"},
        {"mlp_type": "regular"},
    ],
)
def test_other_spellings_of_this_model_are_taken(tmp_path, changes):
    folder = reference(tmp_path)
    before = NeoxFolder(folder).config
    configure(folder, **changes)
    assert NeoxFolder(folder).config == before


def test_contradicting_files_are_refused(tmp_path):
    folder = reference(tmp_path)
    configure(folder, rotary_pct=0.25)
    configs = folder / "configs"
    refused(folder, f"{configs / 'run.yml'}: rotary_pct=0.25 contradicts rotary_pct=0.5 in {configs / 'model.yml'}")


@pytest.mark.parametrize(
    "text", ["{", "- 1\n", "", "a: &a [*a, {", "!!python/object/apply:os.system ['touch ran']", "\x00"]
)
def test_what_is_no_settings_file_is_refused(tmp_path, text):
    folder = reference(tmp_path)
    (folder / "configs" / "run.yml").write_text(text)
    refused(folder, "run.yml: not a config of GPT-NeoX: ")


@pytest.mark.parametrize(
    ("vocab", "ids", "ranks"),
    [
        (30080, 30003, 1),
        (30080, 30003, 2),
        (30208, 30003, 2),
        (30080, 30080, 4),
        (30005, 30005, 1),
        (30008, 30003, 4),
        (50432, 50257, 8),
        (512, 403, 4),
    ],
)
def test_the_vocabulary_is_padded_as_gpt_neox_pads_it(vocab, ids, ranks):
    multiple, padded = vocab_divisor(vocab, ids, ranks) * ranks, ids
    while padded % multiple:
        padded += 1
    assert padded == vocab
