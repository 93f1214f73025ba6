"""Problems made by chance from a seed, each with one solution, as records: formulas to satisfy, knights and knaves, arithmetic."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product

from llmrl.data.convert import Record, record
from llmrl.errors import DataError

Maker = Callable[[random.Random, int], tuple[str, str, dict[str, object]]]
HARDEST = 8
_NAMES = (
    "Ann",
    "Bob",
    "Cleo",
    "Dan",
    "Eve",
    "Finn",
    "Gil",
    "Hana",
    "Ivo",
    "Jane",
    "Kurt",
    "Lea",
    "Max",
    "Nora",
    "Otto",
    "Pia",
)


def generate(kind: str, count: int, *, seed: int = 0, difficulties: Sequence[int] = (3,)) -> list[Record]:
    """`count` different problems, the same for the same arguments; difficulties (1 to 8) take turns.

    kind: "sat", "knights_and_knaves" or "arithmetic". Raises DataError where there are not so many different ones.
    """
    if kind not in MAKERS:
        raise DataError(f"no puzzle {kind!r}; there are {', '.join(MAKERS)}")
    if not difficulties or not all(1 <= d <= HARDEST for d in difficulties):
        raise DataError(f"difficulties must be from 1 to {HARDEST}, given {list(difficulties)}")
    make, verifier, source = MAKERS[kind]
    rng = random.Random(f"{kind}/{seed}")
    seen: set[str] = set()
    records: list[Record] = []
    failed = 0
    while len(records) < count:
        difficulty = difficulties[len(records) % len(difficulties)]
        question, answer, meta = make(rng, difficulty)
        if question in seen:
            failed += 1
            if failed > 1000:
                raise DataError(
                    f"no further {kind} problem of difficulty {difficulty} was found after {len(records)}; ask for fewer, or for harder ones"
                )
            continue
        failed = 0
        seen.add(question)
        id = f"{kind}/{seed}/{len(records):05d}"
        records.append(record(id, source, question, answer, verifier, {"difficulty": difficulty, **meta}))
    return records


def sat(rng: random.Random, difficulty: int) -> tuple[str, str, dict[str, object]]:
    """Clauses of up to three literals over difficulty + 2 variables: added until a planted assignment is the only one left."""
    n = difficulty + 2
    planted = tuple(rng.random() < 0.5 for _ in range(n))
    left = [values for values in product((False, True), repeat=n) if values != planted]
    clauses: list[list[int]] = []
    while left:
        variables = sorted(rng.sample(range(n), 3))
        clause = [v + 1 if rng.random() < 0.5 else -v - 1 for v in variables]
        if not _holds(clause, planted):
            continue
        still = [values for values in left if _holds(clause, values)]
        if len(still) < len(left):  # it rules something out
            clauses.append(clause)
            left = still
    lines = [" or ".join(f"x{v}" if v > 0 else f"not x{-v}" for v in clause) for clause in clauses]
    question = (
        f"Find truth values of x1 to x{n} for which all of these hold:\n"
        + "\n".join(f"({line})" for line in lines)
        + "\nWrite them as: x1 = true, x2 = false, and so on."
    )
    answer = ", ".join(f"x{i} = {'true' if value else 'false'}" for i, value in enumerate(planted, 1))
    return question, answer, {"clauses": clauses, "variables": n}


def _holds(clause: Sequence[int], values: Sequence[bool]) -> bool:
    return any(values[abs(v) - 1] == (v > 0) for v in clause)


Statement = tuple[str, Callable[[Sequence[bool]], bool]]


def knights_and_knaves(rng: random.Random, difficulty: int) -> tuple[str, str, dict[str, object]]:
    """difficulty + 1 people, a statement each; drawn again until one assignment of knights (always true) and knaves (always false) fits."""
    n = difficulty + 1
    while True:
        names = rng.sample(_NAMES, n)
        said = [_statement(rng, speaker, names) for speaker in range(n)]
        fitting = [kinds for kinds in product((False, True), repeat=n) if _consistent(said, kinds)]
        if len(fitting) == 1:
            break
    people = ", ".join(names[:-1]) + " and " + names[-1]
    question = (
        f"On an island every person is either a knight, who always tells the truth, or a knave, who always lies. You meet {people}.\n"
        + "\n".join(f'{name} says: "{text}"' for name, (text, _) in zip(names, said))
        + "\nWho is a knight and who is a knave?"
    )
    answer = ", ".join(f"{name} is a {'knight' if kind else 'knave'}" for name, kind in zip(names, fitting[0]))
    return question, answer, {"people": n}


def _consistent(said: Sequence[Statement], kinds: Sequence[bool]) -> bool:
    return all(says(kinds) == kind for (_, says), kind in zip(said, kinds))


def _statement(rng: random.Random, speaker: int, names: Sequence[str]) -> Statement:
    others = [i for i in range(len(names)) if i != speaker]
    a = rng.choice(others)
    b = rng.choice([i for i in range(len(names)) if i != a])
    x, y = names[a], "I" if b == speaker else names[b]
    am = "am" if y == "I" else "is"
    forms: list[Statement] = [
        (f"{x} is a knight.", lambda k: k[a]),
        (f"{x} is a knave.", lambda k: not k[a]),
        (f"{x} and {y} are of the same kind.", lambda k: k[a] == k[b]),
        (f"{x} and {y} are of different kinds.", lambda k: k[a] != k[b]),
        (f"{x} is a knave or {y} {am} a knight.", lambda k: not k[a] or k[b]),
        (f"If {x} is a knight, then {y} {am} a knave.", lambda k: not k[a] or not k[b]),
        (f"{x} is a knight and {y} {am} a knave.", lambda k: k[a] and not k[b]),
    ]
    return rng.choice(forms)


def arithmetic(rng: random.Random, difficulty: int) -> tuple[str, str, dict[str, object]]:
    """An expression with difficulty operators (+, -, *) of numbers up to 9, 99 from difficulty 3, 999 from 6; the answer is a whole number."""
    most = 9 if difficulty < 3 else 99 if difficulty < 6 else 999
    text, value = _expression(rng, difficulty, most)
    return f"Compute {text}.", str(value), {"operators": difficulty}


def _expression(rng: random.Random, operators: int, most: int) -> tuple[str, int]:
    if operators == 0:
        value = rng.randint(1, most)
        return str(value), value
    left = rng.randrange(operators)
    (a, x), (b, y) = (_expression(rng, k, most) for k in (left, operators - 1 - left))
    a, b = (f"({text})" if " " in text else text for text in (a, b))
    sign = rng.choice("+-*")
    return f"{a} {sign} {b}", x + y if sign == "+" else x - y if sign == "-" else x * y


MAKERS: dict[str, tuple[Maker, str, str]] = {
    "sat": (sat, "sat_assignment", "SAT puzzles"),
    "knights_and_knaves": (knights_and_knaves, "knights_and_knaves", "Knights and knaves"),
    "arithmetic": (arithmetic, "math_answer", "Arithmetic"),
}
