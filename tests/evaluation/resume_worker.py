"""`llmrl eval ...` in a process that kills itself when so many samples were written down, in the middle of writing the next."""

from __future__ import annotations

import os
import signal
import sys

from llmrl.cli.main import main
from llmrl.evaluation.journal import Journal


def kill_after(samples: int) -> None:
    add = Journal.add

    def added(self, *args):
        if len(self.added) == samples:
            os.write(self._file.fileno(), b'{"id": "p0", "sample": 0, "fin')
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, *args)
        self.added.append(args)

    Journal.added, Journal.add = [], added


if __name__ == "__main__":
    if int(sys.argv[1]):
        kill_after(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
