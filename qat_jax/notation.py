"""The compact notation of VS-Quant: bits of weights, activations and their scales in one word."""

import dataclasses
import re

_SCALES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_FORM = (
    "W/A/ws/as: bits of weights, bits of activations (with U: unsigned where the data is; or - for "
    "activations left alone), bits of the weights' and of the activations' vector scales (2 to 16, "
    "fp32, fp16, bf16, or - for one floating-point scale a channel or layer; of activations also "
    "token, for one a token), as in 4/4U/4/6, 4/8/6/10, 8/8U/-/-, in short 8/8U, 4/4U/-/token, and "
    "4/-/4/- of weights alone"
)
_TOKEN = "token"


@dataclasses.dataclass(frozen=True)
class Notation:
    """What a notation says (arXiv:2102.04503, section 5); prints as it is written.

    Attributes:
      weight_bits: of the weights.
      activation_bits: of the activations; None leaves them alone ("-").
      unsigned: whether activations are unsigned where the data is ("U").
      weight_scale: of the weights' vectors: the bits of an integer scale, or the dtype of a
        floating-point one; None for one floating-point scale a channel ("-").
      activation_scale: of the activations' vectors, likewise; None for one a layer, "token" for one
        a token.
    """

    weight_bits: int
    activation_bits: int | None
    unsigned: bool = False
    weight_scale: int | str | None = None
    activation_scale: int | str | None = None

    @classmethod
    def parse(cls, text: str) -> "Notation":
        """Read a notation.

        Raises:
          ValueError: it cannot be read; the message teaches the notation.

        Example:
          >>> Notation.parse("4/8U/-/6")  # doctest: +NORMALIZE_WHITESPACE
          Notation(weight_bits=4, activation_bits=8, unsigned=True, weight_scale=None,
                   activation_scale=6)
          >>> print(Notation.parse("4/-"))
          4/-/-/-
        """
        parts = text.split("/")
        if len(parts) == 2:
            parts += ["-", "-"]
        if len(parts) != 4:
            raise ValueError(f"{text!r} has {len(parts)} parts, not 4 or 2: write {_FORM}")
        activation = re.fullmatch(r"(-)|(\d+)(U?)", parts[1])
        if activation is None:
            raise ValueError(f"activations {parts[1]!r} in {text!r}: write {_FORM}")
        if activation[1] and parts[3] != "-":
            raise ValueError(
                f"{text!r} leaves activations alone, so that they have no scales, {parts[3]}: "
                f"write {'/'.join([*parts[:3], '-'])}"
            )
        return cls(
            weight_bits=_bits(parts[0], text),
            activation_bits=None if activation[1] else _bits(activation[2], text),
            unsigned=bool(activation[3]),
            weight_scale=_scale(parts[2], text),
            activation_scale=_TOKEN if parts[3] == _TOKEN else _scale(parts[3], text),
        )

    @property
    def per_token(self) -> bool:
        """Whether each token of the activations has a scale of its own."""
        return self.activation_scale == _TOKEN

    @property
    def vector_scales(self) -> tuple[int | str | None, int | str | None]:
        """Of the vectors of weights and of activations; None for what has no vectors."""
        return self.weight_scale, None if self.per_token else self.activation_scale

    def __str__(self) -> str:
        bits = "-" if self.activation_bits is None else str(self.activation_bits)
        names: dict[int | str | None, str] = {None: "-"}
        names |= {dtype: name for name, dtype in _SCALES.items()}
        return "/".join(
            [
                str(self.weight_bits),
                f"{bits}{'U' if self.unsigned else ''}",
                *(
                    names.get(scale, str(scale))
                    for scale in (self.weight_scale, self.activation_scale)
                ),
            ]
        )


def _bits(part: str, text: str) -> int:
    if not part.isdigit() or not 2 <= int(part) <= 16:
        raise ValueError(f"{part!r} in {text!r} is not 2 to 16 bits: write {_FORM}")
    return int(part)


def _scale(part: str, text: str) -> int | str | None:
    if part == "-":
        return None
    return _SCALES[part] if part in _SCALES else _bits(part, text)
