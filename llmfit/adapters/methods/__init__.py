"""The methods of the house, one small dataclass each: a new one is a class and its name in the `METHODS` of one file.

Every file beside this one has a dict `METHODS` of names to specs at its bottom; here they are gathered, in the order of
the files' names. A file that is new is found, and a name that stands in two is an error. Each loads without torch and
peft, which a spec imports where it needs them.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from llmfit.adapters.spec import AdapterSpec

__all__ = ["METHODS"]

METHODS: dict[str, type[AdapterSpec]] = {}
for _name in sorted(module.name for module in iter_modules(__path__)):
    _own: dict[str, type[AdapterSpec]] = import_module(f"{__name__}.{_name}").METHODS
    for _method in _own.keys() & METHODS.keys():
        raise RuntimeError(f"The adapter {_method!r} of methods/{_name}.py has the name of another one. Rename it.")
    METHODS |= _own
