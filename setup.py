"""Adds to the wheel what pyproject.toml cannot say: native code, and the start-up hook file at the root of site-packages."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

HOOK = "espresso_ds_hook.pth"
CSRC = Path("espresso_ds/csrc")

# A plain library of C functions, loaded by ctypes: no Python or torch headers. Kernels are compiled for several CPUs each and
# chosen at run time. Without contraction sums equal Python's, and each other's. Optional: where no compiler is, all works in
# plain Python and torch, slowly, and says so.
NATIVE = Extension(
    "espresso_ds._native",
    sources=sorted(str(source) for source in CSRC.glob("*.cpp")),
    depends=sorted(str(header) for kind in ("*.h", "*.inc") for header in CSRC.glob(kind)),
    extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-pthread"],
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,
)


class BuildWithHook(build_py):
    """Copies the .pth file next to the package, so that `pip install` puts it where Python reads it."""

    def run(self) -> None:
        """Build the package, then copy the hook file; an editable install has no place for it (`espresso install-hook`)."""
        super().run()
        if not self.editable_mode:
            self.copy_file(str(Path(__file__).parent / "launch" / HOOK), str(Path(self.build_lib) / HOOK))


setup(cmdclass={"build_py": BuildWithHook}, ext_modules=[NATIVE])
