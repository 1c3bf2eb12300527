import pytest

from qat_jax.data import prepare
from qat_jax.data.digits import Digits, prepare_digits


def test_data_dir_is_the_argument_else_the_variable_else_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("QAT_JAX_DATA", "/from/variable")
    monkeypatch.setenv("TFDS_DATA_DIR", "/from/tfds")
    assert prepare.resolve_data_dir(tmp_path) == tmp_path
    assert str(prepare.resolve_data_dir()) == "/from/variable"
    monkeypatch.delenv("QAT_JAX_DATA")
    assert str(prepare.resolve_data_dir()) == "/from/tfds"


def test_the_loser_of_a_race_uses_the_winners_result(monkeypatch, tmp_path):
    move = prepare._move_into_place

    def lose(draft, destination):
        monkeypatch.setattr(prepare, "_move_into_place", move)
        prepare_digits(tmp_path)
        move(draft, destination)

    monkeypatch.setattr(prepare, "_move_into_place", lose)
    builder = prepare_digits(tmp_path)
    assert len(builder.as_data_source("test")) == 360
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_failure_leaves_nothing_behind(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("out of digits")
        yield

    monkeypatch.setattr(Digits, "_generate_examples", fail)
    with pytest.raises(RuntimeError, match="out of digits"):
        prepare_digits(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_preparing_is_quiet(tmp_path, capfd):
    prepare_digits(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_cannot_be_written_to_is_a_clear_error(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(prepare.DataError, match="set QAT_JAX_DATA to a folder of your own"):
        prepare_digits(file / "data")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(prepare.DataError, match="it may not be written to"):
        prepare_digits(tmp_path)
