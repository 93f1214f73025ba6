"""Names that users bring from TRL, open-r1, OpenRLHF and LLaMA-Factory, each with what to write here. Data, and two look-ups.

A name stands here only where it is not a key of the recipe in question. Sources: the fields of TRL 1.16's `SFTConfig`,
`RewardConfig`, `DPOConfig`, `GRPOConfig`, `RLOOConfig`, its experimental `OnlineDPOConfig`, `CPOConfig` and `ORPOConfig`, `ModelConfig`
and `ScriptArguments` (with transformers 5.19's `TrainingArguments`), of TRL's earlier `PPOConfig`s, open-r1's recipes, the command
lines of OpenRLHF, LLaMA-Factory's argument classes.
"""

from __future__ import annotations

from typing import Any

from llmrl.config.aliases_by_kind import DPO, GRPO, PPO, REWARD_MODEL, SFT
from llmrl.config.aliases_by_kind import each as _each

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
    "max_seq_length": "write max_length (sft, reward, dpo) or max_prompt_length and max_completion_length (ppo, grpo)",
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
    **_each("leave it out: the command (`llmrl sft`, `llmrl reward`, `llmrl dpo`, `llmrl ppo`, `llmrl grpo`, `llmrl eval`) says what is done",
            "do_train do_predict stage prediction_loss_only predict_with_generate include_for_metrics batch_eval_metrics "
            "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps callbacks"),
    **_each("leave it out: rows are tokenised before the first step and packed in the process, there is no data loader",
            "dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers "
            "dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor accelerator_config ignore_data_skip "
            "dataset_kwargs overwrite_cache"),
    **_each("leave it out: use `accelerate launch` (or torchrun) with a profile of recipes/accelerate; the launcher decides",
            "ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout ignore_bias_buffers "
            "local_rank parallelism_config use_cpu no_cuda accelerate_config"),
    **_each("leave it out: the launcher says it: `llmrl KIND --accelerate fsdp2`, or a launch file of yours", "fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap"),
    **_each("leave it out: the launcher says it: `llmrl KIND --accelerate zero2` or zero3, or a launch file of yours",
            "deepspeed ds3_gather_for_generation"),
    **_each("leave it out: a non-finite gradient is skipped and counted (max_nonfinite_steps), a microbatch has a token limit "
            "(tokens_per_microbatch)", "auto_find_batch_size torch_empty_cache_steps"),
    "optim": "write optimizer: adamw or adamw_8bit",
    **_each("leave it out: the optimizer is AdamW (adam_beta1, adam_beta2, adam_epsilon, weight_decay; optimizer: adamw_8bit saves memory)",
            "optim_args optim_target_modules use_galore use_badam"),
    **_each("leave it out: uploading to the hub is not part of training: `llmrl export RUN DIRECTORY --push-to-hub REPO` does it afterwards",
            "push_to_hub hub_always_push hub_model_id hub_model_revision hub_private_repo hub_revision hub_strategy hub_token "
            "push_to_hub_revision trackio_bucket_id trackio_space_id trackio_static_space_id"),
    **_each("leave it out: `save_steps`, `save_total_limit` and `resume` say everything about checkpoints; a checkpoint is complete",
            "save_on_each_node save_only_model save_safetensors restore_callback_states_from_checkpoint enable_jit_checkpoint"),
    "load_best_model_at_end": "write metric_for_best_model: the best checkpoint is kept, and its model is in checkpoints/step_<N>/model; "
                              "model/ is that of the last step",
    "early_stopping_patience": "not available in this version: metric_for_best_model keeps the best checkpoint, however long the run is",
    **_each("leave it out: `dtype` and `mixed_precision` decide the types in evaluation too", "bf16_full_eval fp16_full_eval"),
    "tf32": "leave it out: set NVIDIA_TF32_OVERRIDE in the environment",
    **_each("not available in this version: torch.compile", "torch_compile torch_compile_backend torch_compile_mode"),
    **_each("leave it out: the attention kernel is chosen by device and type", "attn_implementation flash_attn"),
    **_each("leave it out: gradient_checkpointing alone is enough", "gradient_checkpointing_kwargs "
            "gradient_checkpointing_use_reentrant disable_gradient_checkpointing use_unsloth"),
    **_each("write quantization: nf4 (4 bits, double quantisation) or int8, beside lora", "load_in_8bit load_in_4bit bnb_4bit_quant_type "
            "bnb_4bit_quant_storage use_bnb_nested_quant quantization_bit quantization_method quantization_config"),
    **_each("not available in this version", "neftune_noise_alpha label_smoothing_factor router_aux_loss_coef dataset_streaming streaming "
            "freeze_trainable_layers lora_task_type create_new_adapter eval_delay eval_on_start lora_target_parameters use_fast_tokenizer"),
    **_each("leave it out: training never uses a key-value cache", "use_cache"),
    **_each("leave it out: it is a debugging aid of transformers.Trainer", "debug skip_memory_metrics dataset_batch_size"),
}  # fmt: skip

_OPENRLHF = {
    "pretrain": "write model_name_or_path",
    "save_path": "write output_dir: the final model is in its `model`",
    **_each("leave it out: checkpoints are in output_dir/checkpoints, every save_steps", "ckpt_path save_hf_ckpt disable_ds_ckpt max_ckpt_mem"),
    "max_ckpt_num": "write save_total_limit",
    "load_checkpoint": "write resume: auto, never, or a checkpoint directory",
    "max_norm": "write max_grad_norm",
    "l2": "write weight_decay",
    "lr_warmup_ratio": "write warmup_ratio",
    "adam_betas": "write adam_beta1 and adam_beta2",
    "param_dtype": "write mixed_precision: bf16 (float32 weights, bfloat16 compute), or dtype: bfloat16",
    "target_modules": "write lora: {target_modules: ...} (override: lora.target_modules=all-linear)",
    "tokenizer_chat_template": "write chat_template",
    **_each("leave it out: conversations always go through the chat template, strings are used as they are", "apply_chat_template"),
    "input_template": "write dataset: [{path: ..., prompt_template: '{question}'}], with column names",
    "input_key": "write dataset: [{path: ..., columns: {prompt: <your column>}}]",
    "prompt_key": "write dataset: [{path: ..., columns: {prompt: <your column>}}]",
    "label_key": "write dataset: [{path: ..., columns: {answer: <your column>}}]",
    **_each("write dataset: [{path: ..., weight: ...}, ...]", "dataset_probs prompt_data_probs"),
    **_each("write dataset: [{path: ..., split: ...}]", "train_split prompt_split"),
    "eval_split": "write eval_dataset: [{path: ..., split: ...}]",
    **_each("write report_to: wandb", "use_wandb"),
    **_each("set WANDB_ENTITY or WANDB_RUN_GROUP in the environment, with report_to: wandb", "wandb_org wandb_group"),
    "wandb_run_name": "write run_name",
    "use_tensorboard": "write report_to: tensorboard",
    **_each("leave it out: the padding-free packed layout is the only one", "packing_samples use_dynamic_batch"),
    "train_max_tokens_per_gpu": "write tokens_per_microbatch",
    **_each("leave it out: the launcher says it: `llmrl KIND --accelerate zero2` or zero3, or a launch file of yours",
            "zero_stage zpg adam_offload deepcompile ds_tensor_parallel_size use_ds_universal_ckpt deepspeed_enable_sleep dist_backend"),
    **_each("leave it out: it is not needed here",
            "grad_accum_dtype overlap_comm disable_fast_tokenizer disable_trace_cache use_ms actor_init_on_gpu perf"),
    **_each("not available in this version", "aux_loss_coef ring_attn_size ring_head_stride enable_ema ema_beta"),
}  # fmt: skip

_SOURCE = {
    **_each("write path", "id dataset file data_files hub_id data_dir script_url hf_hub_url file_name"),
    **_each("write name (the hub configuration)", "config subset"),
    **_each("write weight: this source's share", "fraction ratio proportion"),
    **_each("write max_rows", "num_samples max_samples limit"),
    **_each("write columns: {prompt: <your column>}", "prompt_column text_field column_mapping"),
}
_REWARD = {
    **_each("write function", "func fn reward type"),
    "path": "write function (file.py:function) or model (a reward model's directory)",
    **_each("write model", "model_name_or_path model_path reward_model"),
    **_each("write args", "kwargs params arguments"),
    **_each("write tokens_per_batch", "batch_size per_device_batch_size"),
}
_LORA = {
    **_each("write r", "rank lora_r"),
    "task_type": "leave it out: llmrl trains causal language models",
    "bias": "not available in this version: biases stay as they are",
}

_TRAINERS = {"sft": SFT, "reward": REWARD_MODEL, "dpo": DPO, "ppo": PPO, "grpo": GRPO}
BY_KIND = {
    **{kind: {**_RENAMED, **_NO_MEANING, **_OPENRLHF, **names} for kind, names in _TRAINERS.items()},
    "eval": {
        **_each("write data: a file or a hub id", "dataset eval_dataset dataset_name"),
        **_each("write benchmark: names such as math500,aime24", "benchmarks task tasks"),
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
    "loss_type": {
        "chunked_nll": "write nll: it is always computed in chunks", "sft": "write nll", "exo_pair": "write exo", "nca_pair": "write nca",
        "bco_pair": "write bco", "sppo_hard": "write sppo", "cdpo": "write sigmoid, with label_smoothing", "dpo": "write sigmoid",
        **_each("write sigmoid, with length_normalized: true", "sigmoid_norm dpo_norm"),
        **_each("write bradley_terry", "sigmoid logexp"), "bce": "write outcome",
        "cpo": "not available in this version; simpo, with simpo_gamma: 0 and nll beside it, is its nearest",
        **_each("not available in this version: AOT sorts the scores of a batch, so its value hangs on how the batch is cut",
                "aot aot_unpaired aot_pair"),
        **_each("not available in this version; bco is its nearest on pairs", "kto kto_pair"),
    },
    "reference_logprobs": {"True": "write precompute", "False": "write on_the_fly"},
    "f_divergence_type": {"js": "write js_divergence", "kl": "write reverse_kl"},
    "kl_estimator": {"kl": "write k1", "mse": "write k2", "low_var_kl": "write k3", **_each("not available in this version", "abs full")},
    "kl_controller": {"constant": "write fixed"},
    "critic": _each("the trainer without a critic is `llmrl grpo`", "None none False"),
    "truncated_completions": {"True": "write mask", "False": "write keep"},
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
        **_each("write reinforce_pp", "reinforce++ reinforce_plus_plus"),
        "reinforce_baseline": "write reinforce_pp: its baseline is the group's mean",
        **_each("it is a preset of `llmrl ppo`", "ppo orz_ppo trpo_penalty"),
        **_each("it is a preset of `llmrl grpo`", "grpo dr_grpo dapo rloo reinforce reinforce_pp"),
    },
    "lora": {"True": "write lora: {} for the defaults", "False": "leave it out"},
    "save_total_limit": {"*": "null keeps all"},
}  # fmt: skip


def alias(kind: str, name: str) -> str | None:
    """What to write instead of `name`, an unknown key of a recipe (its kind, such as "dpo") or of a model in it (its class name)."""
    return BY_KIND.get(kind, {}).get(name)


def value_hint(key: str, value: Any) -> str | None:
    """What to write instead of a wrong value of a known key."""
    hints = _VALUES.get(key, {})
    return hints.get(str(value), hints.get("*"))
