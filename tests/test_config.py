"""The configuration and the command line: what is refused says what, where and why; modules keep to their floors."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from runs import random_corpus, text_corpus

from polyglot_jax import __main__ as main
from polyglot_jax.__main__ import VERBS
from polyglot_jax.cli import run
from polyglot_jax.config import PRESETS, Config, InputError, ModelConfig

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "python -m polyglot_jax"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python on `arguments` from the root of the project."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}
    )


# --- JSON ---


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_same_after_json(name):
    config = PRESETS[name]
    text = config.to_json()
    assert Config.from_json(text) == config
    assert Config.from_json(text).to_json() == text


def test_values_other_than_defaults_are_the_same_after_json():
    changes = {
        "model": {"tied": True, "residual": "sequential", "rotary_pct": 0.25},
        "optimizer": {"decay_steps": 7},
        "data": {"paths": ["a", "나"], "weights": [0.25, 3.0], "valid_ids": 500},
        "train": {"seed": 2**31 - 1, "dtype": "float32"},
    }
    config = Config.from_json(json.dumps(changes))
    assert (config.data.paths, config.data.weights) == (("a", "나"), (0.25, 3.0))
    assert (config.model.residual, config.optimizer.decay_steps) == ("sequential", 7)
    assert Config.from_json(config.to_json()) == config


def test_absent_fields_take_their_defaults_and_whole_numbers_are_floats():
    assert Config.from_json("{}") == Config()
    rate = Config.from_json('{"optimizer": {"learning_rate": 1}}').optimizer.learning_rate
    assert rate == 1.0 and type(rate) is float


# (section, field, value) -> the beginning and the reason of the message
BAD_VALUES = [
    ("model", "layer", 3, "model.layer: no such field", "layers"),
    ("model", "layers", "12", "model.layers='12'", "type int"),
    ("model", "layers", 2.0, "model.layers=2.0", "type int"),
    ("model", "layers", True, "model.layers=True", "type int"),
    ("model", "tied", 1, "model.tied=1", "type bool"),
    ("model", "norm_eps", "small", "model.norm_eps='small'", "type float"),
    ("model", "residual", "both", "model.residual='both'", "'parallel', 'parallel_shared', 'sequential'"),
    ("model", "positions", "alibi", "model.positions='alibi'", "'rotary', 'rotary_interleaved', 'learned', 'sinus"),
    ("model", "embedding_scale", 8.0, "model.embedding_scale=8.0", "'one', 'sqrt_embed'"),
    ("model", "attention_bias", 1, "model.attention_bias=1", "type bool"),
    ("model", "head_bias", "yes", "model.head_bias='yes'", "type bool"),
    ("model", "activation", "swish", "model.activation='swish'", "'gelu'"),
    ("data", "paths", "corpus", "data.paths='corpus'", "must be a list"),
    ("data", "paths", ["a", 2], "data.paths[1]=2", "type str"),
    ("data", "valid_ids", "all", "data.valid_ids='all'", "type int"),
    ("train", "dtype", "float64", "train.dtype='float64'", "'bfloat16'"),
    ("train", "remat", None, "train.remat=None", "'dots'"),
    *[
        ("model", name, 0, f"model.{name}=0", "must be above 0")
        for name in ("vocab", "layers", "embed", "heads", "mlp")
    ],
    ("model", "context", -1, "model.context=-1", "must be above 0"),
    ("model", "norm_eps", 0, "model.norm_eps=0.0", "must be above 0"),
    ("model", "init_std", -0.1, "model.init_std=-0.1", "must be above 0"),
    ("model", "heads", 12, "model.heads=12", "does not divide model.embed=2048"),
    ("model", "rotary_pct", 0.0, "model.rotary_pct=0.0", "above 0 and at most 1"),
    ("model", "rotary_pct", 1.5, "model.rotary_pct=1.5", "above 0 and at most 1"),
    ("model", "rotary_pct", 0.01, "model.rotary_pct=0.01", "1 rotary dimensions of a head's 128"),
    ("model", "rotary_pct", 0.4, "model.rotary_pct=0.4", "51 rotary dimensions"),
    ("model", "rotary_base", 1.0, "model.rotary_base=1.0", "must be above 1"),
    ("mesh", "data", 0, "mesh.data=0", "-1 for what is left"),
    ("mesh", "data", -2, "mesh.data=-2", "-1 for what is left"),
    ("mesh", "fsdp", 0, "mesh.fsdp=0", "must be above 0"),
    ("mesh", "tensor", -1, "mesh.tensor=-1", "must be above 0"),
    ("optimizer", "learning_rate", 0, "optimizer.learning_rate=0.0", "must be above 0"),
    ("optimizer", "learning_rate", float("nan"), "optimizer.learning_rate=nan", "must be a finite number"),
    ("optimizer", "eps", 0, "optimizer.eps=0.0", "must be above 0"),
    ("optimizer", "final_learning_rate", -1e-9, "optimizer.final_learning_rate=-1e-09", "must not be negative"),
    ("optimizer", "final_learning_rate", 0.5, "optimizer.final_learning_rate=0.5", "optimizer.learning_rate=0.0002"),
    ("optimizer", "weight_decay", -1.0, "optimizer.weight_decay=-1.0", "must not be negative"),
    ("optimizer", "clip", -1.0, "optimizer.clip=-1.0", "must not be negative"),
    *[("optimizer", name, 1.0, f"optimizer.{name}=1.0", "must be in [0, 1)") for name in ("warmup", "b1", "b2")],
    ("optimizer", "warmup", -0.1, "optimizer.warmup=-0.1", "must be in [0, 1)"),
    ("optimizer", "decay_steps", 0, "optimizer.decay_steps=0", "must be above 0, or none"),
    ("data", "heldout", 1.0, "data.heldout=1.0", "must be in [0, 1)"),
    ("data", "heldout", -0.1, "data.heldout=-0.1", "must be in [0, 1)"),
    ("data", "weights", [1.0], "data.weights=(1.0,)", "1 weights for 0 paths"),
    ("data", "valid_ids", 0, "data.valid_ids=0", "must be above 0"),
    ("data", "valid_ids", 30_081, "data.valid_ids=30081", "above model.vocab=30080"),
    ("data", "eos_id", -1, "data.eos_id=-1", "must not be negative"),
    ("data", "eos_id", 30_080, "data.eos_id=30080", "not below model.vocab=30080"),
    *[
        ("train", name, 0, f"train.{name}=0", "must be above 0")
        for name in ("steps", "batch_size", "sequence_length", "accumulate", "log_every")
    ],
    *[
        ("train", name, -1, f"train.{name}=-1", "must not be negative")
        for name in ("eval_every", "eval_sequences", "checkpoint_every", "keep")
    ],
    ("train", "seed", -1, "train.seed=-1", "must be in [0, 2^31)"),
    ("train", "seed", 2**31, "train.seed=2147483648", "must be in [0, 2^31)"),
    ("train", "accumulate", 3, "train.accumulate=3", "does not divide train.batch_size=1024"),
    ("train", "sequence_length", 2049, "train.sequence_length=2049", "above model.context=2048"),
    ("sample", "max_new_tokens", 0, "sample.max_new_tokens=0", "must be above 0"),
    ("sample", "temperature", -0.5, "sample.temperature=-0.5", "must be 0, or from 1e-6 to 1e6"),
    ("optimizer", "learning_rate", float("inf"), "optimizer.learning_rate=inf", "must be a finite number"),
    ("model", "rotary_base", float("inf"), "model.rotary_base=inf", "must be a finite number"),
    ("data", "heldout", float("nan"), "data.heldout=nan", "must be a finite number"),
    ("sample", "temperature", float("inf"), "sample.temperature=inf", "must be a finite number"),
    ("sample", "top_k", -1, "sample.top_k=-1", "must not be negative"),
    ("sample", "top_p", 0, "sample.top_p=0.0", "above 0 and at most 1"),
    ("sample", "top_p", 1.1, "sample.top_p=1.1", "above 0 and at most 1"),
    ("sample", "seed", 2**31, "sample.seed=2147483648", "must be in [0, 2^31)"),
]


@pytest.mark.parametrize("section, field, value, start, reason", BAD_VALUES)
def test_a_bad_value_is_refused_by_name_value_and_reason(section, field, value, start, reason):
    with pytest.raises(InputError) as caught:
        Config.from_json(json.dumps({section: {field: value}}))
    assert str(caught.value).startswith(start)
    assert reason in str(caught.value)


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -2.0], [1.0, float("inf")], [1.0, float("nan")]])
def test_weights_of_corpora_are_positive_and_finite(weights):
    with pytest.raises(InputError, match=r"^data\.weights=\(1\.0, .*must be above 0$"):
        Config.from_json(json.dumps({"data": {"paths": ["a", "b"], "weights": weights}}))


def test_json_that_is_no_config_is_refused():
    with pytest.raises(InputError, match="config is not JSON"):
        Config.from_json('{"model": ')
    with pytest.raises(InputError, match=r"^config=\[\]: expected an object"):
        Config.from_json("[]")
    with pytest.raises(InputError, match=r"^model=3: expected an object"):
        Config.from_json('{"model": 3}')
    with pytest.raises(InputError, match=r"^modell: no such field; config has data, mesh, model"):
        Config.from_json('{"modell": {}}')


@pytest.mark.parametrize("embed, heads, divides", [(2050, 12, False), (2048, 16, True), (64, 5, False), (8, 16, False)])
def test_heads_must_divide_the_width(embed, heads, divides):
    if divides:
        assert ModelConfig(embed=embed, heads=heads).head_dim * heads == embed
    else:
        with pytest.raises(InputError, match=f"^model.heads={heads}: does not divide model.embed={embed}$"):
            ModelConfig(embed=embed, heads=heads)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_rotary_settings_are_nothing_to_a_model_without(positions):
    ModelConfig(embed=12, heads=4, positions=positions, rotary_pct=0.0, rotary_base=0.5)
    with pytest.raises(InputError, match=r"^model\.rotary_pct=0\.0"):
        ModelConfig(embed=12, heads=4, positions="rotary_interleaved", rotary_pct=0.0)


@pytest.mark.parametrize("embed", [2, 15])
def test_sinusoids_need_an_even_width(embed):
    with pytest.raises(InputError, match=f"^model.embed={embed}: is half sines.* must be even and at least 4$"):
        ModelConfig(embed=embed, heads=1, positions="sinusoidal")
    assert ModelConfig(embed=embed, heads=1, positions="learned").embed == embed


def test_with_tokenizer_takes_what_the_tokenizer_says():
    config = Config(model=ModelConfig(vocab=384))
    told = config.with_tokenizer(303, 5)
    assert (told.data.valid_ids, told.data.eos_id) == (303, 5)
    assert dataclasses.replace(told, data=config.data) == config
    assert config.with_tokenizer(384, 2).data.valid_ids == 384
    assert PRESETS["polyglot-ko-1.3b"].with_tokenizer(30_003, 2) == PRESETS["polyglot-ko-1.3b"]


@pytest.mark.parametrize("vocab, valid_ids, remedy", [(384, 385, 512), (1408, 384, 384), (30_080, 303, 384)])
def test_with_tokenizer_refuses_another_models_tokenizer(vocab, valid_ids, remedy):
    config = Config(model=ModelConfig(vocab=vocab))
    message = rf"^model\.vocab={vocab}: the tokenizer gives {valid_ids} ids; .*--model\.vocab {remedy} "
    with pytest.raises(InputError, match=message):
        config.with_tokenizer(valid_ids, 2)


# --- The command line ---


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, polyglot_jax; print(*sys.modules)"
    modules = {name.partition(".")[0] for name in python("-c", code).stdout.split()}
    assert "polyglot_jax" in modules
    assert not modules & {
        "jax",
        "jaxlib",
        "flax",
        "orbax",
        "grain",
        "numpy",
        "tensorstore",
        "tokenizers",
        "torch",
        "tyro",
    }


def test_train_help_shows_every_field_and_never_imports_jax():
    code = (
        "import sys; from polyglot_jax.__main__ import VERBS; from polyglot_jax.cli import run\n"
        f"try: run(VERBS, {PROGRAM!r}, ['train', '--preset', 'polyglot-ko-3.8b', '--help'])\n"
        "except SystemExit as stop: print('STATUS', stop.code)\n"
        "print('MODULES', *sys.modules)"
    )
    done = python("-c", code)
    text, _, modules = done.stdout.partition("MODULES")
    assert "STATUS 0" in text, done.stderr
    heavy = {"jax", "jaxlib", "flax", "orbax", "grain", "tensorstore", "tokenizers", "torch", "matplotlib", "optax"}
    assert not {name.partition(".")[0] for name in modules.split()} & heavy
    preset = PRESETS["polyglot-ko-3.8b"]
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(preset, section.name)):
            assert f"--{section.name}.{field.name.replace('_', '-')}" in text
    # Types, and the defaults of the preset that is named.
    flat = " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
    assert re.search(r"--model\.layers INT", flat) and "(default: 32)" in flat and "(default: 3072)" in flat
    assert re.search(r"--optimizer\.learning-rate FLOAT", flat) and "(default: 0.0002)" in flat
    assert re.search(r"--train\.remat \{none,dots,products,value,mlp,attention,full\}", flat)
    assert "--out STR" in flat and "--mesh.fsdp INT" in flat


@pytest.fixture
def error(capsys):
    """error(*arguments) -> the message of `python -m polyglot_jax train` that ends with exit status 1."""

    def error(*arguments: object) -> str:
        assert run(VERBS, PROGRAM, ["train", *map(str, arguments)]) == 1
        captured = capsys.readouterr()
        message = captured.err
        assert message.startswith("error: ") and message.count("\n") == 1 and "Traceback" not in captured.out + message
        return message.removeprefix("error: ").rstrip("\n")

    return error


def test_a_missing_or_foreign_corpus_is_an_error_of_one_line(error, tmp_path):
    out = tmp_path / "run"
    assert error("--out", out).startswith("data.paths=(): nothing to train on")
    missing = tmp_path / "none"
    assert error("--out", out, "--data", missing).startswith(f"data.paths={missing}: neither a folder of `prepare` nor")
    assert not out.exists()


def test_a_mesh_that_does_not_fit_is_an_error_of_one_line(error, tmp_path):
    arguments = ("--out", tmp_path / "run", "--data", random_corpus(tmp_path / "corpus"))
    message = error(*arguments, "--mesh.data", 16)
    assert message.startswith("mesh.data=16: needs 16 devices, but 8 are here")
    message = error(*arguments, "--mesh.fsdp", 3)
    assert message.startswith("mesh.fsdp=3: 3 does not divide the 8 devices here; give mesh.data too, or sizes whose ")
    message = error(*arguments, "--mesh.data", 4, "--train.batch-size", 6)
    assert message.startswith("train.batch_size=6: its 1 part(s) of 6 sequences do not divide over mesh.data=4")
    message = error(*arguments, "--mesh.data", 1, "--mesh.tensor", 8, "--model.heads", 4)
    assert message == "mesh.tensor=8: does not divide model.heads=4; 1, 2 or 4 would"
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_vocabulary_is_an_error_of_one_line(error, tmp_path):
    corpus, tokenizer = text_corpus(tmp_path / "corpus")
    message = error("--out", tmp_path / "run", "--data", corpus)
    assert message.startswith(f"model.vocab=30080: the tokenizer gives {tokenizer.valid_ids} ids")
    assert "--model.vocab 384" in message
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_is_missing_or_wrong_is_an_error_of_one_line(error, tmp_path):
    file = tmp_path / "config.json"
    assert error("--out", tmp_path / "run", "--config", file) == f"{file}: no such file"
    file.write_text('{"train": {"stepz": 3}}', encoding="utf-8")
    assert error("--out", tmp_path / "run", "--config", file).startswith(f"{file}: train.stepz: no such field")


def test_an_unknown_verb_prints_the_verbs(capsys):
    assert run(VERBS, PROGRAM, ["fly"]) == 2
    message = capsys.readouterr().err
    assert f"usage: {PROGRAM} VERB" in message and all(verb in message for verb in VERBS)
    assert run(VERBS, PROGRAM, []) == 2
    capsys.readouterr()
    assert run(VERBS, PROGRAM, ["--help"]) == 0
    assert "VERB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--preset", "tiny"], ["--out"]),
        (["--out", "x", "--preset", "huge"], ["huge", "--preset", "polyglot-ko-12.8b"]),
        (["--out", "x", "--train.stepz", "3"], ["--train.stepz"]),
        (["--out", "x", "--train.steps", "many"], ["--train.steps", "many"]),
        (["--out", "x", "--train.batch-size", "0"], ["train.batch_size=0: must be above 0"]),
        (["--out", "x", "--model.heads", "3"], ["model.heads=3: does not divide model.embed=128"]),
    ],
)
def test_bad_flags_exit_with_status_2_and_name_the_flag(arguments, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        run(VERBS, PROGRAM, ["train", *arguments])
    assert stop.value.code == 2
    message = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert all(word in message for word in words), message


def test_the_program_itself_exits_with_status_1_and_no_traceback(tmp_path):
    done = python("-m", "polyglot_jax", "train", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "none"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: data.paths={tmp_path / 'none'}: ")
    assert "Traceback" not in done.stderr


# --- Floors ---

# A room imports only from rooms on lower floors. A package is one room; what lies inside may import each other.
FLOORS = [
    {"config", "families"},
    {"cli", "files", "hardware", "hub", "names", "orbax_noise", "parallel", "preemption", "quantise"}
    | {"manifest", "sampling", "sharding", "token_files", "tokenizer", "torch_files"},
    {"attention", "hosts", "stopping"},
    {"model", "optimizer", "data", "log", "source", "safetensors_files", "store", "two_phases"},
    {"checkpoint", "hf_folder", "steps"},
    {"weights", "program"},
    {"preflight"},
    {"diagnosis", "saver", "generate", "prepare"},
    {"beams", "compile", "report", "scoring"},
    {"train", "language_model"},
    {"convert", "evaluate"},
    {"experiments"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """polyglot_jax.prepare.command -> prepare; convert.hf -> convert; polyglot_jax -> language_model, its door."""
    package, *parts = module.split(".")
    if package != "polyglot_jax":
        return package
    return parts[0] if parts else "language_model"


def imported_rooms(tree: ast.AST) -> set[tuple[str, str]]:
    """(room, name) of every import of ours, wherever in the module it stands; name is "" for a whole module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = (ROOT / whole.replace(".", "/")).is_dir() or (
                    ROOT / f"{whole.replace('.', '/')}.py"
                ).is_file()
                found.add((whole, "") if is_module else (node.module, alias.name))
    ours = ("polyglot_jax", "convert", "experiments")
    return {(room_of(module), name) for module, name in found if module.split(".")[0] in ours}


def modules() -> dict[str, Path]:
    files = [file for folder in ("polyglot_jax", "convert", "experiments") for file in (ROOT / folder).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def test_every_module_has_a_floor():
    rooms = {room_of(module) for module in modules()}
    assert rooms <= set(FLOOR), f"give {rooms - set(FLOOR)} a floor in FLOORS"
    assert {"config", "train", "prepare", "__main__"} <= rooms


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_from_the_floors_below(module):
    room = room_of(module)
    for other, _ in imported_rooms(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if other == room:
            continue
        assert FLOOR[other] < FLOOR[room], f"{module} on floor {FLOOR[room]} imports {other} of floor {FLOOR[other]}"


def test_the_walk_over_imports_sees_every_kind_of_import():
    tree = ast.parse(
        "import os, polyglot_jax.train\n"
        "from polyglot_jax import steps, load\n"
        "from polyglot_jax.prepare.command import prepare\n"
        "def later():\n    from convert.hf import hf_to_orbax\n"
    )
    assert imported_rooms(tree) == {
        ("train", ""), ("steps", ""), ("language_model", "load"), ("prepare", "prepare"), ("convert", "hf_to_orbax"),
    }  # fmt: skip


def test_a_repeated_flag_is_refused_rather_than_half_dropped(capsys):
    assert run(VERBS, "prog", ["train", "--data", "a", "--data=b", "--out", "x"]) == 1
    assert "--data: given 2 times; give several values after one: --data A B" in capsys.readouterr().err


def test_presets_are_named_alike_everywhere_and_carry_the_published_recipes():
    assert typing.get_args(main._PresetName) == tuple(PRESETS)
    recipes = {name: (c.train.batch_size, c.train.steps, c.model.context) for name, c in PRESETS.items()}
    del recipes["tiny"]
    compared = {name: (c.train.sequence_length, c.data.eos_id, c.data.valid_ids) for name, c in PRESETS.items()
                if not name.startswith("polyglot-ko") and recipes.pop(name, None)}  # fmt: skip
    assert compared == {
        "ko-gpt-trinity-1.2b": (1024, 8, None),
        "kogpt-6b": (2048, 1, None),
        "xglm-7.5b": (2048, 2, None),
    }
    assert recipes == {
        "polyglot-ko-1.3b": (1024, 102_000, 2048),
        "polyglot-ko-3.8b": (1024, 105_000, 2048),
        "polyglot-ko-5.8b": (256, 320_000, 2048),
        "polyglot-ko-12.8b": (256, 301_000, 2048),
    }


def test_one_of_preset_and_config(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_bytes(b"\xff")
    assert run(VERBS, "prog", ["train", "--config", str(file), "--out", "x"]) == 1
    assert f"error: {file}: " in capsys.readouterr().err
    assert run(VERBS, "prog", ["train", "--config", str(file), "--preset", "tiny", "--out", "x"]) == 1
    assert "give one of the two" in capsys.readouterr().err
