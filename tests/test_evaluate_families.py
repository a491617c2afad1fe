"""GPT-2, GPT-J and XGLM through `evaluate`, with tokenizers of their kinds, against transformers on the same files."""

import importlib.util
import json

import kobest
import numpy as np
import pytest
import torch
from models import KOREAN
from tokenizers import Tokenizer as Library
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTJConfig,
    PreTrainedTokenizerFast,
    XGLMConfig,
)

from convert.__main__ import VERBS as CONVERT
from experiments import kobest_three_ways, record
from polyglot_jax.__main__ import VERBS
from polyglot_jax.cli import run
from polyglot_jax.evaluate import data, published
from polyglot_jax.evaluate.protocol import make_prompts
from polyglot_jax.evaluate.tasks import TASKS
from polyglot_jax.names import config_from_theirs

NAME = "kobest_copa"


def byte_level(specials, eos):
    """As GPT-2's: BPE over bytes. `eos` is one of the special tokens, at the front of the vocabulary."""
    library = Library(tokenizer_models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    library.train_from_iterator(KOREAN * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=library, eos_token=eos)


def sentencepiece():
    """As XGLM's: a unigram model over text in NFKC with ▁ for spaces, </s> before each text, words nobody has at the
    end of the vocabulary."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    library = Library(tokenizer_models.Unigram())
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=specials, unk_token="<unk>", show_progress=False)
    library.train_from_iterator(KOREAN * 2, trainer)
    library.add_tokens([f"<madeupword{number}>" for number in range(7)])
    library.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                   unk_token="<unk>")  # fmt: skip


def folder_of(family, path):
    """A random model and a tokenizer of the family in `path`, as transformers writes them."""
    torch.manual_seed(7)
    if family == "gpt2":  # as ko-gpt-trinity: 1,024 positions, and the end of text is number 8
        tokenizer = byte_level([f"<unused{n}>" for n in range(8)] + ["</s>"], "</s>")
        config = GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_embd=48, n_head=3, n_positions=1024,
                            bos_token_id=0, eos_token_id=8)  # fmt: skip
    elif family == "gptj":
        tokenizer = byte_level(["[BOS]", "[EOS]", "[UNK]", "[PAD]", "[MASK]"], "[EOS]")
        config = GPTJConfig(vocab_size=len(tokenizer), n_layer=1, n_embd=48, n_head=3, n_positions=96, rotary_dim=8,
                            bos_token_id=0, eos_token_id=1)  # fmt: skip
    else:
        tokenizer = sentencepiece()
        config = XGLMConfig(vocab_size=len(tokenizer), num_layers=1, d_model=48, attention_heads=3, ffn_dim=96,
                            max_position_embeddings=96)  # fmt: skip
    AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """KoBEST in small; COPA's contexts are long for 96 tokens, some of them, and with examples for 1,024."""
    folder = kobest.write(tmp_path_factory.mktemp("kobest"))
    header, _ = kobest.ROWS["COPA"]
    repeats = (1, 30, 30, 1, 30)
    rows = [[f"{n}", f"{text} " * repeats[n], "원인", KOREAN[n - 1], KOREAN[n - 2], "1"]
            for n, text in enumerate(KOREAN)]  # fmt: skip
    for split in ("train", "test"):
        lines = ("\t".join(row) + "\r\n" for row in (header, *rows))
        (folder / "COPA" / f"{split}.tsv").write_bytes("".join(lines).encode())
    return folder


def log_probability(model, context, continuation):
    """By transformers: of the last tokens, after as many as the model reads."""
    ids = [*context, *continuation][-(model.config.max_position_embeddings + 1) :]
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([ids[:-1]])).logits[0].double(), -1)
    return float(sum(logs[at - 1, ids[at]] for at in range(len(ids) - len(continuation), len(ids))))


@pytest.mark.parametrize(
    ("family", "protocol"), [("gpt2", "branch"), ("gptj", "branch"), ("xglm", "branch"), ("xglm", "harness")]
)
def test_every_document_scores_what_transformers_gives_it(family, protocol, files, tmp_path):
    path, out = folder_of(family, tmp_path / family), tmp_path / "out.json"
    (tmp_path / "text.txt").write_text(KOREAN[0], encoding="utf-8")
    arguments = ["--checkpoint", path, "--data", files, "--tasks", NAME, "--shots", "0,2", "--protocol",
                 protocol, "--text", tmp_path / "text.txt", "--out", out, "--mesh.data", "1"]  # fmt: skip
    assert run(VERBS, "python -m polyglot_jax", ["evaluate", *map(str, arguments)]) == 0
    made = json.loads(out.read_text(encoding="utf-8"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    most, cut = model.config.max_position_embeddings, {}
    tests, train = (data.read(str(files), NAME, split) for split in ("test", "train"))
    for shots in (0, 2):
        cut[shots] = 0
        prompts = make_prompts(TASKS[NAME], tests, train, shots, protocol)
        for prompt, document in zip(prompts, made["documents"][NAME][str(shots)], strict=True):
            expected, longest = [], 0
            for text in prompt.continuations:
                if protocol == "branch":
                    context = tokenizer.encode(prompt.context, add_special_tokens=False)
                    after = tokenizer.encode(text, add_special_tokens=False)
                else:  # the harness leaves it to the tokenizer what stands before a text
                    context = tokenizer.encode(prompt.context.rstrip())
                    after = tokenizer.encode(prompt.context + text)[len(context) :]
                    assert context[0] == tokenizer.eos_token_id  # XGLM's does
                expected.append(log_probability(model, context, after))
                longest = max(longest, len(context) + len(after))
            np.testing.assert_allclose(document["scores"], expected, atol=2e-4)
            cut[shots] += longest > most + 1
        assert made["results"][NAME][str(shots)]["truncated"] == cut[shots]
    assert cut[2] > 0 and cut[0] == (0 if family == "gpt2" else 3)
    # A text begins with the model's own end of text.
    nats = -log_probability(model, [tokenizer.eos_token_id], tokenizer.encode(KOREAN[0], add_special_tokens=False))
    assert made["text"][str(tmp_path / "text.txt")]["nats"] == pytest.approx(nats, rel=1e-5)


COMPARED = {
    "ko-gpt-trinity-1.2b": {
        "model_type": "gpt2", "n_layer": 24, "n_embd": 1920, "n_head": 16, "n_inner": 7680, "vocab_size": 51_200,
        "n_ctx": 1024, "n_positions": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "bos_token_id": 0, "eos_token_id": 8, "pad_token_id": 8,
    },
    "kogpt-6b": {
        "model_type": "gptj", "n_layer": 28, "n_embd": 4096, "n_head": 16, "n_inner": None, "n_positions": 2048,
        "rotary_dim": 64, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "vocab_size": 64_512,
        "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    },
    "xglm-7.5b": {
        "model_type": "xglm", "num_layers": 32, "d_model": 4096, "attention_heads": 32, "ffn_dim": 16_384,
        "vocab_size": 256_008, "max_position_embeddings": 2048, "activation_function": "gelu", "scale_embedding": True,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_a_compared_models_own_config_finds_its_rows_of_the_table(name):
    config = config_from_theirs(COMPARED[name])
    assert published.name_of(config.model) == name
    assert config.data.eos_id == COMPARED[name]["eos_token_id"]
    for task in TASKS:
        assert [published.value(name, task, shots, "macro_f1_norm") for shots in published.SHOTS] == (
            list(published.REVISED[name][task]) if task == "kobest_hellaswag" else [None] * 4
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gptj", "xglm"])
def test_the_harness_agrees(family, shared, tmp_path, monkeypatch):
    """The three ways for a family's checkpoint, exported: real documents, what the tokenizer puts before each."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("no lm_eval: pip install -r requirements-harness.txt")
    monkeypatch.setattr(record, "FOLDER", tmp_path / "records")
    orbax = tmp_path / "orbax"
    assert run(CONVERT, "python -m convert", ["hf-to-orbax", str(folder_of(family, tmp_path / "hf")), str(orbax)]) == 0
    kobest_three_ways.main(
        kobest_three_ways.ThreeWays(data=str(shared / "data" / "kobest"), checkpoint=str(orbax), shots=(2,),
                                    documents=5, out=str(tmp_path / "ways"))
    )  # fmt: skip
    made = json.loads((tmp_path / "records" / "kobest_three_ways.json").read_text(encoding="utf-8"))
    assert made["different"] == []
    for task in TASKS:
        assert made["cells"][task]["2"]["largest_difference"] < 1e-3
