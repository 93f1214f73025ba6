"""The run over two machines (network namespaces), as it is documented; its other part, with a server, needs minutes more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "two_hosts.sh"


def namespaces() -> bool:
    """Root, the tools, and a kernel that lets us: some containers do not."""
    if os.name != "posix" or os.getuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "setpriv"))):
        return False
    tried = "ip link add llmrl0 type bridge && ip link add llmrl1 type veth peer name llmrl2"
    return (
        subprocess.run(
            ["unshare", "--net", "--mount", "--pid", "--fork", "bash", "-c", tried], capture_output=True
        ).returncode
        == 0
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not namespaces(), reason="needs root, iproute2, util-linux and network namespaces")
def test_two_machines_train_to_the_numbers_of_one_process_and_stop_together(tmp_path):
    environment = {**os.environ, "DIR": str(tmp_path / "run"), "BIN": str(Path(sys.executable).parent)}
    done = subprocess.run(
        ["bash", str(SCRIPT), "sft"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGTERM to train1 alone: both ended with 143" in done.stdout
    assert done.stdout.endswith("two_hosts: done\n")
