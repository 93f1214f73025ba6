r"""What is taken off an answer before it is parsed: unicode, spacing and sizing commands, text styles, units.

Everything here is a pass of regular expressions over a text whose length the caller has bounded.
"""

from __future__ import annotations

import re
from fractions import Fraction

from llmrl.rewards.math_words import number_in_words

_UNICODE = {
    **dict(zip("−–—‐⁻", "-----", strict=True)), "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "÷": "/",
    "∗": "*", "⁄": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "⩽": r"\leq ", "⩾": r"\geq ", "≠": r"\neq ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "º": r"^\circ ", "∖": r"\setminus ", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] ",
    "≈": r"\approx ", "⟨": r"\langle ", "⟩": r"\rangle ", "′": "'", "’": "'", "：": ":", "，": ",", "（": "(", "）": ")", "。": ".", "∨": r"\lor ",
    "∧": r"\land ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "μ": r"\mu ", "σ": r"\sigma ", "φ": r"\phi ",
    "δ": r"\delta ", "ε": r"\epsilon ", "ζ": r"\zeta ", "η": r"\eta ", "κ": r"\kappa ", "ν": r"\nu ", "ξ": r"\xi ", "ρ": r"\rho ", "τ": r"\tau ", "χ": r"\chi ",
    "ψ": r"\psi ", "Γ": r"\Gamma ", "Λ": r"\Lambda ", "Σ": r"\Sigma ", "Φ": r"\Phi ", "Ψ": r"\Psi ", "Ω": r"\Omega ", "Θ": r"\Theta ", "ℏ": r"\hbar ", "ℓ": r"\ell ",
    "ω": r"\omega ", "Δ": r"\Delta ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "…": r"\ldots ", "∣": "|", "％": "%",
    "＜": "<", "＞": ">", "＝": "=", "＋": "+", "－": "-", "且": r"\land ", "或": r"\lor ", "；": ";", "、": ", ", "｛": "{", "｝": "}",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅕": r"\frac{1}{5}", "⅛": r"\frac{1}{8}",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\u2062": "", "\u2061": "",
}  # fmt: skip
_UNICODE_TABLE = str.maketrans(_UNICODE)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺ⁿˣ", "0123456789+nx")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n")
_SPACES = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|quad|qquad|hfill|hspace\{[^{}]*\}|rm|bf|it)(?![A-Za-z])"
    r"|(?<!\\)\\[,;:!> \n]|\\phantom\{[^{}]*\}|(?<!\\)~"
)
_NAMES = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "le": "leq", "ge": "geq", "leqslant": "leq",
    "geqslant": "geq", "leqq": "leq", "geqq": "geq", "lt": "<", "gt": ">", "ne": "neq", "not=": "neq", "varnothing": "emptyset", "div": "/", "ast": "*", "star": "*",
    "bullet": "cdot", "lvert": "|", "rvert": "|", "vert": "|", "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "vee": "lor",
    "wedge": "land", "colon": ":", "degree": "circ", "infin": "infty", "imath": "i", "minus": "-", "plus": "+", "varphi": "phi", "varepsilon": "epsilon",
    "vartheta": "theta", "smallsetminus": "setminus", "backslash": "setminus", "lang": "langle", "rang": "rangle", "bigcup": "cup", "bigcap": "cap",
    "bmatrix": "pmatrix", "sh": "sinh", "ch": "cosh", "th": "tanh", "cth": "coth", "tg": "tan", "ctg": "cot", "arctg": "arctan", "arcctg": "arccot", "R": "Reals", "N": "Naturals", "Z": "Integers",
}  # fmt: skip
_COMMAND = re.compile(r"\\(not=|[A-Za-z]+)")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox|operatorname\*?|emph|mathcal|hbox) *\{([^{}]*)\}"
)
_DIGIT_GAPS = re.compile(r"(?<=\d)(?:\s?\{ ?,(?:\\!)? ?\}|,\\!|\\!,?|\\,)\s?(?=\d{3}(?!\d))")
# Of a text whose backslashes were escaped once too often.
_ESCAPED = re.compile(
    r"(?<!\\)\\\\(?:[dtc]?frac|sqrt|left|right|text|pi|boxed|begin|cdot|times|infty|pm|leq?|geq?|theta|alpha|circ|cup|mathbb)(?![A-Za-z])"
)
_OVER = re.compile(r"\{((?:[^{}]|\{[^{}]*\})+?)\\over(?![A-Za-z])((?:[^{}]|\{[^{}]*\})+)\}")
_BASE_IN_WORDS = re.compile(r"(?<=\d)_\s*\{\s*([a-z]{3,8})\s*\}")
_PLUS_MINUS = re.compile(r"(?:^|(?<=[\s(=,]))(\+-|-\+)(?=\s)|\b(?<!\\)(plus_?minus|pm)\b|\b(?<!\\)(minus_?plus|mp)\b")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d./])")
_CALLS = {
    "sh": r"\sinh ",
    "ch": r"\cosh ",
    "th": r"\tanh ",
    "cth": r"\coth ",
    "tg": r"\tan ",
    "ctg": r"\cot ",
    "arctg": r"\arctan ",
    "arcctg": r"\arccot ",
}
_CONNECTORS = {
    "or": r" \lor ",
    "and": r" \land ",
    "or,": r" \lor ",
    ",or": r" \lor ",
    "if": " ",
    "union": r" \cup ",
    "to": " : ",
}
_WORDS = {
    "infinity": r"\infty", "Infinity": r"\infty", "inf": r"\infty", "oo": r"\infty", "union": r"\cup", "intersect": r"\cap", "or": r"\lor", "and": r"\land", "in": r"\in",
    "times": r"\times", "reals": r"\mathbb{R}",
}  # fmt: skip
_WORD = re.compile(
    r"(?<![A-Za-z\\])(" + "|".join(sorted(_WORDS, key=len, reverse=True)) + r")(?![A-Za-z]|(?<![ro][rn]|nd)\()"
)
EMPTY = {"no solution", "no solutions", "empty set", "the empty set", "no real solution", "no real solutions", "none", "empty", "nosolution", "there is no solution", "there are no solutions", "has no solution", "no solution exists", "no solutions exist", "no real solution exists", "no real solutions exist"}  # fmt: skip

_UNITS = {
    "mm": ("length", "1/1000"), "millimeter": ("length", "1/1000"), "cm": ("length", "1/100"), "centimeter": ("length", "1/100"),
    "dm": ("length", "1/10"), "m": ("length", "1"), "meter": ("length", "1"), "metre": ("length", "1"), "km": ("length", "1000"), "kilometer": ("length", "1000"),
    "inch": ("length", "127/5000"), "inches": ("length", "127/5000"), "ft": ("length", "381/1250"), "foot": ("length", "381/1250"), "feet": ("length", "381/1250"),
    "mile": ("length", "201168/125"), "mi": ("length", "201168/125"), "yard": ("length", "1143/1250"), "yd": ("length", "1143/1250"),
    "g": ("mass", "1/1000"), "gram": ("mass", "1/1000"), "kg": ("mass", "1"), "kilogram": ("mass", "1"), "mg": ("mass", "1/1000000"), "lb": ("pound", "1"),
    "pound": ("pound", "1"), "oz": ("ounce", "1"), "ounce": ("ounce", "1"), "ton": ("ton", "1"), "tonne": ("ton", "1"),
    "s": ("time", "1"), "sec": ("time", "1"), "second": ("time", "1"), "min": ("time", "60"), "minute": ("time", "60"), "h": ("time", "3600"), "hr": ("time", "3600"),
    "hour": ("time", "3600"), "day": ("time", "86400"), "week": ("time", "604800"), "month": ("month", "1"), "year": ("month", "12"),
    "ml": ("volume", "1/1000"), "l": ("volume", "1"), "liter": ("volume", "1"), "litre": ("volume", "1"), "gallon": ("gallon", "1"),
    "degree": ("angle", "1"), "deg": ("angle", "1"), "°c": ("temperature", "1"), "dollar": ("money", "1"), "usd": ("money", "1"), "cent": ("money", "1/100"), "euro": ("euro", "1"),
    "n": ("newton", "1"), "newton": ("newton", "1"), "j": ("energy", "1"), "joule": ("energy", "1"), "kj": ("energy", "1000"),
    "w": ("power", "1"), "watt": ("power", "1"), "kw": ("power", "1000"), "v": ("volt", "1"), "volt": ("volt", "1"), "hz": ("hertz", "1"), "pa": ("pressure", "1"), "mol": ("mole", "1"),
    "unit": ("", "1"), "people": ("", "1"), "way": ("", "1"),
}  # fmt: skip
# After a number or a closing bracket, at the end: words in text styles, or known units in plain letters, with powers, slashes and "per".
_STYLED_UNIT = r"\\(?:text(?:rm|bf|it)?|mathrm|mbox|operatorname|rm)\s*\{[\s~]*[A-Za-z°. /~()-]*?(?:\^\{?-?\d\}?)?[\s~]*(?:\([^{}()]*\))?\}"
_PLAIN_UNIT = (
    r"(?<![A-Za-z\\])(?:square |cubic |sq\.? |cu\.? )?(?:millimeters?|centimeters?|kilometers?|met(?:er|re)s?|inch(?:es)?|feet|foot|miles?|yards?|kilograms?|grams?|pounds?|ounces?|tons?"
    r"|seconds?|sec|minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years?|lit(?:er|re)s?|gallons?|degrees?|dollars?|USD|cents?|euros?|mph|units?|times|people|ways|points?|newtons?|joules?|watts?|volts?"
    r"|mm|cm|km|kg|mg|ft|lbs?|oz|ml|mL|Hz|kJ|kW|kPa|(?<=\d )(?:m|g|s|h|N|J|W|V|L|in|mi|yd)|(?<=\d)(?:m/s|km/h))(?![A-Za-z])"
)
_POWER = r"(?:\s*\^\s*\{?-?\d\}?)?"
_UNIT_PART = rf"(?:{_STYLED_UNIT}|{_PLAIN_UNIT}){_POWER}"
_UNIT_TAIL = re.compile(
    rf"(?<=[\d)}}\]a-zA-Z%. ~])[\s~]*(?:\\[,; ]\s*)*({_UNIT_PART}(?:[\s~]*(?:/|\\cdot|\\,|\\ |per)?[\s~]*(?:{_UNIT_PART}|[smh](?![A-Za-z]){_POWER}))*)[\s.]*$"
)
_UNIT_HERE = re.compile(rf"[\s~]*{_UNIT_PART}")
_SCALE_HERE = re.compile(r"\s+(?:dozen|hundred|thousand|million|billion|trillion)\b")
_NO_UNIT = re.compile(r"(?:^|[^A-Za-z])(?:or|and|of|if|where|million|billion|thousand|hundred|trillion|dozen|pi|mod|for|not|no|less|more|cis|percent)(?:$|[^A-Za-z])", re.IGNORECASE)  # fmt: skip


def ascii_form(text: str) -> str:
    """Unicode signs, superscripts and subscripts as LaTeX: "2x²≤√3" -> r"2x^{2}\\leq \\sqrt 3"."""
    if text.isascii():
        return text
    text = re.sub(r"(?<=\d)([cdk]?m)(?=[²³])", r" \1", text)  # 5m², an area
    text = re.sub(r"[⁻⁰¹²³⁴⁵⁶⁷⁸⁹⁺ⁿˣ]+", lambda m: "^{" + m[0].replace("⁻", "-").translate(_RAISED) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉ₙ]+", lambda m: "_{" + m[0].translate(_LOWERED) + "}", text)
    return text.translate(_UNICODE_TABLE)


def split_unit(text: str) -> tuple[str, tuple[str, Fraction] | None]:
    """The text without the unit at its end, and the unit as (what it measures with its power, factor); None for words that are no known unit."""
    found = _UNIT_TAIL.search(text)
    if found is None or _NO_UNIT.search(found[1]) or not text[: found.start()].strip(" ~\\"):
        return text, None
    body = text[: found.start()].rstrip(" ~")
    if not re.search(r"[\d)}\]a-zA-Z%.]$", body) or re.search(r"(?:\\(?!pi$)[a-zA-Z]+|[=<>])$", body):
        return text, None
    return body, _unit_value(found[1])


def unit_at(text: str, start: int) -> str:
    """The known unit or scale that follows a number in a sentence: of "15 m long" " m", of "12 dozen" " dozen"; "" where there is none."""
    if (scale := _SCALE_HERE.match(text, start)) is not None:
        return scale[0]
    found = _UNIT_HERE.match(text, start)
    return found[0] if found and found[0].strip() != "in" and _unit_value(found[0]) is not None else ""


def _unit_value(unit: str) -> tuple[str, Fraction] | None:
    plain = re.sub(r"\\(?:text(?:rm|bf|it)?|mathrm|mbox|operatorname|rm)|[{}~\\$]|\\[,; ]", " ", unit).lower()
    plain = re.sub(r"\bmph\b", "mile / hour", re.sub(r"\bkph\b", "km / hour", plain))
    plain = re.sub(r"\bper\b", "/", plain).replace("cdot", " ")
    plain = re.sub(r"\b(?:square|sq\.?) +([a-z]+)", r"\1^2", plain)
    plain = re.sub(r"\b(?:cubic|cu\.?) +([a-z]+)", r"\1^3", plain)
    powers: dict[str, int] = {}
    factor, sign = Fraction(1), 1
    for word, power, slash in re.findall(r"([a-z°]+)\.?\s*(?:\^\s*(-?\d))?|(/)", plain):
        if slash:
            sign = -1
            continue
        known = _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))
        if known is None:
            return None
        exponent = sign * int(power or 1)
        powers[known[0]] = powers.get(known[0], 0) + exponent
        factor *= Fraction(known[1]) ** exponent
    key = " ".join(f"{name}^{power}" for name, power in sorted(powers.items()) if power and name)
    return (key, factor) if key else None


def clean(text: str) -> str:
    """The answer in the small LaTeX that the parser reads. Idempotent but for white space."""
    text = ascii_form(text).rstrip("\\")
    if _ESCAPED.search(text):
        text = text.replace("\\\\", "\\")
    text = _DIGIT_GAPS.sub("", text)
    text = _SPACES.sub(" ", text)
    text = re.sub(r"\\begin\{array\}\s*\{[^{}]*\}", r"\\begin{array}", text)
    text = _TEXT.sub(lambda m: _text(m[1]), text)
    text = _COMMAND.sub(lambda m: _command(m[1]), text)
    text = re.sub(r"\\[$%]", lambda m: m[0][1], text)
    text = re.sub(r"(?:US)?\$|€|£|\\pounds|\\euro", " ", text)
    text = re.sub(r"(?<=[\d)}])\s*(?:percent(?:age)?|per cent|pct)\b", "%", text)
    text = re.sub(r"(?<=[\d)}])\s*deg(?:rees?)?\s*$", r"^\\circ ", text)
    text = _PLUS_MINUS.sub(lambda m: r" \pm " if m[1] == "+-" or m[2] else r" \mp ", text)
    text = re.sub(r"(?<![A-Za-z])d([a-zA-Z])/d([a-zA-Z])(?![A-Za-z])", r"\\frac{d \1}{d \2}", text)
    text = re.sub(r"\{([^{}]+)\\choose(?![A-Za-z])([^{}]+)\}", r"\\binom{\1}{\2}", text)
    text = _OVER.sub(r"\\frac{\1}{\2}", text)
    text = _BASE_IN_WORDS.sub(lambda m: m[0] if (base := number_in_words(m[1])) is None else f"_{{{base}}}", text)
    text = re.sub(r"\bMatrix\s*(?=\(\s*\[)", "", text)
    text = re.sub(r"(?<=\d)\{:\}(?=\d)", ":", text)
    text = re.sub(r"(?<![\w)}])\((\d+)\)\s*_(?=\s*\{?\d)", r"\1_", text)  # (1011)_2
    text = text.replace("**", "^").replace("<=", r"\leq ").replace(">=", r"\geq ").replace("!=", r"\neq ") if not re.search(r"\d!=", text) else text.replace("**", "^")  # fmt: skip
    text = text.replace("<>", r"\neq ")
    text = re.sub(r"(?<=\d)(?:\s*[xX]\s*(?=10\s*\^)| [xX]\s+(?=\d))", r"\\times ", text)
    text = re.sub(r"\{\s*([a-zA-Z])\s*[:|]\s*(?=[^}|]*[<>=])", r"{ \1 \\mid ", text)
    text = re.sub(r"\\\{\s*(?=\\begin\{(?:array|aligned|matrix|gathered|cases)\})", "", text)
    text = _WORD.sub(lambda m: " " + _WORDS[m[1]] + " ", text)
    text = re.sub(r"(?<=[)\]}])\s*U\s*(?=[(\[{\\])", r"\\cup ", text)
    text = _SPACED_THOUSANDS.sub(lambda m: m[0].replace(" ", ""), text)
    return text.strip()


def _command(name: str) -> str:
    new = _NAMES.get(name, name)
    if not new.isalpha():
        return "\\" + new + " " if new in "{}" else " " + new + " "
    return "\\" + new if new == name else "\\" + new + " " if name != "bmatrix" else "\\" + new


def _text(content: str) -> str:
    """What a text style held: a connector, a letter, a name, or (as words) something that only equals the same words."""
    words = content.strip(" ~")
    if words.lower() in _CONNECTORS:
        return _CONNECTORS[words.lower()]
    if words in _CALLS:
        return _CALLS[words]
    if words == "":
        return " "
    return " " + words + " "
