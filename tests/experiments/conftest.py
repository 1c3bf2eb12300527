import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from flax import nnx

from qat_jax.models import CifarResNet, save_weights


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the embedded digits are prepared, once: a folder of the tests' own."""
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def own_data(data_dir: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAT_JAX_DATA", data_dir)
        yield


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random parameters of the network of `resnet8.FLAGS`."""
    path = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    save_weights(CifarResNet(8, in_channels=1, width=4, rngs=nnx.Rngs(0)), path)
    return path


@pytest.fixture(autouse=True)
def in_project_root(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pytestconfig.rootpath)


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before
