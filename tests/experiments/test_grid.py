import pytest

from experiments.grid import cells, read_file


def test_every_combination_gets_a_name_and_flags():
    made = cells({"quant": ["bits=4", "bits=2"], "optimizer.learning_rate": ["0.1"], "seed": ["7"]})
    assert [cell.name for cell in made] == [
        "quant=bits=4,learning_rate=0.1,seed=7",
        "quant=bits=2,learning_rate=0.1,seed=7",
    ]
    assert made[1].flags("configs/digits.py") == [
        "--config=configs/digits.py:bits=2",
        "--config.optimizer.learning_rate=0.1",
        "--config.seed=7",
    ]
    assert made[0].flags("a.py:clipping=max")[0] == "--config=a.py:clipping=max,bits=4"
    assert made[0].setting == ("bits=4", "0.1")


def test_keys_with_the_same_end_are_written_out():
    (cell,) = cells({"a.bits": ["4"], "b.bits": ["8"], "path": ["/x/y.npz"]})
    assert cell.name == "a.bits=4,b.bits=8,path=x-y.npz"
    assert cell.flags("a.py") == [
        "--config=a.py",
        "--config.a.bits=4",
        "--config.b.bits=8",
        "--config.path=/x/y.npz",
    ]


def test_entries_of_a_list_are_crossed_with_the_grid(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "grid: {seed: [0, 1]}\n"
        "cells:\n"
        "- {quant: 4/4U, calibration.pool: true}\n"
        "- {quant: 3/3U, calibration.pool: false}\n"
    )
    grid, listed = read_file(path)
    assert [cell.values for cell in cells(grid, listed)] == [
        {"quant": quant, "calibration.pool": pool, "seed": seed}
        for quant, pool in (("4/4U", "True"), ("3/3U", "False"))
        for seed in ("0", "1")
    ]


@pytest.mark.parametrize(
    ("grid", "listed", "message"),
    [
        ({}, [], "nothing is swept: pass --sweep.KEY"),
        ({"seed": ["0", "0"]}, [], "two cells would be called seed=0"),
        ({"bits": ["4/4", "4-4"]}, [], "two cells would be called bits=4-4"),
        ({"seed": ["0"]}, [{"seed": "1"}], "seed is both in the grid and in the list"),
        ({}, [{"a": "1"}, {"b": "1"}], "give each the same keys"),
    ],
)
def test_what_is_no_sweep_is_refused(grid, listed, message):
    with pytest.raises(ValueError, match=message):
        cells(grid, listed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: [", "is not YAML"),
        ("- 1", "is no sweep: give `grid:`"),
        ("gird: {}", "is no sweep"),
        ("grid: {seed: 0}", "grid is {'seed': 0}"),
        ("cells: [3]", r"cells is \[3\]"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path, text, message):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_file(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.yaml does not exist"):
        read_file(tmp_path / "no.yaml")
