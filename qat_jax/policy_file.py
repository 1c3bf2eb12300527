"""Policies as text: YAML that people read, write and compare."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from qat_jax.expressions import from_text, to_text
from qat_jax.policy import Policy, Rule
from qat_jax.quantizer import Quantizer
from qat_jax.text_file import read_text

_HEAD = "# The first rule whose pattern matches the whole path of a layer decides.\n"
_SIDES = ("weights", "activations", "embeddings")
_OF_NOTATION = ("notation", "vector_size", "weight_clipping", "activation_clipping", "gradient")
_CHOICES = tuple(field.name for field in dataclasses.fields(Quantizer))


def policy_to_yaml(policy: Policy) -> str:
    """A policy as YAML.

    Args:
      policy: any whose quantisers are made of this library's choices, or of a user's own that a
        module has.

    Returns:
      A list of rules, each quantiser with its five choices; equal policies have equal texts.

    Raises:
      ValueError: a rule of clipping, a gradient or the like is of no module.

    Example:
      >>> from qat_jax import Int, PerChannel
      >>> print(policy_to_yaml(Policy([Rule("conv.*", weights=Quantizer(Int(4), PerChannel()))])))
      # The first rule whose pattern matches the whole path of a layer decides.
      - pattern: conv.*
        weights:
          format: Int(4)
          granularity: PerChannel()
          clipping: Octav()
          gradient: mad
          scale: FloatScale()
        activations: null
      <BLANKLINE>
    """
    rules = []
    for rule in policy.rules:
        written: dict[str, Any] = {"pattern": rule.pattern}
        for side in _SIDES:
            quantizer = getattr(rule, side)
            if side == "embeddings" and quantizer is None:
                continue  # most rules say nothing of them
            written[side] = quantizer and {
                name: to_text(getattr(quantizer, name)) for name in _CHOICES
            }
        rules.append(written)
    return _HEAD + yaml.safe_dump(rules, sort_keys=False, width=100)


def policy_from_yaml(text: str, source: str = "policy") -> Policy:
    """The policy that a text describes.

    A rule has a ``pattern`` and either ``weights``, ``activations`` and ``embeddings``, with the
    choices of a `Quantizer` as one would write them in Python, or a ``notation`` such as 4/4U/4/6
    with the options of `Rule.from_notation`: ``vector_size``, ``weight_clipping``,
    ``activation_clipping``, ``gradient``. Choices of your own have the name of their module, which
    is imported: ``clipping: my_rules.Cubic(2)``, ``gradient: my_rules.soft``.

    Args:
      text: YAML.
      source: where it is from, for messages.

    Raises:
      ValueError: it is no policy; the message says which rule is wrong and what is known.

    Example:
      >>> policy = policy_from_yaml('''
      ... - {pattern: stem, notation: 8/8U}
      ... - pattern: .*
      ...   weights: {format: "Int(4, narrow=True)", granularity: PerVector(16)}
      ... ''')
      >>> policy.rules[1].weights.granularity, policy.rules[1].activations
      (PerVector(size=16), None)
    """
    try:
        written = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from error
    if not isinstance(written, list) or not written:
        raise ValueError(f"{source} is no policy: write a list of rules, each with a pattern")
    rules = []
    for number, rule in enumerate(written, start=1):
        try:
            rules.append(_rule(rule))
        except ValueError as error:
            raise ValueError(f"rule {number} of {source}: {error}") from error
    return Policy(rules)


def save_policy(policy: Policy, path: str | Path) -> None:
    """Write a policy to a YAML file.

    Args:
      policy: see `policy_to_yaml`.
      path: the file; an existing one is replaced.

    Raises:
      ValueError: as of `policy_to_yaml`; nothing is written.
    """
    Path(path).write_text(policy_to_yaml(policy), encoding="utf-8")


def load_policy(path: str | Path) -> Policy:
    """Read a policy from a YAML file.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: as of `policy_from_yaml`, or it is no text.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"policy file {path} does not exist")
    return policy_from_yaml(read_text(path), str(path))


def _rule(written: Any) -> Rule:
    if not isinstance(written, dict) or not isinstance(written.get("pattern"), str):
        raise ValueError(f"{written!r} has no pattern: write `pattern: REGEX`, quoted if need be")
    keys = set(written) - {"pattern"}
    if "notation" in keys:
        _check_keys(keys, _OF_NOTATION)
        options = {key: _choice(key, written[key]) for key in keys - {"notation"}}
        return Rule.from_notation(written["pattern"], str(written["notation"]), **options)
    _check_keys(keys, _SIDES)
    if not keys:
        return Rule(written["pattern"])  # layers that stay as they are
    sides = {side: _quantizer(written[side]) for side in keys}
    return Rule(written["pattern"], **sides)


def _quantizer(written: Any) -> Quantizer | None:
    if written is None:
        return None
    if not isinstance(written, dict) or "format" not in written:
        raise ValueError(f"{written!r} is no quantiser: give at least its format, such as Int(4)")
    _check_keys(set(written), _CHOICES)
    return Quantizer(**{name: _choice(name, value) for name, value in written.items()})


def _choice(name: str, written: Any) -> Any:
    """What is written of a quantiser's choice, or of an option of a notation."""
    if name == "vector_size" and not isinstance(written, int):
        raise ValueError(f"vector_size is {written!r}: give a whole number, such as 16")
    choice = from_text(written)
    if name == "gradient" and not (isinstance(choice, str) or callable(choice)):
        raise ValueError(f"gradient is {written!r}: give one, such as mad")
    return choice


def _check_keys(keys: set[str], known: tuple[str, ...]) -> None:
    if unknown := keys - set(known):
        raise ValueError(f"no {min(map(str, unknown))!r} here: there are {', '.join(known)}")
