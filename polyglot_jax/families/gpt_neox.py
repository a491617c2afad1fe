"""GPT-NeoX as Hugging Face's GPTNeoXForCausalLM names it. Format of the tables: `polyglot_jax.names`."""

MODEL_TYPE = "gpt_neox"
ARCHITECTURE = "GPTNeoXForCausalLM"

# our field | their key (alternatives, first is written) | their default when absent | their value -> ours
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
    ("model.activation", "hidden_act", "gelu", None),
    ("model.tied", "tie_word_embeddings", False, None),
    ("model.norm_eps", "layer_norm_eps", 1e-5, None),
    ("model.init_std", "initializer_range", 0.02, None),
    ("data.eos_id", "eos_token_id", 2, None),
)

# Settings the model has no other form of: their only value, or absent. Written as they stand.
REQUIRED = {
    "attention_bias": True,
    "is_decoder": False,
    "rope_parameters.rope_type": "default",
    "rope_scaling": None,
}

# Settings that change nothing the model computes (dropouts: nothing outside training, and training here has none).
HARMLESS = (
    "attention_dropout", "hidden_dropout", "chunk_size_feed_forward", "id2label", "label2id", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "sep_token_id", "task_specific_params", "tokenizer_class",
    "unk_token_id",
    "_name_or_path", "architectures", "bos_token_id", "classifier_dropout", "dtype", "gradient_checkpointing",
    "model_type", "num_steps", "pad_token_id", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip

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
