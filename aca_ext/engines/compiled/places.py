"""Places of Python values that func reads or changes, parsed from TorchDynamo's names."""

from __future__ import annotations

import ast
import re
from types import CodeType
from typing import Any

from torch import nn


class Place:
    """An attribute, a container entry or a closure cell, such as ``L['func'].net.beta`` or ``L['args'][0]``.

    ``L`` stands for the arguments of the traced call and ``G`` for the globals of the module that traces.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        tree = ast.parse(name, mode="eval").body
        self.key: Any
        self._is_default = False
        if isinstance(tree, ast.Attribute):
            self.key, self._is_item = tree.attr, False
        elif isinstance(tree, ast.Subscript):
            self.key, self._is_item = ast.literal_eval(tree.slice), True
            if isinstance(tree.value, ast.Attribute) and tree.value.attr == "__defaults__":
                self._is_default, tree = True, tree.value
        else:
            raise ValueError(f"{name} is not a place in an object")
        self._owner: CodeType = compile(ast.Expression(tree.value), name, "eval")

    def owner(self, scope: dict[str, Any]) -> Any:
        """The object that holds the value."""
        return eval(self._owner, scope)

    def get(self, owner: Any) -> Any:
        if self._is_default:
            owner = owner.__defaults__
        return owner[self.key] if self._is_item else getattr(owner, self.key)

    def set(self, owner: Any, value: Any) -> None:
        if self._is_default:
            values = list(owner.__defaults__)
            values[self.key] = value
            owner.__defaults__ = tuple(values)
        elif self._is_item:
            owner[self.key] = value
        elif isinstance(owner, nn.Module) and self.key in vars(owner):
            vars(owner)[self.key] = value  # Module.__setattr__ refuses some values
        else:
            setattr(owner, self.key, value)

    def is_own(self, owner: Any) -> bool:
        """Tells whether ``set`` replaces the value itself; on a class attribute it would only hide it."""
        if self._is_item:
            return self._is_default or isinstance(owner, (dict, list))
        return self.key == "cell_contents" or self.key in getattr(owner, "__dict__", {})

    def __str__(self) -> str:
        return shown(self.name)


def shown(name: str) -> str:
    """TorchDynamo's name of a place, as the user would write it."""
    name = re.sub(r"(\.__dict__\['_\w+'\]|\._(buffers|parameters|modules))\['(\w+)'\]", r".\3", name)
    name = re.sub(r"G\['(__import_(\w+))'\]", lambda m: m[2].replace("_dot_", "."), name)
    name = re.sub(r"[LG]\['(\w+)'\]", r"\1", name)
    return name.replace(".cell_contents", "").replace("__closure__", "closure")
