"""What runs inside vLLM's workers: the `disk` weight transfer, and what a worker can say about the weights that it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from llmrl.rollout.fingerprint import fingerprint


@dataclass
class DiskInitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on before files are read."""


@dataclass
class DiskUpdateInfo(WeightTransferUpdateInfo):
    """`files`: paths of safetensors files, with the names and shapes of the checkpoint, that this worker can read."""

    files: list[str]


class DiskWeightTransferEngine(WeightTransferEngine[DiskInitInfo, DiskUpdateInfo]):
    """Loads weights from safetensors files, one file an update, through the same layer-wise reload as vLLM's own engines."""

    init_info_cls = DiskInitInfo
    update_info_cls = DiskUpdateInfo

    def init_transfer_engine(self, init_info: DiskInitInfo) -> None:
        """Nothing to open."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class waits for an accelerator, which the CPU build does not have; loading from a file is synchronous.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: DiskUpdateInfo) -> None:
        for path in update_info.files:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                load: Any = self.model.load_weights
                load((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to close."""


class WeightProof:
    """Methods that `--worker-extension-cls` adds to every worker; called through `/collective_rpc`, so plain JSON in and out."""

    model_runner: Any
    vllm_config: Any
    rank: int

    def llmrl_weights(self) -> dict[str, Any]:
        """Number, bytes and fingerprint (`llmrl.rollout.fingerprint`) of the parameters in this worker's memory now."""
        named = self.model_runner.get_model().named_parameters()
        return fingerprint(parameter for _, parameter in named).to_json()

    def llmrl_describe(self) -> dict[str, Any]:
        """What must agree with the trainer's model and sampling."""
        config = self.vllm_config
        model, parallel, text = config.model_config, config.parallel_config, config.model_config.hf_text_config
        return {
            "model_type": text.model_type,
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "quantization": model.quantization,
            "logprobs_mode": model.logprobs_mode,
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "pipeline_parallel_size": parallel.pipeline_parallel_size,
            "data_parallel_size": parallel.data_parallel_size,
            "weight_transfer": config.weight_transfer_config and config.weight_transfer_config.backend,
            "max_lora_rank": config.lora_config and config.lora_config.max_lora_rank,
        }
