"""What the code under test tries, and that it gets nothing: no pass, no file, no process, no neighbour."""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time

import pytest

from llmrl.errors import ConfigError, RewardError
from llmrl.rewards import sandbox as sandbox_module
from llmrl.rewards.sandbox import Limits, Sandbox

from .conftest import children

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
QUICK = Limits(test_seconds=1.0, seconds=2.0, memory_mb=512)


def make(mode: str) -> Sandbox:
    try:
        made = Sandbox(mode)
    except ConfigError as error:
        pytest.skip(str(error))
    if mode == "full" and not made.files:
        made.close()
        pytest.skip(f"the kernel lets this user have no namespaces: {made.note}")
    return made


@pytest.fixture(scope="module", params=["full", "minimal"])
def box(request):
    made = make(request.param)
    yield made
    made.close()


def verdict(box: Sandbox, code: str, *tests: str, setup: str = "", limits: Limits = QUICK):
    """Shares of tests; by default of one that wants f(3) to be 4."""
    tests = tests or ("assert f(3) == 4",)
    payload = {"kind": "asserts", "setup": setup, "tests": list(tests), "own": [], "stop": False}
    return box.test({"programs": [textwrap.dedent(code)], "entry": None}, payload, limits, len(tests))


RIGHT = "def f(x):\n    return x + 1\n"


def seen(box: Sandbox, expression: str, setup: str = "") -> str:
    """What the code under test sees when it evaluates something: its repr, or the name of the error."""
    code = f"""
{textwrap.dedent(setup)}
def look():
    try:
        return repr({expression})
    except BaseException as error:
        return type(error).__name__
"""
    payload = {"kind": "asserts", "setup": "", "tests": ["raise ValueError(look())"], "own": [], "stop": False}
    (note,) = box.test({"programs": [code], "entry": None}, payload, QUICK, 1).notes
    return note.removeprefix("ValueError: ")


def test_right_and_wrong_code(box):
    assert verdict(box, RIGHT).shares == [1.0]
    for wrong in (
        "def f(x):\n    return x + 2",
        "def f(x):\n    pass",
        "def f(x):\n    raise ValueError",
        "def f():\n    return 4",
        "def g(x):\n    return x + 1",
        "f = 4",
        "",
        "def f(x:\n",
        "import no_such_module\n" + RIGHT,
        RIGHT + "raise SystemExit",
        RIGHT + "1 / 0",
    ):
        assert verdict(box, wrong).shares == [0.0], wrong


FORGERIES = {
    "exit 0": "import os\ndef f(x):\n    os._exit(0)",
    "exit at import": "import os\nos._exit(0)",
    "sys.exit": "import sys\ndef f(x):\n    sys.exit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n    return 5",
    "an equal to everything": "class E:\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x):\n    return E()",
    "an int equal to everything": "class E(int):\n    def __eq__(self, o): return True\n    __hash__ = None\ndef f(x):\n    return E(5)",
    "a list equal to everything": "class E(list):\n    def __eq__(self, o): return True\ndef f(x):\n    return E([5])",
    "assertions off": "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\ndef f(x):\n    return 5",
    "built-ins patched": "import builtins\nbuiltins.compile = builtins.exec = lambda *a, **k: None\ndef f(x):\n    return 5",
    "json patched": "import json\njson.loads = lambda s: {'do': 'call', 'args': [], 'kwargs': {}}\njson.dumps = lambda o: '{\"passed\": 1.0}'\ndef f(x):\n    return 5",
    "the report forged on every descriptor": """
        import json, os, struct
        for text in ({"passed": 1.0, "note": ""}, {"begin": 0}, {"ok": True}):
            body = json.dumps(text).encode()
            for fd in range(64):
                try:
                    os.write(fd, struct.pack(">I", len(body)) + body)
                except OSError:
                    pass
        def f(x):
            return 5
    """,
    "a message that is none": "import os\ndef f(x):\n    os.write(3, b'\\xff' * 4096)\n    return 5",
    "a marker printed": "print('passed', 'OK', '1.0', flush=True)\ndef f(x):\n    print('all tests passed')\n    return 5",
    "frames": """
        import sys
        def f(x):
            frame, found = sys._getframe(), []
            while frame:
                found += list(frame.f_locals.values())
                frame = frame.f_back
            known = [v for v in found if isinstance(v, (str, dict, list)) and "==" + " 4" in repr(v)]
            return 4 if known else 5
    """,
    "memory": """
        import gc
        def f(x):
            mine = "".join(["f(3)", " == ", "4"])
            return 4 if any(mine in o for d in gc.get_objects() if type(d) in (list, tuple) for o in d if type(o) is str) else 5
    """,
    "StopIteration": "def f(x):\n    raise StopIteration",
    "an error of the tests' own": "def f(x):\n    raise AssertionError",
    "keyboard interrupt": "def f(x):\n    raise KeyboardInterrupt",
    "not a number": "def f(x):\n    return float('nan')",
    "recursion": "def f(x):\n    return f(x)",
    "recursion without a limit": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return f(x)",
    "a deep value": "def f(x):\n    v = []\n    for _ in range(10**5):\n        v = [v]\n    return v",
    "a value without end": "import itertools\ndef f(x):\n    return itertools.count()",
    "memory without end": "def f(x):\n    v = [0]\n    while True:\n        v = v * 2",
    "a huge value": "def f(x):\n    return 'x' * 10**8",
    "a huge integer": "def f(x):\n    return 10 ** 10 ** 7",
    "endless output": "def f(x):\n    while True:\n        print('x' * 10**6)",
    "endless loop": "def f(x):\n    while True: pass",
    "endless loop at import": "while True: pass",
    "deadlock": "import threading\ndef f(x):\n    a = threading.Lock()\n    a.acquire()\n    a.acquire()",
    "signals ignored": "import signal\nfor n in range(1, 64):\n    try: signal.signal(n, signal.SIG_IGN)\n    except Exception: pass\ndef f(x):\n    while True: pass",
    "threads": "import threading, time\nfor _ in range(5000):\n    threading.Thread(target=time.sleep, args=(60,)).start()\ndef f(x):\n    return 5",
    "fork bomb": "import os\ndef f(x):\n    while True: os.fork()",
    "fork bomb that goes on": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "a program started": "import subprocess\ndef f(x):\n    return 4 if subprocess.run(['/bin/true']).returncode == 0 else 5",
    "a daemon": "import os\ndef f(x):\n    if os.fork() == 0:\n        os.setsid()\n        os.fork()\n        while True: pass\n    return 5",
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_no_forgery_passes_and_nothing_of_it_stays(box, name):
    here, handles = children(), len(os.listdir("/proc/self/fd"))
    begun = time.monotonic()
    assert verdict(box, FORGERIES[name]).shares == [0.0]
    assert time.monotonic() - begun < 20
    assert children() == here
    assert len(os.listdir("/proc/self/fd")) <= handles  # earlier tests may still close theirs
    assert _descendants(box) == 0
    assert verdict(box, RIGHT).shares == [1.0]  # the sandbox itself is unharmed


def _descendants(box: Sandbox) -> int:
    """Processes of the sandbox besides its first. A keeper may take a moment to end after it has said that its guest is gone."""
    for _ in range(200):
        with open(f"/proc/{box._zygote.pid}/task/{box._zygote.pid}/children") as handle:
            if not (left := handle.read().split()):
                break
        time.sleep(0.02)
    return len(left)


def test_the_empty_loop_is_no_pass(box):
    assert verdict(
        box, "def f(x):\n    raise StopIteration", "assert all(map(lambda x: f(x) == x, [1, 2]))"
    ).shares == [0.0]


def test_code_can_not_redefine_what_tests_compare_with(box):
    code = "set = sorted = abs = len = lambda *a: 1\ndef f(x):\n    return []"
    tests = ["assert set(f(3)) == set([4])", "assert len(f(3)) == 1", "assert sorted(f(3)) == [4]"]
    assert verdict(box, code, *tests).shares == [0.0, 0.0, 0.0]


def test_values_arrive_as_they_are(box):
    values = (
        "[None, True, 1, -(2**70), 1.5, float('inf'), 'é\\ud800', b'x', (1, (2,)), {1, 2}, {(1, 2): [3]}, range(3), 2j]"
    )
    assert verdict(
        box, "def f(x):\n    return x", f"v = {values}\nassert f(v) == v and repr(f(v)) == repr(v)"
    ).shares == [1.0]
    code = """
        import collections, decimal, fractions
        class Point:
            def __init__(self, x): self.x = x
            def doubled(self): return self.x * 2
            def __len__(self): return 0
        def counted(x): return collections.Counter(x)
        def lazily(n): yield from range(n)
        def exact(): return [decimal.Decimal("1.10"), fractions.Fraction(1, 3)]
        def apply(g, x): return g(x)
        def double(x): return 2 * x
        def fails(): raise KeyError("k")
    """
    tests = [
        "assert Point(3).doubled() == 6 and Point(3).x == 3 and not Point(3) and Point(3) != Point(3)",
        "assert counted('aab') == {'a': 2, 'b': 1}",
        "assert list(lazily(3)) == [0, 1, 2]",
        "assert str(exact()[0]) == '1.10' and exact()[1] * 3 == 1",
        "assert apply(double, 4) == 8",
        "try:\n    fails()\nexcept KeyError:\n    pass\nelse:\n    assert False",
    ]
    report = verdict(box, code, *tests)
    assert report.shares == [1.0] * len(tests), report.notes


def test_tests_that_can_not_be_run_are_no_verdict(box):
    with pytest.raises(RewardError, match="hands over a function"):
        verdict(box, "def f(g):\n    return 4", "assert f(lambda: 1) == 4")
    with pytest.raises(RewardError, match="no_such_module"):
        verdict(box, RIGHT, setup="import no_such_module")


def test_the_parent_is_out_of_reach(box, monkeypatch, tmp_path):
    secret = tmp_path / "token"
    secret.write_text("hunter2")
    secret.chmod(0o644)
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", "hunter2")
    me = os.getpid()
    for expression in (
        f"open({str(secret)!r}).read()",
        f"open('/proc/{me}/environ').read()",
        "open(f'/proc/{__import__(\"os\").getppid()}/environ').read()",
        "open('/proc/self/environ').read()",
        "open('/etc/passwd').read()",
        "open('/root/.ssh/id_rsa').read()",
        f"open({__file__!r}).read()",
        f"os.listdir({str(tmp_path)!r})",
        f"os.symlink({str(secret)!r}, '/tmp/link') or open('/tmp/link').read()",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"os.chdir({str(tmp_path)!r})",
        "os.mkdir('/new')",
        f"os.kill({me}, 9)",
        "os.kill(os.getppid(), 9)",
        "os.kill(-1, 9)",
        "os.killpg(0, 0)",
        f"os.pidfd_open({me})",
        "os.setuid(0)",
        "os.chroot('/tmp')",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "socket.socket()",
        "socket.create_connection(('127.0.0.1', 22), 1)",
        "socket.create_connection(('1.1.1.1', 53), 1)",
        "socket.socket(socket.AF_UNIX)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        f"fcntl.fcntl(0, fcntl.F_SETOWN, {me})",
        "fcntl.fcntl(0, 10, 9)",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ):
        what = seen(
            box,
            expression,
            "import ctypes, fcntl, os, resource, socket",
        )
        refused = {"PermissionError", "FileNotFoundError", "ProcessLookupError", "OSError", "ValueError"}
        assert what in refused, f"{expression}: {what}"  # and not a NameError, say
        assert "hunter2" not in what
    for call in (
        f"process_vm_readv({me}, 0, 0, 0, 0, 0)",
        "ptrace(16, 1, 0, 0)",
        "unshare(0x10000000)",
        "mount(b'a', b'/tmp', b'tmpfs', 0, 0)",
        "syscall(425, 1, 0)",
        "setns(3, 0)",
    ):
        assert seen(box, f"ctypes.CDLL(None).{call}", "import ctypes") == "-1", call
    environment = eval(seen(box, "dict(os.environ)", "import os"))
    assert sorted(environment) == ["HOME", "LANG", "TZ"]
    assert int(seen(box, "os.geteuid()", "import os")) != 0
    assert sorted(tmp_path.iterdir()) == [secret] and secret.read_text() == "hunter2"


def test_what_code_may_do(box):
    """Threads, clocks, the standard library; where it has a tree of its own, also files in /tmp that the next run does not see."""
    assert (
        seen(
            box, "r", "import threading\nr = []\nt = threading.Thread(target=r.append, args=(1,))\nt.start()\nt.join()"
        )
        == "[1]"
    )
    assert (
        seen(
            box, "asyncio.run(main())", "import asyncio\nasync def main():\n    await asyncio.sleep(0.01)\n    return 2"
        )
        == "2"
    )
    assert (
        seen(box, "dataclasses.asdict(P(1))", "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: int")
        == "{'x': 1}"
    )
    assert seen(box, "input()") == "EOFError"
    if box.files:
        write = "open('/tmp/mine', 'x').write('a') and os.listdir('.')"
        assert [seen(box, write, "import os") for _ in range(2)] == ["['mine']"] * 2
        assert seen(box, "os.listdir('/')", "import os") == seen(
            box, "sorted(os.listdir('/'), key=os.listdir('/').index)", "import os"
        )
        assert not {"'etc'", "'home'", "'proc'", "'var'"} & set(
            seen(box, "os.listdir('/')", "import os").strip("[]").split(", ")
        )
        assert seen(box, "sqlite3.connect(':memory:').execute('select 1').fetchone()", "import sqlite3") in (
            "(1,)",
            "NameError",
            "ModuleNotFoundError",
        )
        full = "open('/tmp/big', 'wb').write(bytes(17 << 20))"
        assert seen(box, full, "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)") == "OSError"
    else:
        assert seen(box, "open('/tmp/mine', 'w')") == "PermissionError"


def test_programs_read_and_print(box):
    def run(code, *inputs, stop=False, limits=QUICK):
        payload = {"programs": [textwrap.dedent(code)], "entry": None}
        return box.run(
            payload, inputs, limits, lambda n, out: None if out.strip() == "ok" else f"printed {out!r}", stop
        )

    assert run("print(input())", "ok", "no").shares == [1.0, 0.0]
    assert run("if __name__ == '__main__':\n    import sys\n    print(sys.stdin.read())", "ok").shares == [1.0]
    for wrong, says in {
        "print('ok'); 1 / 0": "code 1",
        "import os; print('ok', flush=True); os._exit(3)": "code 3",
        "import os; print('ok', flush=True); os.kill(os.getpid(), 9)": "code -9" if not box.files else "",
        "while True: print('ok' * 1000)": "more than",
        "print('ok', flush=True)\nwhile True: pass": "out of time",
        "import os; os.write(1, b'ok'); os.close(1)\nwhile True: pass": "out of time",
        "def f(:": "code 1",
        "import os; [os.write(fd, b'ok') for fd in range(2, 64)]": "",
    }.items():
        report = run(wrong, "ok")
        assert "kill" in wrong or report.shares == [0.0], wrong
        assert says in report.notes[0], (wrong, report)
    assert run("print('no')", "a", "b", stop=True).notes[1] == "not reached"


@pytest.mark.slow
def test_hostile_ones_in_flight_do_not_touch_a_neighbour(box):
    """32 hostile runs in 8 sandboxes beside good ones in another: the good ones all pass, the hostile ones all fail."""
    names = [n for n in FORGERIES if "huge" not in n]
    results: dict[int, list[float]] = {}
    mode = "full" if box.files else "minimal"

    def hostile(worker: int) -> None:
        mine = make(mode)
        try:
            for k in range(4):
                number = worker * 4 + k
                results[number] = verdict(mine, FORGERIES[names[number % len(names)]]).shares
        finally:
            mine.close()

    threads = [threading.Thread(target=hostile, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    good = []
    while any(t.is_alive() for t in threads):
        good.append(verdict(box, RIGHT, limits=Limits()).shares)
    assert len(results) == 32 and set(map(tuple, results.values())) == {(0.0,)}
    assert len(good) > 3 and all(g == [1.0] for g in good)


def test_it_ends_with_its_host(box):
    """A worker that is killed in the middle of a run leaves nothing: the keeper sees the other end of its socket close."""
    script = f"""
import os, threading, time
from llmrl.rewards.sandbox import Limits, Sandbox
box = Sandbox({"full" if box.files else "minimal"!r})
payload = {{"kind": "asserts", "setup": "", "tests": ["assert f()"], "own": [], "stop": False}}
code = {{"programs": ["def f():\\n    while True: pass"], "entry": None}}
threading.Thread(target=box.test, args=(code, payload, Limits(60.0, 60.0), 1), daemon=True).start()
time.sleep(1.5)
pid = box._zygote.pid
keepers = open(f"/proc/{{pid}}/task/{{pid}}/children").read().split()
guests = [open(f"/proc/{{k}}/task/{{k}}/children").read().strip() for k in keepers]
print(pid, *keepers, *guests, flush=True)
os.kill(os.getpid(), 9)
"""
    import subprocess

    from .conftest import alive, wait_until

    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split()
    assert len(out) == 5, out
    assert wait_until(lambda: not any(alive(int(p)) for p in out))


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox_module.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="needs Linux"):
        Sandbox()
