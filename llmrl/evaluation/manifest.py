"""What an evaluation was of: enough to repeat it, and to say whether two results can be compared."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llmrl
from llmrl.config.benchmark import PromptTemplate
from llmrl.config.reward import RewardSpec

_PACKAGES = ("llmrl", "torch", "transformers", "math-verify")
_VERIFIERS = ("rewards/*.py", "functional/boxed.py")
"""The sources that decide what is right."""


def data_entry(path: str, records: Iterable[Any]) -> dict[str, Any]:
    """Which problems, by the sha256 of their rows in order (each as JSON with sorted keys)."""
    digest, n = hashlib.sha256(), 0
    for record in records:
        digest.update(
            json.dumps(record, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n"
        )
        n += 1
    return {"path": path, "sha256": digest.hexdigest(), "n": n}


def verifier_entry(scorer: RewardSpec, threshold: float = 0.5) -> dict[str, Any]:
    """What judged: its settings, and the sha256 of the verifiers' sources (a user's own file too) with math-verify's version."""
    root, digest = Path(llmrl.__file__).parent, hashlib.sha256()
    files = [file for pattern in _VERIFIERS for file in sorted(root.glob(pattern))]
    own = Path(scorer.function.rpartition(":")[0])
    for file in [*files, *([own] if own.suffix == ".py" and own.is_file() else [])]:
        digest.update(f"{file.name}\n".encode() + file.read_bytes())
    digest.update(package_version("math-verify").encode())
    settings = scorer.model_dump(mode="json", exclude_defaults=True)
    function = settings.pop("function", "")
    return {
        "function": function,
        "args": settings.pop("args", {}),
        **settings,
        "threshold": threshold,
        "sha256": digest.hexdigest(),
    }


def template_entry(name: str | None, template: PromptTemplate | None, system: str | None = None) -> dict[str, Any]:
    """How problems were put; without a template they were prompts already, perhaps with a `system` turn before them."""
    if template is None:
        return {"name": None, "system": system, "user": None, "text": None, "cut": []}
    return {"name": name, **template.model_dump(mode="json")}


def digest_of(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions that the numbers depend on."""
    return {"python": platform.python_version(), **{name: package_version(name) for name in _PACKAGES}}


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """What two manifests differ in, such as "sampling.temperature is 0.6 there and 1.0 here"; keys in `ignore`, and what is in them, may.

    A model is known by its weights: where both have their hash, its name may differ.
    """
    before, now = dict(_leaves(old)), dict(_leaves(new))
    skipped = {
        *ignore,
        *(["model.name"] if before.get("model.weights_sha256") and now.get("model.weights_sha256") else []),
    }
    return [
        f"{key} is {_show(before.get(key))} there and {_show(now.get(key))} here"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key) and not any(key == s or key.startswith(f"{s}.") for s in skipped)
    ]


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
