"""How tests compile and draw examples, and real data that several rooms test on.

The suite passes without the data: these tests are skipped.
"""

import gc
import io
import os
import shutil
import signal
import tempfile
from collections.abc import Generator
from importlib import metadata
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

# Compiling is most of the suite's time and LLVM's optimisations most of that, hardly ever repaid.
# Set XLA_FLAGS to test with others, or to nothing for XLA's own.
_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# JAX 0.10 can still emit kernels without MLIR, in half the time; later ones cannot and refuse the
# flag. On them, the other end that has to pass, the suite runs with the emitters that users have.
if metadata.version("jaxlib").startswith("0.10."):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)

# How long an example takes says how busy the machine is, and what had to be compiled.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

# A suite that was started in the background ignores Ctrl-C, as its mains do not (`cli.main`): tests
# would differ by who started them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What one worker, or a main that a test starts, has compiled, the others need not: the variables
# are inherited. An entry is as quick to read as it is small, so every one is kept.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_made_here = None
if _CACHE not in os.environ:
    _made_here = os.environ[_CACHE] = tempfile.mkdtemp(prefix="qat_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Collect the garbage of a file of tests, and spare later collections what is left of it.

    Compiled programs stay, and the millions of objects that know them. Looking through all of them
    again and again would be a seventh of the suite's time.
    """
    result = yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return result


def pytest_unconfigure() -> None:
    """Remove the compiled programs, in the process that began them."""
    if _made_here is not None:
        shutil.rmtree(_made_here, ignore_errors=True)


_BESIDE_THE_PROJECT = Path(__file__).resolve().parents[2] / "shared" / "data"
# Read once: tests of the mains point the variable at folders of their own.
_FOLDER = Path(os.environ.get("QAT_JAX_DATA", _BESIDE_THE_PROJECT))


@pytest.fixture
def searches_of_accelerators(monkeypatch):
    """`Octav` as it is traced for accelerators."""
    # Imported here: JAX reads the variables above when it is.
    from jax import lax

    from qat_jax.clipping.octav import _threshold as compiled

    monkeypatch.setattr(lax, "platform_dependent", lambda *args, default, **_: default(*args))
    compiled.clear_cache()
    yield
    compiled.clear_cache()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of development data, with `cifar10/` and others in it."""
    if not _FOLDER.is_dir():
        pytest.skip(f"no development data at {_FOLDER}: set QAT_JAX_DATA to a folder that has it")
    return _FOLDER


@pytest.fixture(scope="session")
def cifar10_test(shared_data: Path) -> tuple[np.ndarray, np.ndarray]:
    """The first 1,000 CIFAR-10 test images, uint8 [1000, 32, 32, 3], and labels, int [1000]."""
    path = shared_data / "cifar10" / "cifar10_test_first1000_lossless.npz"
    if not path.is_file():
        pytest.skip(f"no CIFAR-10 test images at {path}")
    with np.load(path, allow_pickle=False) as arrays:
        strips = [_webp(arrays[key]) for key in sorted(arrays) if key.startswith("webp_")]
        return np.concatenate(strips), arrays["labels"].astype(int)


def _webp(encoded: np.ndarray) -> np.ndarray:
    """Decode a strip of images that are stacked one above the other."""
    pixels = np.asarray(Image.open(io.BytesIO(encoded.tobytes())).convert("RGB"))
    return pixels.reshape(-1, 32, 32, 3)
