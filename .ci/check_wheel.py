"""Builds the wheel, looks into it, and runs the README's first lines with it alone.

    python .ci/check_wheel.py CONSTRAINTS

The wheel is installed with the exact versions of the file CONSTRAINTS into a new environment, in a
folder that has no checkout. The exit status is 0 only if all is as it should be.
"""

import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BEFORE = """
import jax.numpy as jnp
from flax import nnx


class MyModel(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.body = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(nnx.relu(self.stem(x)))).mean((1, 2)))


def my_loss(y, target):
    return jnp.mean((y - target) ** 2)
"""
_AFTER = """
images, target = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.ones((4, 3))
losses = [float(step(model, optimizer, images, target)) for _ in range(5)]
assert losses[-1] < losses[0], losses
assert "int4" in repr(model.body), model.body

import importlib, importlib.util, pathlib, sys

package = pathlib.Path(qj.__file__)
assert package.is_relative_to(sys.prefix), package
assert (package.parent / "py.typed").is_file()
for name in ("experiments", "configs", "tests"):
    assert importlib.util.find_spec(name) is None, f"{name} came with the wheel"
extras = {"export.onnx": "export", "data": "experiments", "training": "experiments"}
for room, extra in extras.items():
    try:
        importlib.import_module(f"qat_jax.{room}")
    except ModuleNotFoundError as error:
        assert f"qat_jax[{extra}]" in str(error), error
    else:
        raise AssertionError(f"qat_jax.{room} came without its extra")
"""


def build(folder: Path) -> Path:
    """The wheel of the checkout, in a folder."""
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_content(wheel: Path) -> None:
    """Every committed file of the package is in it, its licence, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    listed = _run("git", "-C", str(ROOT), "ls-files", "qat_jax")
    package = set(listed.split())
    metadata = {name for name in found if ".dist-info/" in name}
    missing, foreign = package - found, found - package - metadata
    if missing or foreign:
        sys.exit(f"{wheel.name} lacks {sorted(missing)} and should not have {sorted(foreign)}")
    if "qat_jax/py.typed" not in found or not any(name.endswith("/LICENSE") for name in metadata):
        sys.exit(f"{wheel.name} has no py.typed or no licence")


def use(wheel: Path, constraints: Path, folder: Path) -> None:
    """Runs the README's first lines in a new environment that has the wheel."""
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    _run(python, "-m", "pip", "install", "--quiet", "-c", str(constraints), str(wheel))
    first = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    if first is None:
        sys.exit("README.md has no Python to run")
    script = folder / "readme.py"
    script.write_text(_BEFORE + first[1] + _AFTER, "utf-8")
    print(_run(python, "-I", str(script), cwd=folder), end="")


def _run(*command: str, cwd: Path | None = None) -> str:
    """What a command prints; it ends this one if it fails."""
    ran = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ran.stdout}")
    return ran.stdout


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        built = build(Path(temporary))
        check_content(built)
        use(built, Path(sys.argv[1]).resolve(), Path(temporary))
        print(f"{built.name}: as it should be")
