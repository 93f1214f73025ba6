"""The names and signs that the answer parser knows."""

from __future__ import annotations

import re

FUNCTIONS = (
    "arcsinh", "arccosh", "arctanh", "arccoth", "arcsech", "arccsch", "arctan2", "arcsin", "arccos", "arctan", "arccot", "arcsec", "arccsc",
    "arsinh", "arcosh", "artanh", "asinh", "acosh", "atanh", "acoth", "asech", "acsch", "asin", "acos", "atan2", "atan", "acot", "asec", "acsc",
    "sinh", "cosh", "tanh", "coth", "sech", "csch", "sinc",
    "sin", "cos", "tan", "cot", "sec", "csc", "cosec", "log", "ln", "lg", "exp", "sqrt", "cbrt", "abs", "Abs", "floor",
    "ceiling", "ceil", "sgn", "sign", "max", "Max", "min", "Min", "gcd", "lcm", "det", "Re", "Im", "binomial", "binom", "factorial", "cis",
    "summation", "arg",
)  # fmt: skip
ALIASES = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "asinh": "arcsinh", "acosh": "arccosh", "atanh": "arctanh", "arsinh": "arcsinh",
    "arcosh": "arccosh", "artanh": "arctanh", "cosec": "csc", "ceiling": "ceil", "binomial": "binom", "sign": "sgn", "lg": "log10",
    "acoth": "arccoth", "asech": "arcsech", "acsch": "arccsch", "atan2": "arctan2", "acot": "arccot", "asec": "arcsec", "acsc": "arccsc",
    "Abs": "abs", "Max": "max", "Min": "min", "re": "Re", "im": "Im", "C": "binom", "nCr": "binom", "P": "permutations", "nPr": "permutations", "sum": "summation", "Sum": "summation",
}  # fmt: skip
GREEK = (
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
    "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi",
    "Sigma", "Phi", "Psi", "Omega", "ell", "hbar", "aleph",
)  # fmt: skip
PLAIN_NAMES = sorted(
    [*FUNCTIONS, "pi", *(g for g in GREEK if len(g) > 3), "phi", "psi", "tau", "rho"], key=len, reverse=True
)
CALLED = {"re", "im", "sum", "Sum"}
"""Functions where a bracket follows their names, and letters elsewhere."""
SPECIAL = {"gamma", "Gamma", "zeta", "beta", "C", "nCr", "P", "nPr"}
"""Symbols, or functions where a bracket follows: both are tried."""
RELATIONS = {"=": "=", "<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", r"\neq": "!=", r"\approx": "=", r"\equiv": "=", r"\in": "in", r"\to": "=", r"\Rightarrow": "=", r"\implies": "="}  # fmt: skip
SETS = {r"\cup": "cup", r"\cap": "cap", r"\setminus": "setminus"}
DECORATIONS = {"bar", "hat", "vec", "dot", "ddot", "tilde", "overline", "overrightarrow", "underline", "mathbf", "mathbb", "widehat", "angle", "triangle", "nabla", "partial"}  # fmt: skip
ENGLISH = {
    "as", "to", "set", "is", "it", "so", "we", "of", "if", "the", "are", "not", "for", "all", "any", "has", "its", "per", "one", "but", "was", "plus", "minus", "times",
    "over", "get", "gets", "got", "since", "using", "single", "sine", "cosine", "cost", "tank", "expect",
}  # fmt: skip
PLUS = ("+", "-", r"\pm", r"\mp")
STOPS = {r"\lor", r"\land", r"\mid", r"\rangle", r"\rfloor", r"\rceil", r"\end", r"\pm", r"\mp", r"\times", r"\cdot", r"\\", r"\}", *RELATIONS, *SETS}  # fmt: skip
CLOSERS = {"(": ")]", "[": ")]", r"\{": (r"\}",), r"\langle": (r"\rangle",)}


def is_word(run: str, *, alone: bool = True) -> bool:
    """Whether a run of letters is a word, and no product of symbols: longer ones are, but for names of segments and the like of abcd.

    alone: white space or nothing is around it; "it" in e^(it) is a product.
    """
    if run.lower() in ENGLISH:
        return alone or len(run) > 2
    rest = re.sub("|".join(PLAIN_NAMES), "", run)
    return len(rest) >= 4 and (len(rest) > 5 or not rest.isupper()) and list(rest) != sorted(rest)
