"""The start-up hook: runs in every Python process of the environment, so it imports nothing but `sys` and does next to nothing.

A `.pth` file next to the package imports this module when the interpreter starts. It puts a finder on `sys.meta_path` that
waits for `deepspeed` and its launcher to be imported, and then hands the finished module to `deepspeed_patch`. Where deepspeed
is never imported, nothing else happens. Why this way and not another: docs/design.md, "How the plan reaches the workers".
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

WATCHED = ("deepspeed", "deepspeed.launcher.runner")
HOOK_FILE = "espresso_ds_hook.pth"
HOOK_LINE = "import espresso_ds.integrations.boot"


class _Loader:
    """The module's own loader, with our call after the module has been executed."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        from . import deepspeed_patch

        deepspeed_patch.imported(module)


class _Finder:
    """Finds watched modules as Python would without us, and wraps their loader."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in WATCHED or self._searching:
            return None
        self._searching = True
        try:
            for finder in sys.meta_path:
                spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader)
                    return spec
            return None
        finally:
            self._searching = False


def hook_file_installed() -> bool:
    """Whether a directory on `sys.path` holds the hook file, so that every Python of this environment is hooked."""
    import os

    return any(os.path.exists(os.path.join(directory, HOOK_FILE)) for directory in sys.path)


def active() -> bool:
    """Whether this interpreter has the hook."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install() -> None:
    """Put the finder first, once. A deepspeed that is already imported is patched at once."""
    if active():
        return
    sys.meta_path.insert(0, _Finder())
    for name in WATCHED:
        if name in sys.modules:
            from . import deepspeed_patch

            deepspeed_patch.imported(sys.modules[name])


install()
