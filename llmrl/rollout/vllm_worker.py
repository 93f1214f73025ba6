"""What runs inside vLLM's workers: the `disk` weight transfer, and what a worker can say about the weights that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from llmrl.rollout.fingerprint import Fingerprint, fingerprint


@dataclass
class DiskInitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on before files are read."""


@dataclass
class DiskUpdateInfo(WeightTransferUpdateInfo):
    """`files`: paths of safetensors files, with the names and shapes of the checkpoint, that this worker can read."""

    files: list[str]


class DiskWeightTransferEngine(WeightTransferEngine[DiskInitInfo, DiskUpdateInfo]):
    """Loads weights from safetensors files, one or more an update, through the same layer-wise reload as vLLM's own engines.

    The model is touched when the first update's files have been opened and found whole: until then a missing or truncated file leaves
    it as it was. An update that breaks off later leaves it unusable until a whole one has succeeded.
    """

    init_info_cls = DiskInitInfo
    update_info_cls = DiskUpdateInfo
    _begun = False
    received = Fingerprint()
    """Of what this update's files held, before any layer transformed, sharded or ignored it."""

    def init_transfer_engine(self, init_info: DiskInitInfo) -> None:
        """Nothing to open."""

    def start_weight_update(self) -> None:
        self._begun, self.received = False, Fingerprint()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class waits for an accelerator, which the CPU build does not have; loading from a file is synchronous.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: DiskUpdateInfo) -> None:
        """Raises RuntimeError, with the file's name, for one that can't be read."""
        for path in update_info.files:
            _check(path)
        if not self._begun:
            self._begin()
        for path in update_info.files:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                load: Any = self.model.load_weights
                load(self._read(file))

    def _read(self, file: Any) -> Iterator[tuple[str, Any]]:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            self.received += fingerprint([tensor])
            yield name, tensor

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._begun:
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to close."""

    def _begin(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        initialize_layerwise_reload(self.model)
        for layer in self.model.modules():
            # What an update that broke off had buffered: vLLM would count it as a part of this one, and take half a layer for a whole.
            info = get_layerwise_info(layer)
            info.loaded_weights.clear()
            info.load_numel = 0
        self._begun = True


def _check(path: str) -> None:
    """Opens the file, which compares its size with what its header promises."""
    try:
        with safe_open(path, framework="pt") as file:
            if not list(file.keys()):
                raise ValueError("it holds no tensors")
    except Exception as error:  # safetensors has an error class of its own for each kind of damage
        raise RuntimeError(f"weights can't be read from {path}: {error}") from error


class WeightProof:
    """Methods that `--worker-extension-cls` adds to every worker; called through `/collective_rpc`, so plain JSON in and out."""

    model_runner: Any
    vllm_config: Any
    weight_transfer_engine: Any
    rank: int

    def llmrl_weights(self) -> dict[str, Any]:
        """Number, bytes and fingerprint (`llmrl.rollout.fingerprint`) of the parameters in this worker's memory now.

        Raises RuntimeError while an update is under way: another run's, or one that broke off.
        """
        parameters = list(self.model_runner.get_model().parameters())
        if any(parameter.is_meta for parameter in parameters):
            raise RuntimeError("a weight update of this server is under way, so its weights can't be read")
        return fingerprint(parameters).to_json()

    def llmrl_received(self) -> dict[str, Any]:
        """The fingerprint of the tensors that this worker read in its last update; empty where the transfer does not count them."""
        received = getattr(self.weight_transfer_engine, "received", None)
        return {} if received is None else received.to_json()

    def llmrl_describe(self) -> dict[str, Any]:
        """What must agree with the trainer's model and sampling, and what a person wants to know."""
        import vllm

        config = self.vllm_config
        model, parallel, text = config.model_config, config.parallel_config, config.model_config.hf_text_config
        return {
            "vllm": vllm.__version__,
            "model": model.model,
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
