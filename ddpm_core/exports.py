"""A package's public functions, imported when they are first asked for.

A command line needs a package's configuration long before it needs its driver, which imports Ray, torch and MLflow.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazily(package: str, **modules: str) -> Callable[[str], Any]:
    """A package's `__getattr__`: name=module for each public name and the module of the package that defines it."""

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return get
