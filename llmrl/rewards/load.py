"""From a name in a recipe to a function: built-ins, `module:function` and `path/file.py:function`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmrl.errors import ConfigError, RewardError
from llmrl.rewards.base import BATCH_INPUTS, ROW_INPUTS, RowVerifier, parameters
from llmrl.rewards.call import BoundFunction

BUILTINS: dict[str, str] = {
    "math_answer": "llmrl.rewards.math",
    "code_tests": "llmrl.rewards.code",
    "exact_match": "llmrl.rewards.exact",
    "think_format": "llmrl.rewards.format",
    "think_answer_format": "llmrl.rewards.format",
    "tag_count": "llmrl.rewards.format",
    "soft_overlong": "llmrl.rewards.length",
    "length": "llmrl.rewards.length",
    "repetition_penalty": "llmrl.rewards.length",
    "instructions": "llmrl.rewards.ifeval",
    "length_zscore": "llmrl.rewards.length",
    "code_format": "llmrl.rewards.format",
    "sections": "llmrl.rewards.format",
    "multiple_choice": "llmrl.rewards.choice",
    "text_match": "llmrl.rewards.text",
    "text_f1": "llmrl.rewards.text",
    "set_fbeta": "llmrl.rewards.text",
    "keyword_count": "llmrl.rewards.text",
    "reasoning_steps": "llmrl.rewards.text",
    "json_schema": "llmrl.rewards.structure",
    "sat_assignment": "llmrl.rewards.structure",
    "knights_and_knaves": "llmrl.rewards.puzzles",
    "diff_similarity": "llmrl.rewards.structure",
    "language_consistency": "llmrl.rewards.language",
    "bleu": "llmrl.rewards.language",
    "chrf": "llmrl.rewards.language",
    "verifier": "llmrl.rewards.verifier",
}
# Names that TRL and open-r1 users bring for the same thing.
ALIASES: dict[str, str] = {
    "accuracy": "math_answer",
    "accuracy_reward": "math_answer",
    "format": "think_answer_format",
    "think_format_reward": "think_format",
    "soft_overlong_punishment": "soft_overlong",
    "repetition_penalty_reward": "repetition_penalty",
    "ifeval": "instructions",
}


def default_name(target: str) -> str:
    """The name in metrics of a function named in a recipe: `length` for `rewards/mine.py:length`."""
    return ALIASES.get(target, target).replace(":", ".").rsplit(".", 1)[-1]


def is_builtin(target: str) -> bool:
    return ALIASES.get(target, target) in BUILTINS


def resolve(target: str, args: Mapping[str, Any], name: str | None = None) -> BoundFunction:
    """The function that `target` names, with `args` checked against its signature.

    Imports the user's module: a runner does this in a worker, unless it was asked to run the function inline.
    Raises ConfigError for a name or an argument that does not exist, RewardError when the module can't be imported.
    """
    return bind(import_target(target), args, name or default_name(target), target)


def import_target(target: str) -> Callable[..., Any]:
    """The object that `target` names. Raises ConfigError or RewardError."""
    if is_builtin(target):
        builtin = ALIASES.get(target, target)
        return getattr(importlib.import_module(BUILTINS[builtin]), builtin)
    where, _, attribute = target.rpartition(":" if ":" in target else ".")
    if not where or not attribute:
        near = difflib.get_close_matches(target, [*BUILTINS, *ALIASES], 3, 0.5)
        raise ConfigError(
            f"reward function {target!r} is neither built in nor of the form module:function or path/file.py:function. "
            f"{'Did you mean ' + ' or '.join(near) + '?' if near else 'Built in: ' + ', '.join(BUILTINS)}"
        )
    module = _import_module(where, target)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            near = difflib.get_close_matches(part, names, 3, 0.5) or sorted(names)[:8]
            raise ConfigError(
                f"reward function {target!r}: {where} has no {part!r}; it has {', '.join(near) or 'no functions'}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"reward function {target!r} names a {type(found).__name__}, which can't be called")
    return found


def bind(function: Callable[..., Any], args: Mapping[str, Any], name: str, shown: str) -> BoundFunction:
    """`function` with the recipe's `args`, checked by name. A factory (TRL's `get_*` functions, a class) is called with them first.

    A factory is told by its signature: it takes nothing that the runner passes. Raises ConfigError.
    """
    p = parameters(function)
    inputs = ROW_INPUTS if isinstance(function, RowVerifier) else BATCH_INPUTS
    if not isinstance(function, RowVerifier) and (
        inspect.isclass(function) or not (p.any_keyword or any(p.takes(n) for n in inputs))
    ):
        _check_names(args, (*p.positional, *p.keyword_only), p.required, shown)
        made = _make(function, args, shown)
        return bind(made, {}, name, shown)
    if isinstance(function, RowVerifier):
        required = [n for n in p.required if n in p.keyword_only]
        _check_names(args, p.keyword_only, required, shown)
        if function.check_args is not None and (problem := function.check_args(**args)):
            raise ConfigError(f"reward function {shown!r}: {problem}")
    else:
        allowed = [n for n in (*p.positional, *p.keyword_only) if n not in inputs]
        _check_names(args, allowed, (), shown)
    return BoundFunction(function, args, name)


def _make(factory: Callable[..., Any], args: Mapping[str, Any], shown: str) -> Callable[..., Any]:
    try:
        made = factory(**args)
    except Exception as error:
        raise ConfigError(
            f"reward function {shown!r} called with {dict(args)} raised {type(error).__name__}: {error}"
        ) from error
    if not callable(made) or inspect.isclass(made):
        raise ConfigError(
            f"reward function {shown!r} takes neither prompts, completions nor completion_ids, and called as a factory it gave a "
            f"{type(made).__name__}. Take `completions` and `**kwargs`, or return a function that does"
        )
    return made


def _check_names(args: Mapping[str, Any], allowed: Any, required: Any, shown: str) -> None:
    allowed = list(allowed)
    for name in args:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(allowed) or 'no arguments'}."
            raise ConfigError(f"reward function {shown!r} has no argument {name!r}: {hint}")
    missing = [name for name in required if name not in args]
    if missing:
        raise ConfigError(f"reward function {shown!r} needs {', '.join(missing)}; give it under `args`")


def _import_module(where: str, target: str) -> Any:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        path = Path(where).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"reward function {target!r}: there is no file {path}")
        return _import_file(path)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (where == error.name or where.startswith(error.name + ".")):
            raise ConfigError(
                f"reward function {target!r}: there is no module {error.name!r} on the path (the working directory is searched too)"
            ) from error
        raise RewardError(f"reward function {target!r}: importing {where} failed: {error}") from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RewardError(
            f"reward function {target!r}: importing {where} raised {type(error).__name__}: {error}"
        ) from error


def _import_file(path: Path) -> Any:
    name = f"llmrl_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"{path} can't be imported as a Python module")
    # Last, not first: neighbours can be imported, but none of them shadows the standard library.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
