import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from qat_jax.array_file import draft_of, read_arrays, read_metadata, read_names, write_arrays

SUFFIXES = ("safetensors", "npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(
    arrays=st.dictionaries(
        st.sampled_from(["a", "layer1.0.weight", "conv1/kernel", "file"]),
        hnp.arrays(
            st.sampled_from([np.float32, np.float16, np.int32, np.uint8]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
        ),
        min_size=1,
    )
)
def test_arrays_come_back_bit_for_bit(suffix, arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays") / f"arrays.{suffix}"
    write_arrays({name: array.T for name, array in arrays.items()}, path)
    assert read_names(path, "weights") == arrays.keys()
    found = read_arrays(path, "weights")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.T.shape
        assert found[name].tobytes() == array.T.tobytes()


def test_an_npz_is_what_numpy_reads(tmp_path):
    write_arrays({"a": np.arange(3)}, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_array_equal(file["a"], np.arange(3))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("read", [read_arrays, read_names])
@pytest.mark.parametrize("keep", [0, 10, 150])
def test_a_torn_file_is_refused(suffix, read, keep, tmp_path):
    path = tmp_path / f"torn.{suffix}"
    write_arrays({"a": np.arange(100.0)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"torn.{suffix} is not a readable {suffix} file"):
        read(path, "weights")


def test_damaged_contents_of_an_npz_are_refused(tmp_path):
    path = tmp_path / "damaged.npz"
    write_arrays({"a": np.arange(100.0)}, path)
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.npz is not a readable npz file"):
        read_arrays(path, "weights")


def test_pickles_are_never_read(tmp_path):
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    np.array([{}], object).dump(tmp_path / "pickle.npz")
    np.save((tmp_path / "single.npz").open("wb"), np.arange(3))
    for name in ("objects.npz", "pickle.npz", "single.npz"):
        with pytest.raises(ValueError, match="is not a readable npz file"):
            read_arrays(tmp_path / name, "weights")


def test_what_npz_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    arrays = {"a": np.ones(3), "b": np.ones(3, ml_dtypes.bfloat16)}
    with pytest.raises(ValueError, match=r"no bfloat16 \(b\): save a .safetensors file"):
        write_arrays(arrays, tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())
    write_arrays(arrays, tmp_path / "a.safetensors")
    assert read_arrays(tmp_path / "a.safetensors", "weights")["b"].dtype == ml_dtypes.bfloat16


def test_arrays_that_cannot_be_written_leave_the_file_before(tmp_path):
    path = tmp_path / "a.npz"
    write_arrays({"a": np.arange(3)}, path)
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        write_arrays({"a": np.ones(3), "b": np.array([{}], object)}, path)
    np.testing.assert_array_equal(read_arrays(path, "weights")["a"], np.arange(3))
    assert list(tmp_path.iterdir()) == [path]


def test_a_draft_takes_the_place_of_a_file_once_it_is_whole(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")

    def write_half():
        with draft_of(path) as draft:
            draft.write_text("half of it")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text() == "before"
    with draft_of(path) as draft:
        draft.write_text("whole")
        assert path.read_text() == "before"
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_is_no_file_to_write(suffix, tmp_path):
    folder = tmp_path / f"a.{suffix}"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"is a folder: give the path of a file in it"):
        write_arrays({"a": np.ones(3)}, folder)
    assert list(tmp_path.rglob("*")) == [folder]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_files_and_folders_are_named(suffix, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights file .*none.* does not exist: give"):
        read_arrays(tmp_path / f"none.{suffix}", "weights")
    with pytest.raises(FileNotFoundError, match=r"folder .*none does not exist: make it"):
        write_arrays({"a": np.ones(3)}, tmp_path / "none" / f"a.{suffix}")


def test_what_cannot_be_read_again_is_not_written(tmp_path):
    eight_bits = np.ones(4, ml_dtypes.float8_e4m3fn)
    for suffix in SUFFIXES:
        with pytest.raises(ValueError, match=r"float8_e4m3fn \(a\): convert it to float32 first"):
            write_arrays({"a": eight_bits}, tmp_path / f"a.{suffix}")
    assert not list(tmp_path.iterdir())
    save_file({"a": eight_bits}, tmp_path / "a.safetensors")  # as others do
    with pytest.raises(ValueError, match="such as float8: convert the weights to float32"):
        read_arrays(tmp_path / "a.safetensors", "weights")


def test_texts_have_their_place_in_safetensors(tmp_path):
    write_arrays({"a": np.ones(2)}, tmp_path / "a.safetensors", {"key": "text"})
    assert read_metadata(tmp_path / "a.safetensors", "weights") == {"key": "text"}
    with pytest.raises(ValueError, match="npz has no place for metadata"):
        write_arrays({"a": np.ones(2)}, tmp_path / "a.npz", {"key": "text"})
