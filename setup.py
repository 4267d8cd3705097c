"""Adds to the wheel the one thing that pyproject.toml cannot say: the start-up hook file at the root of site-packages."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HOOK = "espresso_ds_hook.pth"


class BuildWithHook(build_py):
    """Copies the .pth file next to the package, so that `pip install` puts it where Python reads it."""

    def run(self) -> None:
        """Build the package, then copy the hook file; an editable install has no place for it (`espresso install-hook`)."""
        super().run()
        if not self.editable_mode:
            self.copy_file(str(Path(__file__).parent / "launch" / HOOK), str(Path(self.build_lib) / HOOK))


setup(cmdclass={"build_py": BuildWithHook})
