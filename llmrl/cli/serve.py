"""`llmrl serve --model M` starts a generation server, `llmrl serve --check URL` looks at one that runs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmrl.errors import ConfigError

if TYPE_CHECKING:
    from llmrl.rollout.vllm_client import VLLMServer

_EPILOG = """\
The server is stock vLLM with the routes open that training needs. It demands `Authorization: Bearer TOKEN` on every route: the token
of $LLMRL_SERVER_TOKEN, or of --token-file when it exists, or else a new one, written to --token-file (default ~/.llmrl/token-PORT),
where a trainer on this machine finds it. A --host that other machines reach needs one of the first two. Plain HTTP shows the token to
the network: across machines use --ssl-certfile and --ssl-keyfile after --, or a network of your own.

Then train with rollout.engine=vllm_server rollout.urls=[http://127.0.0.1:8000]. Ctrl-C or SIGTERM ends the server.

  llmrl serve --model runs/sft/model
  llmrl serve --model Qwen/Qwen2.5-1.5B --tensor-parallel-size 2 --port 8001 -- --gpu-memory-utilization 0.8
  llmrl serve --check http://127.0.0.1:8001"""


def run(argv: Sequence[str]) -> int:
    """Does not return when the server starts: the process becomes it. With --check, 0 for a server to train with and 1 for none."""
    own, rest = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, rest = own[:at], own[at + 1 :]
    parser = _parser()
    known, unknown = parser.parse_known_args(own)
    if unknown:
        parser.error(f"{unknown[0]} is no option of llmrl serve; arguments of vLLM come after --")
    args = vars(known)
    url, model = args.pop("check"), args.pop("model")
    if (url is None) == (model is None):
        parser.error("give --model M to start a server, or --check URL to look at one")
    given = {name: value for name, value in args.items() if value is not None}
    if url is not None:
        for name in given.keys() - {"token_file"}:
            parser.error(f"--{name.replace('_', '-')} is for starting a server, not for --check")
        return check(url, given.get("token_file"))
    from llmrl.rollout.vllm_server import ServeOptions, launch

    launch(ServeOptions(model, vllm_args=tuple(rest), **given))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmrl serve",
        usage="llmrl serve --model M [option ...] [-- vLLM's arguments]\n       llmrl serve --check URL [--token-file F]",
        description="Starts a generation server for training, or looks at one.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="M", help="directory of the model, or its name on the hub; the same as the recipe's")
    add(
        "--check",
        metavar="URL",
        help="report what the server at URL serves and how fast; exit code 1 if it can't be trained with",
    )
    add("--host", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=int, metavar="N", help="(default: 8000)")
    add("--tensor-parallel-size", type=int, metavar="N", help="devices that share one copy of the model (default: 1)")
    add("--data-parallel-size", type=int, metavar="N", help="copies of the model behind this address (default: 1)")
    add("--dtype", help="bfloat16, float16 or float32; the trainer's (default: float32 on the CPU; else vLLM's choice, "
        "which is the checkpoint's or bfloat16 where that is float32)")  # fmt: skip
    add("--max-model-len", type=int, metavar="N", help="tokens of prompt and completion (default: the model's own)")
    add("--max-lora-rank", type=int, metavar="R", help="take LoRA adapters up to this rank (default: none)")
    add("--transfer", choices=("disk", "nccl"), help="how weights come in: files, or GPU to GPU (default: disk)")
    add("--token-file", metavar="F", help="file with the token; written when it does not exist")
    return parser


def check(url: str, token_file: str | None) -> int:
    """Prints what there is to know about a server, and returns 0 when training could use it now."""
    from llmrl.rollout.vllm_client import ServerError, VLLMServer, find_token

    try:
        token = find_token(url, token_file)
    except ConfigError as error:
        print(f"not usable: {error}")
        return 1
    server = VLLMServer(url, token, timeout=10.0)
    try:
        facts = {name: str(value) for name, value in _facts(server).items()}
        for name, value in facts.items():
            print(f"{name:<16}{value}", flush=True)
        if server.is_paused():
            print(
                "not usable now: it is paused, as while weights are sent to it; a sync that fails leaves it so until one succeeds"
            )
            return 1
        print(f"{'latency':<16}{_seconds(server, 1, 1) * 1e3:.0f} ms for one token")
        print(
            f"{'speed':<16}{_TOKENS * _ROWS / _seconds(server, _TOKENS, _ROWS):.0f} tokens/s in {_ROWS} completions at once"
        )
    except ServerError as error:
        print(f"not usable: {error}")
        return 1
    finally:
        server.close()
    return 0


_TOKENS, _ROWS = 32, 8
_FIRST = 120.0
"""Seconds for a first request, which may compile."""


def _facts(server: VLLMServer) -> dict[str, Any]:
    facts = server.describe()
    rank = facts.get("max_lora_rank")
    return {
        "model": facts.get("model"),
        "architecture": f"{facts['model_type']}, {facts['num_hidden_layers']} layers of {facts['hidden_size']}, "
        f"{facts['vocab_size']} tokens in the vocabulary",
        "vLLM": facts.get("vllm"),
        "dtype": facts["dtype"] + (f", quantised: {facts['quantization']}" if facts.get("quantization") else ""),
        "max_model_len": facts["max_model_len"],
        "parallel": f"tensor {facts['tensor_parallel_size']} x data {facts['data_parallel_size']} x pipeline "
        f"{facts['pipeline_parallel_size']}, {server.world_size()} workers",
        "transfer": facts["weight_transfer"],
        "LoRA": f"adapters up to rank {rank}" if rank else "no adapters",
        "weights": server.weight_label(),
    }


def _seconds(server: VLLMServer, tokens: int, rows: int) -> float:
    """How long `rows` completions of `tokens` tokens take, after one that does not count."""
    body = {
        "token_ids": [1, 2, 3],
        "cache_salt": "llmrl serve --check",
        "sampling_params": {"n": rows, "max_tokens": tokens, "ignore_eos": True, "logprobs": 0, "detokenize": False},
    }
    server.generate(body, _FIRST)
    start = time.perf_counter()
    server.generate(body, _FIRST)
    return time.perf_counter() - start
