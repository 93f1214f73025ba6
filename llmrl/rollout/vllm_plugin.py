"""What vLLM loads at start, in every one of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations


def register() -> None:
    """Registers the `disk` weight transfer, and keeps CPU layers from computing with weights that they packed at start.

    vLLM's CPU build packs linear layers for oneDNN once, when the model is loaded; after a weight update it would go on with the
    packed copies and answer with a mixture of old and new weights, with status 200. May be called more than once, as vLLM does.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if "disk" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("disk", "llmrl.rollout.vllm_worker", "DiskWeightTransferEngine")
    if current_platform.is_cpu():
        import vllm._custom_ops

        vllm._custom_ops._supports_onednn = False
