"""Compiles the C sources beside itself, where there is a C compiler; without one everything works, by torch.

Hatchling calls it when a wheel or an editable install is made; `python merge/compiled/build_hook.py` does it by hand.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "kernels.native"  # no name of a module, since it is none
_FLAGS = ("-O3", "-std=c11", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden")


def compiled() -> str:
    """Compile the library; say why there is none, or nothing where there is one now."""
    LIBRARY.unlink(missing_ok=True)
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler: merges will be made by torch alone, which is slower"
    command = [*compiler.split(), *_FLAGS, "-o", str(LIBRARY), *map(str, sorted(HERE.glob("*.c"))), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"the C sources were not compiled, so merges will be slower:\n{done.stderr}" if done.returncode else ""


class KernelsHook(BuildHookInterface[Any]):
    """Puts the library into wheels, and beside its source for editable installs."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a wheel that holds the library is one for this platform, and for any Python 3."""
        if self.target_name != "wheel":
            return
        reason = compiled()
        if reason:
            self.app.display_warning(reason)
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(LIBRARY.relative_to(Path(self.root).resolve()).as_posix())


if __name__ == "__main__":
    sys.exit(compiled() or 0)
