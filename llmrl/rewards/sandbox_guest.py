"""What runs inside the sandbox: a *candidate* (the code under test, which answers calls), a *checker* (the tests, in a process that the code
under test never enters), or a *program* (the code under test with a standard input and output). Standard library only; loaded by path.

Between candidate and checker go plain values, as JSON. Whatever else a call gives stays in the candidate; the checker gets a handle, which
equals nothing but itself. So the code under test can pass a test only with a value that passes it: it sees neither the expected values
nor the process that compares.
"""

from __future__ import annotations

import ast
import builtins
import collections
import decimal
import fractions
import itertools
import json
import os
import struct
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

LINK = 3
REPORT = 4
MAX_FRAME = 16 << 20
MAX_ITEMS = 200_000
_LENGTH = struct.Struct(">I")


def run(role: str, payload: dict[str, Any]) -> None:
    """The guest's whole life. payload: see `candidate`, `checker` and `program`."""
    sys.setrecursionlimit(3000)
    sys.set_int_max_str_digits(0)
    {"candidate": candidate, "checker": checker, "program": program}[role](payload)


class Unportable(BaseException):
    """A test hands over what is no plain value: the test can't be run here. No test's `except Exception` catches it."""


class CandidateFailed(Exception):
    """The code under test raised something that is no built-in exception, or is gone."""


# Values: JSON's own for None, bool, str, small integers, floats and lists; {"t": kind, "v": value} for the rest.
_SEQUENCES: dict[Any, str] = {
    tuple: "tuple", set: "set", frozenset: "frozenset", collections.deque: "deque",
    type({}.keys()): "keys", type({}.values()): "values",
}  # fmt: skip

_ITEMS: Any = type({}.items())


def encode(value: Any, other: Callable[[Any], dict[str, Any]]) -> Any:
    """`value` as JSON. Subclasses of plain types become plain, iterators are run; what is left is what `other` makes of it."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        value = int.__add__(value, 0)
        return value if abs(value) < 1 << 53 else {"t": "int", "v": hex(value)}
    if isinstance(value, float):
        return float.__add__(value, 0.0)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(v, other) for v in list.__iter__(value)]
    if isinstance(value, dict):
        return {"t": "dict", "v": [[encode(k, other), encode(v, other)] for k, v in dict.items(value)]}
    for sequence, name in _SEQUENCES.items():
        if isinstance(value, sequence):
            return {"t": name, "v": [encode(v, other) for v in sequence.__iter__(value)]}
    kind = type(value)
    if kind in (bytes, bytearray):
        return {"t": kind.__name__, "v": value.hex()}
    if kind is range:
        return {"t": "range", "v": [value.start, value.stop, value.step]}
    if kind is complex:
        return {"t": "complex", "v": [value.real, value.imag]}
    if kind in (decimal.Decimal, fractions.Fraction):
        return {"t": kind.__name__, "v": str(value)}
    if isinstance(value, _ITEMS):
        return {"t": "items", "v": [encode(v, other) for v in value]}
    if hasattr(kind, "__next__") and not isinstance(value, Remote):
        return {"t": "iterator", "v": [encode(v, other) for v in itertools.islice(value, MAX_ITEMS)]}
    return other(value)


_MAKE: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque, "iterator": iter,
    "keys": lambda v: dict.fromkeys(v).keys(), "values": lambda v: dict(enumerate(v)).values(), "items": lambda v: dict[Any, Any](v).items(),
    "dict": dict,
}  # fmt: skip


def decode(data: Any, handle: Callable[[int], Any]) -> Any:
    """What `encode` wrote. Raises ValueError, TypeError or KeyError for anything else."""
    if isinstance(data, list):
        return [decode(v, handle) for v in data]
    if not isinstance(data, dict):
        return data
    kind, value = data["t"], data["v"]
    if kind in _MAKE:
        return _MAKE[kind](decode(value, handle))
    if kind == "int":
        return int(value, 16)
    if kind in ("bytes", "bytearray"):
        return (bytes if kind == "bytes" else bytearray).fromhex(value)
    if kind == "range":
        return range(*map(int, value))
    if kind == "complex":
        return complex(float(value[0]), float(value[1]))
    if kind in ("Decimal", "Fraction"):
        return decimal.Decimal(value) if kind == "Decimal" else fractions.Fraction(value)
    if kind == "handle":
        return handle(int(value))
    raise ValueError(f"no value of kind {kind!r}")


def send(fd: int, message: Any) -> None:
    body = json.dumps(message).encode()
    if len(body) > MAX_FRAME:
        raise ValueError(f"a value of {len(body)} bytes is over the limit of {MAX_FRAME}")
    view = memoryview(_LENGTH.pack(len(body)) + body)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int) -> Any:
    """The next message. Raises EOFError when the other side is gone or says too much."""

    def exactly(count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = os.read(fd, min(count - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    (length,) = _LENGTH.unpack(exactly(_LENGTH.size))
    if length > MAX_FRAME:
        raise EOFError
    return json.loads(exactly(length))


# --- the code under test


def load(programs: list[str], entry: str | None, name: str) -> types.ModuleType:
    """Runs the first of `programs` that compiles and defines `entry` (if none does, the first that compiles)."""
    chosen, broken = None, None
    for text in programs:
        try:
            tree = ast.parse(text)
            code = compile(tree, "<completion>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            broken = broken or error
            continue
        chosen = chosen or code
        if entry is None or entry in _defined(tree):
            chosen = code
            break
    if chosen is None:
        raise broken or SyntaxError("no code")
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(chosen, module.__dict__)
    return module


def _defined(tree: ast.Module) -> set[str]:
    """Names that a module binds, wherever in it; imported ones too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name.partition(".")[0])
    return found


def candidate(payload: dict[str, Any]) -> None:
    """Answers calls. payload: {"programs": texts to choose from, "entry": the name that one must define, or None}."""
    objects: list[Any] = []
    problem: BaseException | None = None
    module = types.ModuleType("candidate")
    try:
        module = load(payload["programs"], payload["entry"], "candidate")
    except BaseException as error:
        problem = error

    def keep(value: Any) -> dict[str, Any]:
        objects.append(value)
        return {"t": "handle", "v": len(objects) - 1}

    actions: dict[str, Callable[..., Any]] = {
        "name": lambda name: getattr(module, name),
        "call": lambda function, *args, **kwargs: function(*args, **kwargs),
        "get": getattr, "set": setattr, "item": lambda o, k: o[k], "len": len, "bool": bool, "iter": iter, "str": str, "repr": repr,
    }  # fmt: skip
    while True:
        try:
            request = receive(LINK)
        except EOFError:
            return
        try:
            if problem is not None:
                raise problem
            arguments = [decode(a, objects.__getitem__) for a in request["args"]]
            keywords = {k: decode(v, objects.__getitem__) for k, v in request["kwargs"].items()}
            answer: dict[str, Any] = {"ok": encode(actions[request["do"]](*arguments, **keywords), keep)}
            send(LINK, answer)
        except BaseException as error:
            names = [c.__name__ for c in type(error).__mro__]
            send(LINK, {"raised": names, "text": _text(error)})


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:
        return ""


def program(payload: dict[str, Any]) -> None:
    """The code under test as a program, by its descriptors 0, 1 and 2. payload as for `candidate`."""
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    code = 0
    try:
        load(payload["programs"], None, "__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        code = 1
    try:
        sys.stdout.flush()
    except BaseException:
        code = code or 1
    os._exit(code & 255)


# --- the tests


class Remote:
    """An object that lives in the candidate. Comparing it is comparing identity: the code under test has no say in it."""

    __slots__ = ("_ask", "_number")

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", self, *args, **kwargs)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", self, key)

    def __len__(self) -> int:
        return self._ask("len", self)

    def __bool__(self) -> bool:
        return self._ask("bool", self)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("iter", self))

    def __str__(self) -> str:
        return self._ask("str", self)

    def __repr__(self) -> str:
        return self._ask("repr", self)


class Named:
    """What stands for a name of the candidate in a test. It is looked up there at each use."""

    def __init__(self, link: Candidate, name: str) -> None:
        self._link, self._name = link, name

    def _resolve(self) -> Any:
        return self._link.ask("name", self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._link.ask("call", self._resolve(), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._resolve(), name)


class Candidate:
    """The checker's side of the link."""

    def __init__(self) -> None:
        self._remotes: dict[int, Remote] = {}

    def named(self, name: str) -> Named:
        return Named(self, name)

    def _remote(self, number: int) -> Remote:
        return self._remotes.setdefault(number, Remote(self.ask, number))

    def ask(self, action: str, *args: Any, **kwargs: Any) -> Any:
        def portable(value: Any) -> dict[str, Any]:
            if type(value) is Remote:
                return {"t": "handle", "v": value._number}
            if type(value) is Named:
                return encode(value._resolve(), portable)
            raise Unportable(f"the test hands over a {type(value).__name__}; only plain values can be handed over")

        request = {
            "do": action, "args": [encode(a, portable) for a in args], "kwargs": {k: encode(v, portable) for k, v in kwargs.items()},
        }  # fmt: skip
        try:
            send(LINK, request)
            answer = receive(LINK)
            if "ok" in answer:
                return decode(answer["ok"], self._remote)
            names, text = [str(n) for n in answer["raised"]], str(answer["text"])
        except (EOFError, OSError):
            raise CandidateFailed("the code under test is gone") from None
        except (ValueError, TypeError, KeyError, RecursionError, AttributeError) as error:
            raise CandidateFailed(f"no value that can be carried: {error}") from None
        for name in names:
            known = getattr(builtins, name, None)
            # StopIteration would end the loop of a test that holds for each of no cases.
            if (
                isinstance(known, type)
                and issubclass(known, Exception)
                and not issubclass(known, StopIteration | StopAsyncIteration)
            ):
                raise _made(known, text)
        raise CandidateFailed(f"{names[0] if names else 'error'}: {text}")


def _made(kind: type[Exception], text: str) -> Exception:
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError and its kin take more than a text
        return CandidateFailed(f"{kind.__name__}: {text}")


def checker(payload: dict[str, Any]) -> None:
    """Runs the tests and reports each: {"begin": n}, then {"passed": share, "note": text}; {"unusable": reason} ends it.

    payload: {"kind": "asserts", "setup": code, "tests": [code], "own": built-in names to take from the candidate},
    {"kind": "check", "setup": code, "test": code, "entry": name} or
    {"kind": "calls", "entry": name, "tests": [[arguments, expected]]};
    with "stop": whether to end at the first test that fails.
    """
    remote = Candidate()
    space: dict[str, Any] = {"__name__": "tests"}
    try:
        sys.modules["tests"] = types.ModuleType("tests")
        if payload["kind"] == "calls":
            tests: list[Callable[[], float]] = [_call_test(remote, payload["entry"], *t) for t in payload["tests"]]
        else:
            _set_up(payload["setup"], space)
            make = _check_tests if payload["kind"] == "check" else _assert_tests
            tests = make(remote, space, payload)
    except Exception as error:
        send(REPORT, {"unusable": f"{type(error).__name__}: {_text(error)}"})
        return
    for number, test in enumerate(tests):
        send(REPORT, {"begin": number})
        note, share = "", 0.0
        try:
            share = test()
        except Unportable as error:
            send(REPORT, {"unusable": str(error)})
            return
        except BaseException as error:
            note = f"{type(error).__name__}: {_text(error)}"
        send(REPORT, {"passed": share, "note": note})
        if payload["stop"] and share < 1:
            return


def _set_up(code: str, space: dict[str, Any]) -> None:
    """Runs what comes before the tests. The last function of a prompt that is to be continued may lack a body."""
    try:
        compiled = compile(code, "<setup>", "exec", dont_inherit=True)
    except SyntaxError:
        compiled = compile(code.rstrip() + "\n    pass\n", "<setup>", "exec", dont_inherit=True)
    exec(compiled, space)


def _call_test(remote: Candidate, entry: str, arguments: list[Any], expected: Any) -> Callable[[], float]:
    names = entry.split(".")

    def test() -> float:
        function = remote.named(names[0])
        for name in names[1:]:  # Solution.two_sum: a method of a new object
            function = getattr(function(), name)
        return float(_as_json(function(*arguments)) == _as_json(expected))

    return test


def _as_json(value: Any) -> Any:
    """With tuples as lists and keys as text, as JSON would hold it; a bool is no number."""
    if isinstance(value, list | tuple):
        return [_as_json(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _as_json(v) for k, v in value.items()}
    return ("bool", value) if isinstance(value, bool) else value


def _assert_tests(remote: Candidate, space: dict[str, Any], payload: dict[str, Any]) -> list[Callable[[], float]]:
    trees = [ast.parse(t) for t in payload["tests"]]
    used = {n.id for t in trees for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    own = {name for t in trees for name in _defined(t)} | set(space) | (set(dir(builtins)) - set(payload["own"]))
    bases = {
        n.value.id for t in trees for n in ast.walk(t) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    for name in used - own:  # a module that tests use, and only the code under test imported, is imported here
        module = name in bases and name in sys.stdlib_module_names
        space[name] = __import__(name) if module else remote.named(name)

    def one(tree: ast.Module) -> Callable[[], float]:
        code = compile(tree, "<test>", "exec", dont_inherit=True)

        def test() -> float:
            exec(code, space)
            return 1.0

        return test

    return [one(t) for t in trees]


def _check_tests(remote: Candidate, space: dict[str, Any], payload: dict[str, Any]) -> list[Callable[[], float]]:
    """One test, `check(candidate)`, whose share is that of its asserts that hold; it ends early where anything else raises."""
    tree = ast.parse(payload["test"])
    held: list[bool] = []
    total = 0
    for function in (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"):
        for place, line in enumerate(function.body):
            if isinstance(line, ast.Assert) and not isinstance(line.test, ast.Constant):
                (guarded,) = ast.parse("try:\n pass\nexcept Exception:\n _held(False)\nelse:\n _held(True)").body
                assert isinstance(guarded, ast.Try)
                guarded.body = [line]
                function.body[place] = guarded
                total += 1
    space["_held"] = held.append
    exec(compile(ast.fix_missing_locations(tree), "<test>", "exec", dont_inherit=True), space)
    space[payload["entry"]] = remote.named(payload["entry"])

    def test() -> float:
        try:
            space["check"](space[payload["entry"]])
        except Exception:
            if not any(held):
                raise
            return min(sum(held), total) / (total + 1)
        return sum(held) / total if total else 1.0

    return [test]
