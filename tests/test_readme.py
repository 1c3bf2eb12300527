"""The README's Python runs as it stands, for a model and arrays of the reader's own."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

README = (Path(__file__).parents[1] / "README.md").read_text()


class MyModel(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.body = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        return self.head(nnx.relu(self.body(x)).mean((1, 2)))


def test_the_readme_runs(capsys, tmp_path, monkeypatch):
    whole, rules, pure, vectors, diagnostics, elsewhere = re.findall(
        r"```python\n(.*?)```", README, re.DOTALL
    )
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    names = {"MyModel": MyModel, "my_loss": lambda y, target: jnp.mean((y - target) ** 2)}
    exec(whole, names)
    assert "body   Conv    int4" in capsys.readouterr().out
    target = jnp.ones((4, 3))
    losses = [
        float(names["step"](names["model"], names["optimizer"], images, target)) for _ in range(5)
    ]
    assert losses[-1] < losses[0]

    names["model"] = MyModel(nnx.Rngs(0))
    exec(rules, names)
    w = jax.random.normal(jax.random.key(1), (8, 5))
    exec(pure, names | {"x": w.T, "w": w, "dims": (((1,), (0,)), ((), ()))})

    vector_names = names | {"x": jax.random.normal(jax.random.key(2), (40, 5)), "nnx": nnx}
    exec(vectors, vector_names)

    names["x"] = images
    exec(diagnostics, names)

    monkeypatch.chdir(tmp_path)
    names["model4"] = vector_names["model4"]
    names["model4"].eval()
    exec(elsewhere, names)
    expected = names["model4"](images)
    assert jnp.abs(names["program"].call(images) - expected).max() < 1e-4
    assert (tmp_path / "net.safetensors").is_file()
