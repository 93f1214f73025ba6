"""Names that users bring from TRL, open-r1 and LLaMA-Factory, each with what to write here. Data, and two look-ups.

A name stands here only where it is not a key of the recipe in question. Sources: the fields of TRL 1.16's `SFTConfig`,
`GRPOConfig`, `ModelConfig` and `ScriptArguments` (with transformers 5.19's `TrainingArguments`), open-r1's recipes,
LLaMA-Factory's argument classes.
"""

from __future__ import annotations

from typing import Any


def _each(message: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), message)


_RENAMED = {
    # model
    "model_name": "write model_name_or_path",
    "model": "write model_name_or_path",
    "adapter_name_or_path": "write model_name_or_path: the adapter's directory",
    "tokenizer_name": "write tokenizer_name_or_path",
    "chat_template_path": "write chat_template: it takes a template or the path of a file with one",
    "template": "write chat_template (a Jinja template or a file with one); without it the tokenizer's own is used",
    "eos_token": "leave it out: the stop tokens are those of the generation config, the tokenizer and the chat template's turn end",
    "pad_token": "leave it out: nothing is padded",
    "model_init_kwargs": "write the keys themselves: dtype, model_revision, trust_remote_code",
    "bf16": "write mixed_precision: bf16 (float32 weights, bfloat16 compute); dtype: bfloat16 makes the weights bfloat16 too",
    "pure_bf16": "write dtype: bfloat16",
    "fp16": "write mixed_precision: fp16",
    **_each("write dtype: float32 or bfloat16", "torch_dtype model_dtype compute_type"),
    **_each("write it on one key: lora: {r: 16, lora_alpha: 32, ...}; no lora key means full training", "use_peft finetuning_type peft_config"),
    "lora_r": "write lora: {r: ...} (override: lora.r=16)",
    "lora_rank": "write lora: {r: ...} (override: lora.r=16)",
    "lora_alpha": "write lora: {lora_alpha: ...} (override: lora.lora_alpha=32)",
    "lora_dropout": "write lora: {lora_dropout: ...} (override: lora.lora_dropout=0.05)",
    **_each("write lora: {target_modules: ...} (override: lora.target_modules=all-linear)", "lora_target_modules lora_target"),
    **_each("write lora: {modules_to_save: [...]}", "lora_modules_to_save additional_target"),
    "use_rslora": "write lora: {use_rslora: true}",
    "use_dora": "write lora: {use_dora: true}",
    # data
    **_each("write dataset: a hub id or a file, or a list of {path, name, split, columns, weight}",
            "dataset_name datasets dataset_id_or_path train_dataset train_file data_files dataset_mixture dataset_mixer dataset_path data_path"),
    **_each("write dataset: [{path: ..., name: ...}] (override: dataset.0.name=main)", "dataset_config dataset_config_name dataset_kwargs_name"),
    **_each("write dataset: [{path: ..., split: ...}] (override: dataset.0.split=train)", "dataset_train_split dataset_split"),
    **_each("write eval_dataset: [{path: ..., split: ...}]", "dataset_test_split eval_dataset_name dataset_splits"),
    **_each("write eval_fraction: the share of the training rows to hold out", "test_split_size val_size eval_split_ratio"),
    "dataset_dir": "write the file's path in dataset",
    **_each("write dataset: [{path: ..., max_rows: ...}]", "max_samples max_train_samples"),
    **_each("write dataset: [{path: ..., weight: ...}, ...]", "mix_strategy interleave_probs"),
    "dataset_prompt_column": "write dataset: [{path: ..., columns: {prompt: <your column>}}]",
    "dataset_text_field": "write dataset: [{path: ..., columns: {text: <your column>}}]",
    "default_system": "write system_prompt",
    "shuffle_dataset": "write shuffle",
    **_each("write shuffle: true or false", "disable_shuffling train_sampling_strategy"),
    # batches and schedule
    "eval_strategy": "write eval_steps: <number> (leave it out to evaluate only at the end)",
    "evaluation_strategy": "write eval_steps: <number> (leave it out to evaluate only at the end)",
    "do_eval": "leave it out: giving eval_dataset or eval_fraction turns evaluation on",
    "save_strategy": "write save_steps: <number> (leave it out to save only at the end)",
    "num_epochs": "write num_train_epochs",
    "epochs": "write num_train_epochs",
    "lr": "write learning_rate",
    "lr_scheduler": "write lr_scheduler_type",
    "lr_scheduler_kwargs": "write min_lr_ratio: the final rate as a share of learning_rate",
    "max_seq_length": "write max_length (sft) or max_prompt_length and max_completion_length (grpo)",
    "resume_from_checkpoint": "write resume: auto, never, or a checkpoint directory",
    "overwrite_output_dir": "write resume: never to start anew in output_dir, or choose another output_dir",
    "wandb_project": "leave it out: the project is called llmrl in every tracker; run_name names the run",
    "wandb_entity": "set WANDB_ENTITY in the environment, with report_to: wandb",
    "wandb_run_group": "set WANDB_RUN_GROUP in the environment, with report_to: wandb",
    "project": "leave it out: the project is called llmrl in every tracker; run_name names the run",
    "data_seed": "write seed: the order of the data hangs on it too",
    "full_determinism": "leave it out: runs are seeded, and the same bit for bit on one device; for CUDA kernels set CUBLAS_WORKSPACE_CONFIG",
    "env": "set environment variables in the shell that starts the run",
}  # fmt: skip

_NO_MEANING = {
    **_each("leave it out: the padding-free packed layout is the only one, so there is nothing to switch on",
            "packing padding_free packing_strategy eval_packing neat_packing pad_to_multiple_of group_by_length length_column_name"),
    **_each("leave it out: log-probs always come from a chunked head, no logits tensor is ever made",
            "use_liger_kernel liger_kernel_config enable_liger_kernel use_liger_loss"),
    **_each("leave it out: the loss is one weighted sum over all processes and microbatches",
            "average_tokens_across_devices"),
    **_each("leave it out: every step is logged, to metrics.jsonl and to the trackers of report_to",
            "logging_steps logging_strategy logging_first_step logging_dir logging_nan_inf_filter log_level log_level_replica "
            "log_on_each_node disable_tqdm include_num_input_tokens_seen include_tokens_per_second plot_loss run_project"),
    **_each("leave it out: the columns that a row type needs are read, the others go to reward functions",
            "remove_unused_columns label_names"),
    **_each("leave it out: `llmrl sft`, `llmrl grpo` and `llmrl eval` say what is done",
            "do_train do_predict stage prediction_loss_only predict_with_generate include_for_metrics batch_eval_metrics "
            "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps benchmarks callbacks"),
    **_each("leave it out: rows are tokenised before the first step and packed in the process, there is no data loader",
            "dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers "
            "dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor accelerator_config ignore_data_skip "
            "dataset_kwargs overwrite_cache"),
    **_each("leave it out: use `accelerate launch` (or torchrun) with a profile of recipes/accelerate; the launcher decides",
            "ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout ignore_bias_buffers "
            "local_rank parallelism_config use_cpu no_cuda accelerate_config"),
    **_each("FSDP is not available in this version: a run is one process or DDP", "fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap"),
    **_each("DeepSpeed is not available in this version: a run is one process or DDP", "deepspeed ds3_gather_for_generation"),
    **_each("leave it out: a non-finite gradient is skipped and counted (max_nonfinite_steps), a microbatch has a token limit "
            "(tokens_per_microbatch)", "auto_find_batch_size torch_empty_cache_steps"),
    **_each("leave it out: the optimizer is AdamW (adam_beta1, adam_beta2, adam_epsilon, weight_decay)",
            "optim optim_args optim_target_modules use_galore use_badam"),
    **_each("leave it out: uploading to the hub is not part of training; the final model is in output_dir, in Hugging Face's format",
            "push_to_hub hub_always_push hub_model_id hub_model_revision hub_private_repo hub_revision hub_strategy hub_token "
            "push_to_hub_revision trackio_bucket_id trackio_space_id trackio_static_space_id"),
    **_each("leave it out: `save_steps`, `save_total_limit` and `resume` say everything about checkpoints; a checkpoint is complete",
            "save_on_each_node save_only_model save_safetensors restore_callback_states_from_checkpoint enable_jit_checkpoint"),
    **_each("not available in this version: the last checkpoint is the result, evaluations are in metrics.jsonl",
            "load_best_model_at_end metric_for_best_model greater_is_better early_stopping_patience"),
    **_each("leave it out: `dtype` and `mixed_precision` decide the types in evaluation too", "bf16_full_eval fp16_full_eval"),
    "tf32": "leave it out: set NVIDIA_TF32_OVERRIDE in the environment",
    **_each("not available in this version: torch.compile", "torch_compile torch_compile_backend torch_compile_mode"),
    **_each("leave it out: the attention kernel is chosen by device and type", "attn_implementation flash_attn"),
    **_each("leave it out: gradient_checkpointing alone is enough", "gradient_checkpointing_kwargs "
            "gradient_checkpointing_use_reentrant disable_gradient_checkpointing use_unsloth"),
    **_each("not available in this version: write gradient_checkpointing: true to save memory", "activation_offloading"),
    **_each("not available in this version: quantised weights", "load_in_8bit load_in_4bit bnb_4bit_quant_type bnb_4bit_quant_storage "
            "use_bnb_nested_quant quantization_bit quantization_method quantization_config"),
    **_each("not available in this version", "neftune_noise_alpha label_smoothing_factor router_aux_loss_coef dataset_streaming streaming "
            "freeze_trainable_layers lora_task_type create_new_adapter eval_delay eval_on_start lora_target_parameters use_fast_tokenizer"),
    **_each("leave it out: training never uses a key-value cache", "use_cache"),
    **_each("leave it out: it is a debugging aid of transformers.Trainer", "debug skip_memory_metrics dataset_batch_size"),
}  # fmt: skip

_SFT = {
    "per_device_train_batch_size": "write batch_size: rows a step over all processes (per_device_train_batch_size x "
    "gradient_accumulation_steps x processes), and tokens_per_microbatch for memory",
    "gradient_accumulation_steps": "leave it out: a step of batch_size rows is cut into microbatches of tokens_per_microbatch tokens",
    "per_device_eval_batch_size": "leave it out: evaluation is cut into microbatches of tokens_per_microbatch tokens",
    "cutoff_len": "write max_length",
    "truncation_mode": "write on_overlong: drop, truncate (keeps the start) or error",
    "completion_only_loss": "write train_on: completion (true, the default) or all (false)",
    "assistant_only_loss": "leave it out: train_on: completion supervises every assistant turn of a conversation",
    "train_on_prompt": "write train_on: all",
    "mask_history": "not available in this version: every assistant turn is supervised",
    "preprocessing_num_workers": "leave it out: rows are tokenised in batches, in parallel threads",
    "dataset_num_proc": "leave it out: rows are tokenised in batches, in parallel threads",
    "dpo_beta": "preference training is not available in this version",
}

_GRPO = {
    "per_device_train_batch_size": "write batch_size: prompts a step over all processes (per_device_train_batch_size counts completions: x "
    "gradient_accumulation_steps x processes / num_generations), and tokens_per_microbatch for memory",
    "gradient_accumulation_steps": "leave it out: a step of batch_size prompts is cut into microbatches of tokens_per_microbatch tokens",
    "per_device_eval_batch_size": "leave it out: rollout.max_batch_tokens bounds what is sampled at once",
    "generation_batch_size": "write batch_size (prompts a step) and updates_per_step",
    "steps_per_generation": "write updates_per_step: optimizer steps that share the rollouts of one step",
    "num_generations_eval": "write eval_num_generations",
    "max_length": "write max_prompt_length and max_completion_length",
    "cutoff_len": "write max_prompt_length and max_completion_length",
    "max_new_tokens": "write max_completion_length",
    "response_length": "write max_completion_length",
    "kl_coef": "write beta",
    "cliprange": "write epsilon (and epsilon_high)",
    "loss_type": "write preset: grpo, dr_grpo or dapo, or one axis: aggregation: seq_mean_token_mean (grpo), constant (dr_grpo), "
    "token_mean (dapo, bnpo); other values of TRL's loss_type are not available in this version",
    "mask_truncated_completions": "write truncated_completions: mask (true) or keep (false)",
    **_each("write rewards: [{function: ..., weight: ..., args: {...}}]; a function is a built-in name, module:function or file.py:function",
            "reward_funcs reward_functions reward_function reward_model_name_or_path reward_processing_classes"),
    "reward_weights": "write a weight in each item of rewards (override: rewards.0.weight=0.5)",
    **_each("write it in the reward's args: rewards: [{function: ..., args: {...}}]",
            "cosine_min_value_wrong cosine_max_value_wrong cosine_min_value_correct cosine_max_value_correct cosine_max_len "
            "repetition_n_grams repetition_max_penalty code_language code_eval_test_batch_size code_eval_scoring_mode code_provider "
            "parallel_code_exec_per_proc max_completion_len soft_punish_cache"),
    "multi_objective_aggregation": "not available in this version: rewards are summed with their weights, then normalised (sum_then_normalize)",
    "importance_sampling_correction": "write importance_correction: none or token_truncate",
    **_each("write importance_correction: none or token_truncate, and importance_cap",
            "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_cap "
            "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min"),
    **_each("leave it out: rollout.engine says what samples; vLLM is not available in this version, `local` is",
            "use_vllm vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port vllm_max_model_length vllm_max_model_len vllm_mode "
            "vllm_model_impl vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_structured_outputs_regex "
            "vllm_guided_decoding_regex vllm_tensor_parallel_size vllm_device vllm_dtype vllm_enable_prefix_caching"),
    **_each("leave it out: the local engine decodes in shrinking batches; rollout.max_batch_tokens bounds its memory",
            "use_transformers_continuous_batching use_transformers_paged transformers_continuous_batching_config cache_implementation"),
    **_each("not available in this version: sampling takes temperature, top_p, top_k and min_p", "generation_kwargs repetition_penalty"),
    **_each("not available in this version: the reference is the starting model",
            "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"),
    **_each("not available in this version: entropy_coef is a constant",
            "use_adaptive_entropy entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target"),
    "off_policy_mask_threshold": "not available in this version: epsilon, delta and dual_clip bound off-policy tokens",
    **_each("not available in this version: the surrogate is the clipped ratio",
            "sapo_temperature_neg sapo_temperature_pos vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos"),
    "disable_dropout": "leave it out: dropout is off in reinforcement learning",
    "cast_lm_head_to_fp32": "leave it out: the log-softmax is always in float32",
    **_each("leave it out: samples are always in samples/*.jsonl; num_samples_logged bounds the table on the screen",
            "log_completions num_completions_to_print log_unique_prompts log_multimodal log_completions_hub_repo wandb_log_unique_prompts"),
    **_each("not available in this version: tools in the rollout", "max_tool_calling_iterations environment_factory rollout_func tools"),
    **_each("leave it out: there is no critic", "vf_coef cliprange_value gamma lam num_ppo_epochs"),
}  # fmt: skip

_SOURCE = {
    **_each("write path", "id dataset file data_files hub_id data_dir script_url hf_hub_url file_name"),
    **_each("write name (the hub configuration)", "config subset"),
    **_each("write weight: this source's share", "fraction ratio proportion"),
    **_each("write max_rows", "num_samples max_samples limit"),
    **_each("write columns: {prompt: <your column>}", "prompt_column text_field column_mapping"),
}
_REWARD = {**_each("write function", "func fn reward path type"), **_each("write args", "kwargs params arguments")}
_LORA = {
    **_each("write r", "rank lora_r"),
    "task_type": "leave it out: llmrl trains causal language models",
    "bias": "not available in this version: biases stay as they are",
}

BY_KIND = {
    "sft": {**_RENAMED, **_NO_MEANING, **_SFT},
    "grpo": {**_RENAMED, **_NO_MEANING, **_GRPO},
    "eval": {
        **_each("write data: a file or a hub id", "dataset eval_dataset dataset_name task tasks"),
        **_each("write n: completions a problem", "num_generations num_samples num_return_sequences"),
        **_each("write scorer", "rewards reward_funcs metric"),
        **_each("write max_completion_length", "max_new_tokens max_tokens"),
        "torch_dtype": "write dtype: float32 or bfloat16",
        "model": "write model_name_or_path",
    },
    "DatasetSource": _SOURCE,
    "RewardSpec": _REWARD,
    "LoraSettings": _LORA,
}

# What a value means here that TRL, transformers or YAML spell otherwise; "*" answers any other wrong value of the key.
_VALUES: dict[str, dict[str, str]] = {
    "scale_rewards": {"True": "write group", "False": "write none"},
    "max_steps": {"*": "leave it out to train for num_train_epochs"},
    "report_to": {"none": "leave it out", "all": "name the trackers", "None": "leave it out"},
    "lr_scheduler_type": {
        "constant_with_warmup": "write constant, with warmup_steps or warmup_ratio",
        **_each("write cosine, with min_lr_ratio", "cosine_with_min_lr cosine_warmup_with_min_lr"),
    },
    "loss_type": {"chunked_nll": "write nll: it is always computed in chunks"},
    "dtype": {
        "bf16": "write bfloat16",
        "fp32": "write float32",
        **_each("write float32 with mixed_precision: fp16: float16 weights can't be trained", "float16 fp16 half"),
        "auto": "write it out: what a checkpoint was stored in decides nothing here",
    },
    "mixed_precision": {
        "False": "write no",
        "None": "write no",
        "True": "write bf16",
        "bfloat16": "write bf16",
        "float16": "write fp16",
    },
    "top_k": {"*": "0 turns it off"},
    "min_p": {"*": "0 turns it off"},
    "warmup_steps": {"*": "a share of all updates is warmup_ratio"},
    "resume": {"True": "write auto", "False": "write never", "None": "write never"},
    "preset": {
        "gspo": "write importance_sampling_level: sequence",
        "bnpo": "write aggregation: token_mean",
        "dr.grpo": "write dr_grpo",
    },
    "lora": {"True": "write lora: {} for the defaults", "False": "leave it out"},
    "save_total_limit": {"*": "null keeps all"},
}


def alias(kind: str, name: str) -> str | None:
    """What to write instead of `name`, an unknown key of a recipe ("sft", "grpo", "eval") or of a model in it (its class name)."""
    return BY_KIND.get(kind, {}).get(name)


def value_hint(key: str, value: Any) -> str | None:
    """What to write instead of a wrong value of a known key."""
    hints = _VALUES.get(key, {})
    return hints.get(str(value), hints.get("*"))
