"""GPT-2 as Hugging Face's GPT2LMHeadModel names it. Format of the tables: `polyglot_jax.families.gpt_neox`."""

from polyglot_jax import families

MODEL_TYPE = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"

FIELDS = (
    ("model.vocab", "vocab_size", 50257, None),
    ("model.layers", "n_layer|num_hidden_layers", 12, None),
    ("model.embed", "n_embd|hidden_size", 768, None),
    ("model.heads", "n_head|num_attention_heads", 12, None),
    ("model.mlp", "n_inner", None, "4 x embed if null"),
    ("model.context", "n_positions|max_position_embeddings", 1024, None),
    ("model.activation", "activation_function", "gelu_new", None),
    ("model.tied", "tie_word_embeddings", True, None),
    ("model.norm_eps", "layer_norm_epsilon", 1e-5, None),
    ("model.init_std", "initializer_range", 0.02, None),
    ("data.eos_id", "eos_token_id", 50256, "one id"),
)

FIXED = {
    "model.positions": "learned",
    "model.embedding_scale": "one",
    "model.residual": "sequential",
    "model.attention_bias": True,
    "model.head_bias": False,
}

REQUIRED = families.REQUIRED | {
    "reorder_and_upcast_attn": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
}

# summary_*: of a head that is not the language model's; n_ctx: the size of a mask that old versions stored.
HARMLESS = (
    *families.HARMLESS, "attn_pdrop", "embd_pdrop", "n_ctx", "resid_pdrop", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
)  # fmt: skip

# Their Conv1D keeps matrices as [in, out].
WEIGHTS = (
    ("embed/kernel", "transformer.wte.weight", "vocab embed -> vocab embed"),
    ("positions/kernel", "transformer.wpe.weight", "context embed -> context embed"),
    ("layers/attention_norm/scale", "transformer.h.{}.ln_1.weight", "embed -> embed"),
    ("layers/attention_norm/bias", "transformer.h.{}.ln_1.bias", "embed -> embed"),
    ("layers/attention/q/kernel layers/attention/k/kernel layers/attention/v/kernel",
     "transformer.h.{}.attn.c_attn.weight", "embed (part heads head_dim) -> part embed heads head_dim"),
    ("layers/attention/q/bias layers/attention/k/bias layers/attention/v/bias",
     "transformer.h.{}.attn.c_attn.bias", "(part heads head_dim) -> part heads head_dim"),
    ("layers/attention/out/kernel", "transformer.h.{}.attn.c_proj.weight",
     "(heads head_dim) embed -> heads head_dim embed"),
    ("layers/attention/out/bias", "transformer.h.{}.attn.c_proj.bias", "embed -> embed"),
    ("layers/mlp_norm/scale", "transformer.h.{}.ln_2.weight", "embed -> embed"),
    ("layers/mlp_norm/bias", "transformer.h.{}.ln_2.bias", "embed -> embed"),
    ("layers/mlp/up/kernel", "transformer.h.{}.mlp.c_fc.weight", "embed mlp -> embed mlp"),
    ("layers/mlp/up/bias", "transformer.h.{}.mlp.c_fc.bias", "mlp -> mlp"),
    ("layers/mlp/down/kernel", "transformer.h.{}.mlp.c_proj.weight", "mlp embed -> mlp embed"),
    ("layers/mlp/down/bias", "transformer.h.{}.mlp.c_proj.bias", "embed -> embed"),
    ("final_norm/scale", "transformer.ln_f.weight", "embed -> embed"),
    ("final_norm/bias", "transformer.ln_f.bias", "embed -> embed"),
    ("head/kernel", "lm_head.weight", "vocab embed -> vocab embed"),
)  # fmt: skip

HEAD = "lm_head.weight"

DROPPED = ("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias")
