"""Names of other toolkits that one trainer, or a family of them, has (`llmrl.config.aliases` has those of all): what to write instead."""

from __future__ import annotations


def each(message: str, names: str) -> dict[str, str]:
    """The same message for several names."""
    return dict.fromkeys(names.split(), message)


_ROWS = {
    "gradient_accumulation_steps": "leave it out: a step of batch_size rows is cut into microbatches of tokens_per_microbatch tokens",
    "per_device_eval_batch_size": "leave it out: evaluation is cut into microbatches of tokens_per_microbatch tokens",
    **each("write max_length", "cutoff_len max_len"),
    "truncation_mode": "write on_overlong: drop, truncate (what it cuts is in docs/data.md) or error",
    **each("leave it out: rows are tokenised in batches, in parallel threads", "preprocessing_num_workers dataset_num_proc"),
    "max_epochs": "write num_train_epochs",
    "train_batch_size": "write batch_size: rows or pairs a step over all processes",
    "micro_train_batch_size": "write tokens_per_microbatch: tokens of one forward on one process",
}  # fmt: skip

_PAIRS = {
    "per_device_train_batch_size": "write batch_size: rows or pairs a step over all processes (per_device_train_batch_size x "
    "gradient_accumulation_steps x processes), and tokens_per_microbatch for memory",
    "chosen_key": "write dataset: [{path: ..., columns: {chosen: <your column>}}]",
    "rejected_key": "write dataset: [{path: ..., columns: {rejected: <your column>}}]",
    **each("leave it out: it is read off the model", "is_encoder_decoder padding_value"),
    "generate_during_eval": "not available in this version: `llmrl eval` samples and scores",
    **each("leave it out: it is a setting of `llmrl sft`", "train_on_prompt mask_history"),
    "max_target_length": "write max_length: prompt and answer together",
}  # fmt: skip

SFT = {
    **_ROWS,
    "per_device_train_batch_size": "write batch_size: rows a step over all processes (per_device_train_batch_size x "
    "gradient_accumulation_steps x processes), and tokens_per_microbatch for memory",
    "truncation_mode": "write on_overlong: drop, truncate (keeps the start) or error",
    "completion_only_loss": "write train_on: completion (true, the default) or all (false)",
    "assistant_only_loss": "leave it out: train_on: completion supervises every assistant turn of a conversation",
    "train_on_prompt": "write train_on: all",
    "mask_history": "not available in this version: every assistant turn is supervised",
    "dpo_beta": "preferences are learnt by `llmrl dpo`, where it is beta",
}  # fmt: skip

REWARD_MODEL = {
    **_ROWS,
    **_PAIRS,
    "loss": "write loss_type: bradley_terry (sigmoid and logexp are the same) or outcome",
    "margin_loss": "leave it out: a column `margin` is used where there is one",
    "compute_fp32_loss": "leave it out: the loss is always in float32",
    "value_head_prefix": "leave it out: the score layer is transformers' own",
    "disable_dropout": "leave it out: dropout is the model configuration's; an adapter's is lora: {lora_dropout: ...}",
    "max_prompt_length": "write max_length: prompt and answer together",
    "num_labels": "leave it out: a reward model has one",
}  # fmt: skip

_SAMPLED = {
    "num_generations_eval": "write eval_num_generations",
    "eval_n_samples_per_prompt": "write eval_num_generations",
    **each("write num_generations", "n_samples_per_prompt rloo_k"),
    **each("write max_completion_length", "max_new_tokens response_length generate_max_len"),
    "prompt_max_len": "write max_prompt_length",
    **each("write rewards: [{function: ..., weight: ..., args: {...}}]; a function is a built-in name, module:function or file.py:function",
            "reward_funcs reward_functions reward_function reward_processing_classes judge agent_func_path"),
    **each("write rewards: [{model: PATH}] (several paths are an ensemble)",
            "reward_model_path reward_model_name_or_path reward_model reward_pretrain reward_model_adapters reward_model_type"),
    "reward_model_quantization_bit": "not available in this version: quantised weights",
    "remote_rm_url": "write rewards: [{function: file.py:function}], a function of yours (sync or async) that asks the server",
    "reward_weights": "write a weight in each item of rewards (override: rewards.0.weight=0.5)",
    **each("write rewards: [..., {function: soft_overlong, args: {max_completion_len: ..., soft_punish_cache: ...}}]",
            "overlong_buffer_len overlong_penalty_factor"),
    **each("write it in the reward's args: rewards: [{function: ..., args: {...}}]",
            "cosine_min_value_wrong cosine_max_value_wrong cosine_min_value_correct cosine_max_value_correct cosine_max_len "
            "repetition_n_grams repetition_max_penalty code_language code_eval_test_batch_size code_eval_scoring_mode code_provider "
            "parallel_code_exec_per_proc max_completion_len soft_punish_cache"),
    **each("not available in this version: rewards are used as they are; scale or clip in a reward function of yours",
            "reward_clip_range normalize_reward whiten_rewards ppo_whiten_rewards use_score_scaling use_score_norm score_clip ppo_score_norm"),
    **each("write rollout.engine, as in rollout: {engine: vllm_server, urls: [http://host:port]} or {engine: vllm_colocate}",
            "use_vllm vllm_mode vllm_num_engines vllm_device"),
    **each("write rollout.urls: [http://host:port] of servers that `llmrl serve` started", "vllm_server_base_url vllm_server_host vllm_server_port"),
    "vllm_server_timeout": "write rollout.start_timeout (seconds to wait for servers), and rollout.request_timeout",
    "vllm_gpu_memory_utilization": "write rollout.gpu_memory_utilization (vllm_colocate); for a server: llmrl serve ... -- --gpu-memory-utilization",
    "vllm_tensor_parallel_size": "write rollout.tensor_parallel_size (vllm_colocate); for a server: llmrl serve --tensor-parallel-size",
    **each("write rollout.sleep_level: 1 or 2 (0: never)", "vllm_enable_sleep_mode vllm_enable_sleep"),
    **each("write rollout.transfer: disk or nccl; ports are found", "vllm_sync_backend vllm_sync_with_ray vllm_group_port"),
    **each("write rollout.vllm_args: {max_model_len: ...} (vllm_colocate), or give it to the server: llmrl serve --max-model-len, --dtype, -- ...",
            "vllm_max_model_length vllm_max_model_len vllm_model_impl vllm_dtype vllm_enable_prefix_caching enable_prefix_caching enforce_eager"),
    "vllm_generate_batch_size": "write rollout.max_concurrency: groups in flight on a server",
    **each("not available in this version: constrained sampling in training", "vllm_structured_outputs_regex vllm_guided_decoding_regex"),
    **each("write rollout.max_staleness: steps that rollouts may be ahead (vllm_server)", "async_train async_queue_size max_staleness"),
    **each("leave it out: the local engine decodes in shrinking batches; rollout.max_batch_tokens bounds its memory",
            "use_transformers_continuous_batching use_transformers_paged transformers_continuous_batching_config cache_implementation "
            "local_rollout_forward_batch_size micro_rollout_batch_size rollout_max_tokens_per_gpu rollout_tasks_per_gpu"),
    **each("leave it out: every process trains and samples", "colocate_all_models colocate_actor_ref "
            "colocate_critic_reward actor_num_nodes actor_num_gpus_per_node ref_num_nodes ref_num_gpus_per_node critic_num_nodes "
            "critic_num_gpus_per_node reward_num_nodes reward_num_gpus_per_node"),
    "ref_reward_offload": "write offload_reference: true",
    **each("not available in this version: sampling takes temperature, top_p, top_k and min_p", "generation_kwargs repetition_penalty"),
    "cast_lm_head_to_fp32": "leave it out: the log-softmax is always in float32",
    "disable_dropout": "leave it out: dropout is off",
    **each("leave it out: samples are always in samples/*.jsonl; num_samples_logged bounds the table on the screen",
            "log_completions num_completions_to_print log_unique_prompts log_multimodal log_completions_hub_repo wandb_log_unique_prompts "
            "num_sample_generations"),
    **each("not available in this version: tools in the rollout", "max_tool_calling_iterations environment_factory rollout_func tools"),
    **each("leave it out: rows are tokenised in batches, in parallel threads", "preprocessing_num_workers dataset_num_proc"),
    **each("leave it out: it is a setting of `llmrl sft`", "train_on_prompt mask_history"),
    **each("leave it out: a completion ends with the stop tokens of the generation config, the tokenizer and the chat template",
            "stop_token stop_token_id"),
}  # fmt: skip

_RL = {
    **_SAMPLED,
    "per_device_train_batch_size": "write batch_size: prompts a step over all processes (per_device_train_batch_size counts completions: x "
    "gradient_accumulation_steps x processes / num_generations), and tokens_per_microbatch for memory",
    "gradient_accumulation_steps": "leave it out: a step of batch_size prompts is cut into microbatches of tokens_per_microbatch tokens",
    "per_device_eval_batch_size": "leave it out: rollout.max_batch_tokens bounds what is sampled at once",
    "generation_batch_size": "write batch_size (prompts a step) and updates_per_step",
    "rollout_batch_size": "write batch_size: prompts a step",
    "train_batch_size": "write updates_per_step: optimizer steps that share the rollouts of one step (rollouts / train_batch_size)",
    "micro_train_batch_size": "write tokens_per_microbatch: tokens of one forward on one process",
    "steps_per_generation": "write updates_per_step: optimizer steps that share the rollouts of one step",
    **each("write updates_per_step: optimizer steps that share the rollouts of one step", "num_mini_batches mini_batch_size ppo_mini_batch_size"),
    **each("write num_iterations", "num_ppo_epochs ppo_epochs max_epochs"),
    **each("write num_train_epochs or max_steps", "num_episodes total_episodes"),
    "prompt_data": "write dataset: a hub id or a file, or a list of {path, name, split, columns, weight}",
    **each("write max_prompt_length and max_completion_length", "max_length cutoff_len max_len"),
    **each("write beta", "kl_coef init_kl_coef"),
    "kl_penalty": "write kl_estimator: k1 (kl) or k2 (mse); the others are not available in this version",
    "use_kl_loss": "write kl_place: loss (true) or reward (false)",
    "use_kl_in_reward": "write kl_place: reward (true) or loss (false)",
    **each("write epsilon (and epsilon_high)", "cliprange eps_clip clip_range"),
    "eps_clip_low_high": "write epsilon and epsilon_high",
    "entropy_loss_coef": "write entropy_coef",
    "mask_truncated_completions": "write truncated_completions: mask (true) or keep (false)",
    "importance_sampling_correction": "write importance_correction: none or token_truncate",
    **each("write importance_correction: none or token_truncate, and importance_cap",
            "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_cap "
            "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min enable_vllm_is_correction vllm_is_truncated_threshold"),
    **each("not available in this version: the reference is the starting model",
            "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps ref_model ref_pretrain ref_model_adapters ref_model_quantization_bit"),
    "sft_model_path": "write model_name_or_path: the policy starts there, and the reference is what it starts from",
    "ptx_coef": "not available in this version: a loss on pretraining data beside the reward",
    "multi_objective_aggregation": "use `combine: normalize_then_sum`; sum_then_normalize is the default, `combine: sum`",
    **each("not available in this version: entropy_coef is a constant",
            "use_adaptive_entropy entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target"),
}  # fmt: skip

DPO = {
    **_SAMPLED,
    **_ROWS,
    **_PAIRS,
    **each("write beta", "pref_beta dpo_beta kl_coef"),
    **each("write loss_type: sigmoid, hinge, ipo, simpo, orpo, ...", "pref_loss dpo_loss"),
    "ipo": "write loss_type: ipo (it sums log-probs, as the paper does; with length_normalized: true it takes TRL's means)",
    **each("write loss_type: [sigmoid, nll] and loss_weights: [1, <the coefficient>]", "pref_ftx dpo_ftx rpo_alpha nll_loss_coef"),
    "cpo_alpha": "write loss_type: [simpo, nll] and loss_weights: [1, <the coefficient>]",
    "pref_bco_weight": "write loss_type: [sigmoid, bco] and loss_weights: [1, <the weight>]",
    "dpo_label_smoothing": "write label_smoothing",
    "orpo_beta": "write beta, with loss_type: orpo",
    "alpha": "not available in this version: AlphaPO's reward shape",
    "precompute_ref_log_probs": "write reference_logprobs: precompute (true; the default here) or on_the_fly (false)",
    "precompute_ref_batch_size": "leave it out: the pass over the reference is cut into microbatches of tokens_per_microbatch tokens",
    "reference_free": "leave it out: simpo, orpo and nll look at no reference",
    **each("write ref_model_name_or_path", "ref_model ref_pretrain"),
    **each("leave it out: ref_model_name_or_path is a model or an adapter's directory; without it the reference is the initial policy",
            "ref_model_init_kwargs ref_model_adapters model_adapter_name ref_adapter_name force_use_ref_model"),
    "ref_offload": "write offload_reference: true",
    "ref_model_quantization_bit": "not available in this version: quantised weights",
    "use_weighting": "not available in this version: WPO's weights need the whole distribution at every token",
    "discopop_tau": "leave it out: discopop has the paper's 0.05",
    **each("not available in this version: KTO, which learns from answers without pairs (bco is its nearest on pairs)",
            "kto_chosen_weight kto_rejected_weight desirable_weight undesirable_weight"),
    "missing_eos_penalty": "write rewards: [..., {function: soft_overlong, args: {...}}], or a function of yours that punishes cut answers",
    **each("not available in this version: online, an update is made on the pairs of one step; see updates_per_step",
            "num_ppo_epochs steps_per_generation generation_batch_size"),
}  # fmt: skip

PPO = {
    **_RL,
    "loss_type": "write preset: ppo, orz_ppo or trpo_penalty, or one axis: aggregation: token_mean, seq_mean_token_mean, ...",
    **each("write cliprange_value", "value_clip value_clip_range"),
    **each("write lam", "lambd gae_lambda"),
    "value_loss_coef": "write vf_coef",
    "freezing_actor_steps": "write critic_warmup_steps",
    **each("write critic: separate and critic_model_name_or_path", "critic_pretrain value_model value_model_path"),
    **each("leave it out: the final model is the policy; the critic is in the checkpoints", "save_value_network value_head_prefix"),
    "actor_learning_rate": "write learning_rate",
    "normalize_advantages": "write whiten_advantages",
    "no_advantage_std_norm": "write whiten_advantages: true or false; centring alone is not available in this version",
    "adap_kl_ctrl": "write kl_controller: adaptive, with kl_target",
    **each("write kl_target, with kl_controller: adaptive", "target ppo_target"),
    **each("leave it out: kl_controller: adaptive doubles and halves beta (target / 1.5, target x 1.5); it has no horizon", "kl_horizon horizon"),
    "early_stopping": "write target_kl: a number",
    "ppo_buffer_size": "write batch_size (prompts a step) and updates_per_step",
    "exp_name": "write run_name",
    "log_with": "write report_to",
    "steps": "write max_steps",
    "forward_batch_size": "write tokens_per_microbatch: tokens of one forward on one process",
    "ratio_threshold": "leave it out: epsilon and dual_clip bound the ratio; skipped updates are those beyond target_kl",
    "stop_properly_penalty_coef": "write missing_eos_penalty",
    **each("the trainer without a critic is `llmrl grpo`: preset: grpo, dr_grpo, dapo, rloo, reinforce or reinforce_pp",
            "advantage_estimator adv_estimator"),
    "policy_loss_type": "write surrogate: ppo_clip or is_pg",
    **each("groups are an idea of `llmrl grpo`, where this is group_filter: drop_zero_std",
            "dynamic_filtering dynamic_filtering_reward_range"),
}  # fmt: skip

GRPO = {
    **_RL,
    "loss_type": "write preset: grpo, dr_grpo or dapo, or one axis: aggregation: seq_mean_token_mean (grpo), constant (dr_grpo), "
    "token_mean (dapo, bnpo); other values of TRL's loss_type are not available in this version",
    "off_policy_mask_threshold": "not available in this version: epsilon, delta and dual_clip bound off-policy tokens",
    **each("not available in this version: the surrogate is the clipped ratio, the ratio, or the plain policy gradient",
            "sapo_temperature_neg sapo_temperature_pos vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos"),
    "normalize_advantages": "write scale_rewards: whiten (true) or none (false)",
    **each("write preset: grpo, dr_grpo, dapo, rloo, reinforce or reinforce_pp; with a critic (gae) it is `llmrl ppo`",
            "advantage_estimator adv_estimator"),
    "no_advantage_std_norm": "write scale_rewards: none",
    "policy_loss_type": "write importance_sampling_level: sequence (gspo) or token (ppo)",
    "actor_learning_rate": "write learning_rate",
    **each("write group_filter: drop_zero_std", "dynamic_filtering dynamic_filtering_reward_range"),
    "missing_eos_penalty": "write truncated_completions: zero_reward, or add the reward soft_overlong",
    **each("leave it out: there is no critic, and beta is fixed (`llmrl ppo` has both a critic and controllers)", "vf_coef cliprange_value value_clip gamma lam lambd critic_pretrain "
            "critic_learning_rate freezing_actor_steps kl_horizon kl_target save_value_network value_head_prefix"),
}  # fmt: skip
