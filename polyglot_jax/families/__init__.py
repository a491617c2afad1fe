"""What other libraries call things: one module of plain data per architecture, no code paths."""

# Settings of every family that change nothing the model computes: bookkeeping, other heads than the language model's,
# what generation does by default.
HARMLESS = (
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "_num_labels",
    "architectures", "author", "bos_token_id", "chunk_size_feed_forward", "created_date",
    "cross_attention_hidden_size", "decoder_start_token_id", "dtype", "finetuning_task", "gradient_checkpointing",
    "id2label", "is_decoder", "label2id", "license", "model_type", "name_or_path", "num_labels", "num_steps",
    "output_attentions", "output_hidden_states", "output_past", "pad_token_id", "prefix", "problem_type",
    "return_dict", "sep_token_id", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers_version", "unk_token_id", "use_bfloat16", "use_cache",
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
)  # fmt: skip

# Settings the engine has no other form of, in any family: the values it has, or absent.
REQUIRED = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
}
