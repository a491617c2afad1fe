"""XGLM as Hugging Face's XGLMForCausalLM names it. Format of the tables: `polyglot_jax.families.gpt_neox`."""

from polyglot_jax import families

MODEL_TYPE = "xglm"
ARCHITECTURE = "XGLMForCausalLM"

FIELDS = (
    ("model.vocab", "vocab_size", 256008, None),
    ("model.layers", "num_layers|num_hidden_layers", 24, None),
    ("model.embed", "d_model|hidden_size", 1024, None),
    ("model.heads", "attention_heads|num_attention_heads", 16, None),
    ("model.mlp", "ffn_dim", 4096, None),
    ("model.context", "max_position_embeddings", 2048, None),
    ("model.embedding_scale", "scale_embedding", True, {True: "sqrt_embed", False: "one"}),
    ("model.activation", "activation_function", "gelu", None),
    ("model.tied", "tie_word_embeddings", True, None),
    ("model.init_std", "init_std", 0.02, None),
    ("data.eos_id", "eos_token_id", 2, "one id"),
)

FIXED = {
    "model.positions": "sinusoidal",
    "model.residual": "sequential",
    "model.attention_bias": True,
    "model.head_bias": False,
    "model.norm_eps": 1e-5,
}

# Row pad_token_id of their table of positions is zeros. Position p is row p + 2, so 0 and 1 change nothing.
REQUIRED = families.REQUIRED | {"pad_token_id": (1, 0, None)}

HARMLESS = (*families.HARMLESS, "activation_dropout", "attention_dropout", "dropout", "layerdrop")

WEIGHTS = (
    ("embed/kernel", "model.embed_tokens.weight", "vocab embed -> vocab embed"),
    ("layers/attention/k/kernel", "model.layers.{}.self_attn.k_proj.weight",
     "(heads head_dim) embed -> embed heads head_dim"),
    ("layers/attention/k/bias", "model.layers.{}.self_attn.k_proj.bias", "(heads head_dim) -> heads head_dim"),
    ("layers/attention/v/kernel", "model.layers.{}.self_attn.v_proj.weight",
     "(heads head_dim) embed -> embed heads head_dim"),
    ("layers/attention/v/bias", "model.layers.{}.self_attn.v_proj.bias", "(heads head_dim) -> heads head_dim"),
    ("layers/attention/q/kernel", "model.layers.{}.self_attn.q_proj.weight",
     "(heads head_dim) embed -> embed heads head_dim"),
    ("layers/attention/q/bias", "model.layers.{}.self_attn.q_proj.bias", "(heads head_dim) -> heads head_dim"),
    ("layers/attention/out/kernel", "model.layers.{}.self_attn.out_proj.weight",
     "embed (heads head_dim) -> heads head_dim embed"),
    ("layers/attention/out/bias", "model.layers.{}.self_attn.out_proj.bias", "embed -> embed"),
    ("layers/attention_norm/scale", "model.layers.{}.self_attn_layer_norm.weight", "embed -> embed"),
    ("layers/attention_norm/bias", "model.layers.{}.self_attn_layer_norm.bias", "embed -> embed"),
    ("layers/mlp/up/kernel", "model.layers.{}.fc1.weight", "mlp embed -> embed mlp"),
    ("layers/mlp/up/bias", "model.layers.{}.fc1.bias", "mlp -> mlp"),
    ("layers/mlp/down/kernel", "model.layers.{}.fc2.weight", "embed mlp -> mlp embed"),
    ("layers/mlp/down/bias", "model.layers.{}.fc2.bias", "embed -> embed"),
    ("layers/mlp_norm/scale", "model.layers.{}.final_layer_norm.weight", "embed -> embed"),
    ("layers/mlp_norm/bias", "model.layers.{}.final_layer_norm.bias", "embed -> embed"),
    ("final_norm/scale", "model.layer_norm.weight", "embed -> embed"),
    ("final_norm/bias", "model.layer_norm.bias", "embed -> embed"),
    ("head/kernel", "lm_head.weight", "vocab embed -> vocab embed"),
)  # fmt: skip

HEAD = "lm_head.weight"

DROPPED = ("model.embed_positions.weights",)
