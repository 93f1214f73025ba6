"""`python -m llmrl.rewards.worker`: a clean interpreter that runs one reward function for a runner.

Its own pipes carry the protocol, so what user code prints goes to stderr and can't corrupt it. It dies with its runner:
a guard process in the same process group waits on a pipe that only the runner holds open, and kills the group at its end
(a thread could be starved by C code that keeps the GIL, and `PR_SET_PDEATHSIG` spares the children that a function has started).
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from typing import Any

from llmrl.errors import LLMRLError
from llmrl.rewards.call import BoundFunction, event_loop
from llmrl.rewards.load import resolve
from llmrl.rewards.protocol import read_message, write_message


def main(argv: list[str]) -> int:
    """argv: the descriptors to read tasks from, to write results to, and to watch for the runner's end."""
    tasks, results, lifeline = (int(a) for a in argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _start_guard(tasks, results, lifeline)
    for fd in (tasks, results):
        os.set_inheritable(fd, False)
    setup = read_message(tasks)
    if setup is None:
        return 0
    sys.path[:] = setup["sys_path"]
    try:
        bound = resolve(setup["target"], setup["args"], setup["name"])
        bound.warm_up()
    except LLMRLError as error:
        write_message(results, {"refused": type(error).__name__, "message": str(error)})
        return 1
    _limit_memory(setup["memory_bytes"]["row" if bound.rowwise else "batch"])
    write_message(results, {"ready": bound.describe()})
    _serve(bound, tasks, results)
    return 0


def _serve(bound: BoundFunction, tasks: int, results: int) -> None:
    me = os.getpid()
    with event_loop() as resolve_awaitable:
        while (message := read_message(tasks)) is not None:
            write_message(results, {"started": len(message["tasks"])})
            for task in message["tasks"]:
                begun = time.monotonic()
                if "check" in task:
                    answer: dict[str, Any] = {"problem": bound.check_gold(task["check"])}
                else:
                    answer = bound.run(task, resolve_awaitable).to_json()
                if os.getpid() != me:  # a fork that the function has come back from: the answer is its parent's to give
                    os._exit(0)
                write_message(results, {"result": answer, "seconds": time.monotonic() - begun})


def _start_guard(tasks: int, results: int, lifeline: int) -> None:
    """Forks, before any thread or user code exists, the process that ends this group when the runner is gone."""
    if os.fork() == 0:
        try:
            os.close(tasks)
            os.close(results)
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            os.read(lifeline, 1)
        finally:
            os.killpg(os.getpgrp(), signal.SIGKILL)
    os.close(lifeline)


def _limit_memory(limit: int | None) -> None:
    """`limit` bytes of address space on top of what loading took, so that big imports do not count."""
    if limit is None or not os.path.exists("/proc/self/statm"):
        return
    with open("/proc/self/statm") as handle:
        now = int(handle.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + limit
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
