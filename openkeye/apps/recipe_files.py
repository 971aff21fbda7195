"""Recipes: Python functions that return the settings of a run, found by name or file and called with words of a command line.

Of three kinds: those that return a `RunConfig` are for `openkeye train`, a `PostTrainingConfig` for `openkeye rl`, and a
`DistillRun` for `openkeye distill`.
"""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from openkeye.common.checks import InputError
from openkeye.common.fields import parse_value, unknown, with_fields
from openkeye.distill.config import DistillRun
from openkeye.rl.run_config import PostTrainingConfig
from openkeye.train.config import RunConfig

PACKAGE = "openkeye.recipes"
FALLBACK = "recipe"
# the function of a file that has none of the file's name
Recipe = Callable[..., Any]
Settings = TypeVar("Settings", RunConfig, PostTrainingConfig, DistillRun)


def list_recipes(kind: type = RunConfig) -> list[tuple[str, str]]:
    """(name, first sentence) of every packaged recipe that returns settings of a kind, read without running any."""
    found = []
    for module in _packaged():
        path = Path(importlib.import_module(PACKAGE).__path__[0]) / f"{module}.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) == kind.__name__:
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                found.append((module if node.name == module else f"{module}:{node.name}", summary))
    return found


def open_recipe(text: str, kind: type = RunConfig) -> Recipe:
    """A packaged recipe by name, or a function of a file: `finetune`, `stages:sft`, `mine.py`, `runs/mine.py:second`.

    Raises:
        InputError: no such recipe, file or function; a file that Python cannot read.
    """
    name, _, function = text.partition(":")
    if name.endswith(".py") or "/" in name:
        module, stem = _load_file(Path(name).expanduser()), Path(name).stem
    else:
        if name not in _packaged():
            known = dict.fromkeys(recipe.partition(":")[0] for recipe, _ in list_recipes(kind))
            raise unknown("recipe", name, [*known, "FILE.py"])
        module, stem = importlib.import_module(f"{PACKAGE}.{name}"), name
    functions = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    }
    recipes = {key: value for key, value in functions.items() if _returns(value, kind)}
    if function:
        if function not in functions:
            raise unknown(f"{name}: function", function, recipes)
        return functions[function]
    for key in (stem, FALLBACK):
        if key in functions:
            return functions[key]
    if len(recipes) == 1:
        return next(iter(recipes.values()))
    raise InputError(
        f"{name}: no function {stem} or {FALLBACK} in it; add one that returns a {kind.__name__}, or name one of "
        f"{', '.join(recipes) or 'its functions'} as {name}:FUNCTION"
    )


def settings_of(recipe: Recipe, words: Sequence[str], kind: type[Settings]) -> Settings:
    """What a recipe returns for its arguments among the words, with the fields changed that the other words name.

    A parameter of the recipe goes before a field of the same name. A parameter that is a mapping takes `name.key=value`.

    Raises:
        InputError: an unknown name, a wrong value, or a missing argument.
    """
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(recipe).parameters
    hints = typing.get_type_hints(recipe)
    known = [*parameters, *(field.name for field in fields(kind))]
    arguments: dict[str, Any] = {}
    changes = []
    for word in words:
        path, has_value, text = word.partition("=")
        name, _, key = path.partition(".")
        if not has_value:
            raise InputError(f"{word!r}: expected name=value, for example seed=3 or stages.0.context=8192")
        if name not in known:
            raise unknown("argument or field", name, dict.fromkeys(known))
        annotation = hints.get(name, str)
        is_mapping = typing.get_origin(annotation) in (Mapping, dict)
        if name not in parameters or (key and not is_mapping):
            changes.append(word)
        elif is_mapping and key:
            arguments.setdefault(name, {})[key] = parse_value(text, typing.get_args(annotation)[1], path)
        else:
            arguments[name] = parse_value(text, annotation, name)
    missing = [name for name, parameter in parameters.items() if parameter.default is parameter.empty and name not in arguments]
    if missing:
        shown = f"{missing[0]}.NAME" if typing.get_origin(hints.get(missing[0])) in (Mapping, dict) else missing[0]
        raise InputError(
            f"recipe {recipe.__name__} needs {', '.join(missing)}; give {shown}=VALUE (arguments: {', '.join(parameters)})"
        )
    config = recipe(**arguments)
    if not isinstance(config, kind):
        raise InputError(
            f"recipe {recipe.__name__} returned a {type(config).__name__}; return an {kind.__module__}.{kind.__name__}"
        )
    return with_fields(config, changes)


def _packaged() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__))


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a Python file with a function that returns the settings of a run")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file; name it {path.name}.py")
    module = importlib.util.module_from_spec(spec)
    # Known by name, so that worker processes and dataclasses of the file find it.
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{path}:{error.lineno}: {error.msg}; mend the file") from error
    except ImportError as error:
        raise InputError(f"{path}: {error}; install it, or mend the import") from error
    return module


def _returns(function: Callable[..., Any], kind: type) -> bool:
    annotation = inspect.signature(function).return_annotation
    return annotation is kind or str(annotation).rsplit(".", 1)[-1] == kind.__name__
