"""GPT-NeoX as Hugging Face's GPTNeoXForCausalLM names it. Format of the tables: here, read by `polyglot_jax.names`."""

from polyglot_jax import families

MODEL_TYPE = "gpt_neox"
ARCHITECTURE = "GPTNeoXForCausalLM"

# our field | their key (alternatives, first is written) | their default when absent | None: as it is; a dict: their
# value -> ours; a string: one of names.CONVERSIONS
FIELDS = (
    ("model.vocab", "vocab_size", 50432, None),
    ("model.layers", "num_hidden_layers", 44, None),
    ("model.embed", "hidden_size", 6144, None),
    ("model.heads", "num_attention_heads", 64, None),
    ("model.mlp", "intermediate_size", 24576, None),
    ("model.context", "max_position_embeddings", 2048, None),
    ("model.rotary_pct", "rotary_pct|rope_parameters.partial_rotary_factor", 0.25, None),
    ("model.rotary_base", "rotary_emb_base|rope_parameters.rope_theta", 10000, None),
    ("model.residual", "use_parallel_residual", True, {True: "parallel", False: "sequential"}),
    ("model.attention_bias", "attention_bias", True, None),
    ("model.activation", "hidden_act", "gelu", None),
    ("model.tied", "tie_word_embeddings", False, None),
    ("model.norm_eps", "layer_norm_eps", 1e-5, None),
    ("model.init_std", "initializer_range", 0.02, None),
    ("data.eos_id", "eos_token_id", 2, "one id"),
)

# Fields of ours that this architecture has one value for, and that its configs do not mention.
FIXED = {"model.positions": "rotary", "model.embedding_scale": "one", "model.head_bias": False}

# Settings the model has no other form of: the values it is implemented for, or absent. Never written.
REQUIRED = families.REQUIRED | {"rope_parameters.rope_type": ("default",), "rope_scaling": (None,)}

# Settings that change nothing the model computes (dropouts: nothing outside training, and training here has none).
HARMLESS = (*families.HARMLESS, "attention_dropout", "classifier_dropout", "hidden_dropout")

# our path | their key, {} = layer | their axes -> ours, "part" first where one tensor of theirs holds several of ours
WEIGHTS = (
    ("embed/kernel", "gpt_neox.embed_in.weight", "vocab embed -> vocab embed"),
    ("layers/attention_norm/scale", "gpt_neox.layers.{}.input_layernorm.weight", "embed -> embed"),
    ("layers/attention_norm/bias", "gpt_neox.layers.{}.input_layernorm.bias", "embed -> embed"),
    ("layers/mlp_norm/scale", "gpt_neox.layers.{}.post_attention_layernorm.weight", "embed -> embed"),
    ("layers/mlp_norm/bias", "gpt_neox.layers.{}.post_attention_layernorm.bias", "embed -> embed"),
    ("layers/attention/q/kernel layers/attention/k/kernel layers/attention/v/kernel",
     "gpt_neox.layers.{}.attention.query_key_value.weight", "(heads part head_dim) embed -> part embed heads head_dim"),
    ("layers/attention/q/bias layers/attention/k/bias layers/attention/v/bias",
     "gpt_neox.layers.{}.attention.query_key_value.bias", "(heads part head_dim) -> part heads head_dim"),
    ("layers/attention/out/kernel", "gpt_neox.layers.{}.attention.dense.weight",
     "embed (heads head_dim) -> heads head_dim embed"),
    ("layers/attention/out/bias", "gpt_neox.layers.{}.attention.dense.bias", "embed -> embed"),
    ("layers/mlp/up/kernel", "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", "mlp embed -> embed mlp"),
    ("layers/mlp/up/bias", "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias", "mlp -> mlp"),
    ("layers/mlp/down/kernel", "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", "embed mlp -> mlp embed"),
    ("layers/mlp/down/bias", "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias", "embed -> embed"),
    ("final_norm/scale", "gpt_neox.final_layer_norm.weight", "embed -> embed"),
    ("final_norm/bias", "gpt_neox.final_layer_norm.bias", "embed -> embed"),
    ("head/kernel", "embed_out.weight", "vocab embed -> vocab embed"),
)  # fmt: skip

# Left out of a file when model.tied.
HEAD = "embed_out.weight"

# Buffers of older revisions: computed, not learned.
DROPPED = (
    "gpt_neox.layers.{}.attention.bias",
    "gpt_neox.layers.{}.attention.masked_bias",
    "gpt_neox.layers.{}.attention.rotary_emb.inv_freq",
)

# What follows is GPT-NeoX's own format, read by convert/neox_folder.py and written by convert/neox_export.py.

# Hugging Face key, {} = layer | number of their layer file | their names (alternatives: current first, then legacy)
# | what merges tensor-parallel ranks: rows and columns are concatenated; copies are the same on each rank; sums too
# where the residual is sequential, else each rank holds a summand
NEOX_WEIGHTS = (
    ("gpt_neox.embed_in.weight", "0", "word_embeddings.weight", "rows"),
    ("gpt_neox.layers.{}.input_layernorm.weight", "layer + 2", "input_layernorm.weight", "copy"),
    ("gpt_neox.layers.{}.input_layernorm.bias", "layer + 2", "input_layernorm.bias", "copy"),
    ("gpt_neox.layers.{}.post_attention_layernorm.weight", "layer + 2", "post_attention_layernorm.weight", "copy"),
    ("gpt_neox.layers.{}.post_attention_layernorm.bias", "layer + 2", "post_attention_layernorm.bias", "copy"),
    ("gpt_neox.layers.{}.attention.query_key_value.weight", "layer + 2", "attention.query_key_value.weight", "rows"),
    ("gpt_neox.layers.{}.attention.query_key_value.bias", "layer + 2", "attention.query_key_value.bias", "rows"),
    ("gpt_neox.layers.{}.attention.dense.weight", "layer + 2", "attention.dense.weight", "columns"),
    ("gpt_neox.layers.{}.attention.dense.bias", "layer + 2", "attention.dense.bias", "sum"),
    ("gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", "layer + 2", "mlp.linear1.weight|mlp.dense_h_to_4h.weight", "rows"),
    ("gpt_neox.layers.{}.mlp.dense_h_to_4h.bias", "layer + 2", "mlp.linear1.bias|mlp.dense_h_to_4h.bias", "rows"),
    ("gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", "layer + 2", "mlp.linear2.weight|mlp.dense_4h_to_h.weight",
     "columns"),
    ("gpt_neox.layers.{}.mlp.dense_4h_to_h.bias", "layer + 2", "mlp.linear2.bias|mlp.dense_4h_to_h.bias", "sum"),
    ("gpt_neox.final_layer_norm.weight", "layers + 3", "norm.weight", "copy"),
    ("gpt_neox.final_layer_norm.bias", "layers + 3", "norm.bias", "copy"),
    # Older runs could split the head's input instead (output_layer_parallelism: row).
    ("embed_out.weight", "layers + 4", "final_linear.weight", "rows|columns"),
)  # fmt: skip

# A buffer that GPT-NeoX of the legacy names wants to find in a layer.
NEOX_LEGACY_BUFFER = "attention.rotary_emb.inv_freq"

# Parts of names that only layers of NVIDIA's Transformer Engine have.
NEOX_TRANSFORMER_ENGINE = (
    "_extra_state", "fc1_weight", "fc2_weight", "fc1_bias", "fc2_bias", "layer_norm_weight", "layer_norm_bias",
    "attention.qkv.", "attention.proj.", "norm.norm.",
)  # fmt: skip

# our field | their key | their default, None where it must be given | their value -> ours
NEOX_FIELDS = (
    ("model.heads", "num_attention_heads", None, None),
    ("model.context", "max_position_embeddings", None, None),
    ("model.rotary_pct", "rotary_pct", 1.0, None),
    ("model.rotary_base", "rotary_emb_base", 10000, None),
    ("model.residual", "gpt_j_residual", False, {True: "parallel", False: "sequential"}),
    ("model.tied", "no_weight_tying", False, {True: False, False: True}),
    ("model.norm_eps", "layernorm_epsilon", 1e-5, None),
    ("model.init_std", "init_method_std", 0.02, None),
    ("model.attention_bias", "use_bias_in_attn_linear", True, None),
)

# Sizes that the tensors have; where their key is given, it must say the same.
NEOX_SIZES = (
    ("model.vocab", "padded_vocab_size"),
    ("model.layers", "num_layers"),
    ("model.embed", "hidden_size"),
    ("model.mlp", "intermediate_size"),
)

# our activation | theirs | bias_gelu_fusion, which computes the tanh form. The first row that fits is taken.
NEOX_ACTIVATIONS = (
    ("gelu", "gelu", False),
    ("gelu_fast", "gelu", True),
    ("gelu_new", "gelu", True),
    ("gelu_pytorch_tanh", "gelu", True),
    ("relu", "relu", False),
    ("relu", "relu", True),
)

# their key | their default | the only value this model has
NEOX_REQUIRED = (
    ("pos_emb", "learned", "rotary"),
    ("norm", "layernorm", "layernorm"),
    ("mlp_type", "regular", "regular"),
    ("gpt_j_tied", False, False),
    ("use_bias_in_norms", True, True),
    ("use_bias_in_mlp", True, True),
    ("use_qk_layernorm", False, False),
    ("sliding_window_width", None, None),
    ("soft_prompt_tuning", False, False),
    ("moe_num_experts", 1, 1),
    ("use_mup", False, False),
    ("te_columnparallel", False, False),
    ("te_rowparallel", False, False),
    ("te_layernorm_mlp", False, False),
    ("te_mha", False, False),
    ("te_fp8_mha", False, False),
)

# Keys that, where given, must say what another says: fewer key heads or shared layers make another model.
NEOX_EQUAL = (("num_kv_heads", "num_attention_heads"), ("num_unique_layers", "num_layers"))

# Entries of attention_config that compute causal attention over everything.
NEOX_ATTENTION = ("global", "flash")
