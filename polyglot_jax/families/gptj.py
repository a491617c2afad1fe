"""GPT-J as Hugging Face's GPTJForCausalLM names it. Format of the tables: `polyglot_jax.families.gpt_neox`."""

from polyglot_jax import families

MODEL_TYPE = "gptj"
ARCHITECTURE = "GPTJForCausalLM"

FIELDS = (
    ("model.vocab", "vocab_size", 50400, None),
    ("model.layers", "n_layer|num_hidden_layers", 28, None),
    ("model.embed", "n_embd|hidden_size", 4096, None),
    ("model.heads", "n_head|num_attention_heads", 16, None),
    ("model.mlp", "n_inner", None, "4 x embed if null"),
    ("model.context", "n_positions|max_position_embeddings", 2048, None),
    ("model.rotary_pct", "rotary_dim", 64, "dims of a head"),
    ("model.activation", "activation_function", "gelu_new", None),
    ("model.tied", "tie_word_embeddings", False, None),
    ("model.norm_eps", "layer_norm_epsilon", 1e-5, None),
    ("model.init_std", "initializer_range", 0.02, None),
    ("data.eos_id", "eos_token_id", 50256, "one id"),
)

FIXED = {
    "model.positions": "rotary_interleaved",
    "model.rotary_base": 10_000.0,
    "model.embedding_scale": "one",
    "model.residual": "parallel_shared",
    "model.attention_bias": False,
    "model.head_bias": True,
}

# The two are of the first configs; today's GPTJForCausalLM has no other form either.
REQUIRED = families.REQUIRED | {"rotary": (True,), "scale_attn_weights": (True,)}

HARMLESS = (
    *families.HARMLESS, "attn_pdrop", "embd_pdrop", "n_ctx", "resid_pdrop", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
)  # fmt: skip

WEIGHTS = (
    ("embed/kernel", "transformer.wte.weight", "vocab embed -> vocab embed"),
    ("layers/attention_norm/scale", "transformer.h.{}.ln_1.weight", "embed -> embed"),
    ("layers/attention_norm/bias", "transformer.h.{}.ln_1.bias", "embed -> embed"),
    ("layers/attention/k/kernel", "transformer.h.{}.attn.k_proj.weight",
     "(heads head_dim) embed -> embed heads head_dim"),
    ("layers/attention/v/kernel", "transformer.h.{}.attn.v_proj.weight",
     "(heads head_dim) embed -> embed heads head_dim"),
    ("layers/attention/q/kernel", "transformer.h.{}.attn.q_proj.weight",
     "(heads head_dim) embed -> embed heads head_dim"),
    ("layers/attention/out/kernel", "transformer.h.{}.attn.out_proj.weight",
     "embed (heads head_dim) -> heads head_dim embed"),
    ("layers/mlp/up/kernel", "transformer.h.{}.mlp.fc_in.weight", "mlp embed -> embed mlp"),
    ("layers/mlp/up/bias", "transformer.h.{}.mlp.fc_in.bias", "mlp -> mlp"),
    ("layers/mlp/down/kernel", "transformer.h.{}.mlp.fc_out.weight", "embed mlp -> mlp embed"),
    ("layers/mlp/down/bias", "transformer.h.{}.mlp.fc_out.bias", "embed -> embed"),
    ("final_norm/scale", "transformer.ln_f.weight", "embed -> embed"),
    ("final_norm/bias", "transformer.ln_f.bias", "embed -> embed"),
    ("head/kernel", "lm_head.weight", "vocab embed -> vocab embed"),
    ("head/bias", "lm_head.bias", "vocab -> vocab"),
)  # fmt: skip

HEAD = "lm_head.weight"

DROPPED = ("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias")
