"""The sandbox's first process: a clean interpreter, confined once, which forks a guest for each program in some milliseconds.

Run by path as `python -P -s -S -B sandbox_zygote.py CONTROL MODE`, with an empty environment. Requests come over the socket CONTROL, a JSON
object each with descriptors: the payload (a memory file), the guest's life (a socket), then the guest's own. Standard library only.

    host -- zygote -- keeper -- guest        The keeper is the guest's parent. It kills the guest when the host lets go of `life`,
                                             and says there how the guest ended.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import sys
from typing import Any

# What programs usually import. Where files can't be opened, nothing else of the standard library can be imported.
PRELOADED = [
    "abc",
    "array",
    "ast",
    "base64",
    "binascii",
    "bisect",
    "calendar",
    "cmath",
    "collections",
    "collections.abc",
    "contextlib",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "gc",
    "hashlib",
    "heapq",
    "importlib.util",
    "inspect",
    "io",
    "itertools",
    "json",
    "math",
    "numbers",
    "operator",
    "os.path",
    "pprint",
    "queue",
    "random",
    "re",
    "statistics",
    "string",
    "struct",
    "sys",
    "textwrap",
    "threading",
    "time",
    "traceback",
    "types",
    "typing",
    "unicodedata",
    "uuid",
    "zlib",
    "encodings.ascii",
    "encodings.latin_1",
    "encodings.utf_8",
    "encodings.idna",
    "encodings.utf_16",
    "_strptime",
    "asyncio",
    "concurrent.futures",
    "csv",
    "ctypes",
    "subprocess",
    "tempfile",
]
MAX_DESCRIPTORS = 8


def _sibling(name: str) -> Any:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main(control: socket.socket, mode: str) -> None:
    kernel, guest = _sibling("sandbox_kernel"), _sibling("sandbox_guest")
    for name in PRELOADED:
        __import__(name)
    os.environ.clear()
    os.environ.update({"HOME": "/tmp", "LANG": "C.UTF-8", "TZ": "UTC"})
    null = os.open("/dev/null", os.O_RDWR)
    gc.collect()
    gc.freeze()  # else each guest's first collection would copy all pages
    answer, user = _confine(kernel, mode)
    control.send(json.dumps(answer).encode())
    if "refused" in answer:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers need no funeral
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, MAX_DESCRIPTORS)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            try:
                _keep(kernel, guest, json.loads(message), descriptors, null, answer["files"], user)
            finally:
                os._exit(1)
        for descriptor in descriptors:
            os.close(descriptor)


def _confine(kernel: Any, mode: str) -> tuple[dict[str, Any], int | None]:
    """What is on, for the host, and the user that guests become."""
    if not kernel.filter_supported():
        return {"refused": "this kernel or machine has no filter for system calls (seccomp on x86_64 or aarch64)"}, None
    user = kernel.NOBODY if os.geteuid() == 0 else None
    why = "not asked for"
    if mode == "full":
        # In a process of its own first: half a tree could not be taken back.
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                kernel.enter_namespaces()
                os.write(write, b"ok")
            except BaseException as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.close(write)
        why = os.read(read, 4096).decode() or "it died"
        os.waitpid(child, 0)
        os.close(read)
        if why == "ok":
            user = kernel.enter_namespaces()
            return {"files": True, "namespaces": True, "note": ""}, user
    return {"files": False, "namespaces": False, "note": why}, user


def _keep(
    kernel: Any, guest: Any, job: dict[str, Any], descriptors: list[int], null: int, files: bool, user: int | None
) -> None:
    """Starts the guest, waits for its end or the host's, and reports it."""
    payload, life, *own = descriptors
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ready, confined = os.pipe()
    try:
        if files:
            kernel.mount_tmp()
            kernel.unshare(kernel.CLONE_NEWPID)
        child = os.fork()
    except OSError as error:
        os.write(life, json.dumps({"broken": str(error)}).encode() + b"\n")
        return
    if child == 0:
        try:
            _become_guest(kernel, guest, job, payload, own, null, confined, files, user)
        finally:
            os._exit(70)
    for descriptor in (payload, confined, *own):
        os.close(descriptor)
    said = os.read(ready, 4096).decode()
    about = {"pid": child} if said == "confined" else {"broken": said or "its process ended"}
    os.write(life, json.dumps(about).encode() + b"\n")
    process = os.pidfd_open(child)
    poll = select.poll()
    poll.register(life, select.POLLIN)
    poll.register(process, select.POLLIN)
    if process not in [fd for fd, _ in poll.poll()]:
        os.kill(child, signal.SIGKILL)  # first of its namespace: nothing outlives it
    _, status = os.waitpid(child, 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = {"code": os.waitstatus_to_exitcode(status), "cpu": used.ru_utime + used.ru_stime}
    with contextlib.suppress(OSError):  # the host may be gone
        os.write(life, json.dumps(ended).encode() + b"\n")
    os._exit(0)


def _become_guest(
    kernel: Any, guest: Any, job: dict[str, Any], payload: int, own: list[int], null: int, confined: int, files: bool,
    user: int | None,
) -> None:  # fmt: skip
    """Descriptors 0 to 2 are nothing, or a program's input and output; 3 and up are the guest's channels.

    What goes wrong before the guest's own code runs is said on `confined`: it must not count as a wrong answer.
    """
    try:
        os.setsid()
        text = b"".join(iter(lambda: os.read(payload, 1 << 20), b""))
        own = [*own, null] if job["role"] == "program" else [null, null, null, *own]
        high = 200  # above whatever is open
        confined = os.dup2(confined, high - 1)
        moved = [os.dup2(fd, high + n) for n, fd in enumerate(own)]
        for number, fd in enumerate(moved):
            os.dup2(fd, number)
        confined = os.dup2(confined, len(moved))
        os.closerange(len(moved) + 1, 4096)
        kernel.set_limits(job["cpu_seconds"], job["memory_bytes"])
        kernel.drop_privileges(user)
        for signal_number in (signal.SIGINT, signal.SIGPIPE):
            signal.signal(signal_number, signal.SIG_DFL)
        sys.argv[:] = [""]
        sys.modules["random"].seed(0)
        if not files:
            os.chdir("/")
        payload_data = json.loads(text)
        kernel.allow_only(files)
    except BaseException as error:
        os.write(confined, f"{type(error).__name__}: {error}".encode())
        raise
    os.write(confined, b"confined")
    os.close(confined)
    guest.run(job["role"], payload_data)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
