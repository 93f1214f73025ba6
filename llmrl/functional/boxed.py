r"""The final answer in `\boxed{...}`. Linear in the length of the text, whatever is in it."""

from __future__ import annotations

import re

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}` or `\fbox{...}`, nested braces included; None when there is none.

    Example: last_boxed(r"\boxed{1} so \boxed{\frac{1}{2}}") -> r"\frac{1}{2}"
    """
    end = len(text)
    for box in reversed(list(BOX.finditer(text))):
        rest = text[box.end() : box.end() + 64]
        if rest.lstrip().startswith("{"):
            content = braced(text, text.index("{", box.end()), end)
            if content is not None:
                return content
        elif plain := re.match(r"\s+([^\s$\\{}]{1,32})", rest):
            return plain[1]
        # An unclosed box was cut off by the length limit: what is inside it is no answer, and the search goes on before it.
        end = box.start()
    return None


def braced(text: str, opening: int, end: int) -> str | None:
    """What stands between the brace at `opening` and the one that closes it before `end`; None where none does."""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[opening:end], re.DOTALL):
        if brace[0] in "{}":
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return text[opening + 1 : opening + brace.start()]
    return None
