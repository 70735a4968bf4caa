"""Triton's interpreter, made faster for tests."""

from __future__ import annotations

import inspect
from typing import Any


def hasten() -> None:
    """The interpreter replaces the functions of triton.language anew each time a device function is called, which takes
    more time than the functions do. Once is enough."""
    import triton.language as tl
    import triton.runtime.interpreter as runtime

    patch, modules = runtime._patch_lang, {}

    def patch_once(function: Any) -> Any:
        names = function.__globals__
        if id(names) not in modules:
            seen = [value for value in names.values() if inspect.ismodule(value)]
            modules[id(names)] = [m for m in (tl, tl.core) if any(value is m for value in seen)]
        if any(getattr(m.load, "__triton_builtin__", False) for m in modules[id(names)]):
            return patch(function)
        return runtime._LangPatchScope()

    runtime._patch_lang = patch_once
