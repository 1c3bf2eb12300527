"""Policies: which layers get which quantisers, by regular expressions on layer paths."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from qat_jax.clipping import AbsMax, Clipping, Octav
from qat_jax.formats import Float, Format, Int
from qat_jax.gradients import GradientRule
from qat_jax.granularity import Granularity, PerChannel, PerTensor, PerVector
from qat_jax.notation import Notation
from qat_jax.quantizer import Quantizer
from qat_jax.scales import E4M3, E8M0, FloatScale, IntScale, Scale


@dataclasses.dataclass(frozen=True)
class Rule:
    """The quantisers of the layers whose path a pattern matches.

    Attributes:
      pattern: a regular expression that matches the whole path of a layer, such as
        ``"layer1/0/conv1"`` or ``".*/conv[12]"``.
      weights: quantiser of the layer's kernel; None leaves it as it is.
      activations: quantiser of the layer's input, and of all four operands of attention's two
        matrix products; None leaves them as they are.
      embeddings: quantiser of the table, if the layer is an embedding: a channel is the row of a
        token, vectors lie along its features. None says nothing of embeddings.

    Raises:
      TypeError: something is not of these types.
      ValueError: the pattern is no regular expression.
    """

    pattern: str
    weights: Quantizer | None = None
    activations: Quantizer | None = None
    embeddings: Quantizer | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise TypeError(f'pattern is {self.pattern!r}: give a regular expression, such as ".*"')
        for name in ("weights", "activations", "embeddings"):
            if not isinstance(given := getattr(self, name), Quantizer | None):
                raise TypeError(f"{name} is {given!r}: give a Quantizer, such as Quantizer(Int(4))")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"{self.pattern!r} is not a regular expression: {error}") from None

    @classmethod
    def from_notation(
        cls,
        pattern: str,
        notation: str,
        *,
        vector_size: int = 16,
        weight_clipping: Clipping | None = None,
        activation_clipping: Clipping | None = None,
        scale: IntScale | None = None,
        gradient: str | GradientRule = "ste",
    ) -> "Rule":
        """The quantisers that VS-Quant's notation names (arXiv:2102.04503, section 5).

        Grids are narrow. Integer scales have their coarse scale for each output channel of a
        weight and for the whole of an activation.

        Args:
          pattern: see `Rule`.
          notation: W/A/ws/as, such as "4/4U/4/6", or "4/-/4/-" of weights alone: see `Notation`.
          vector_size: V, the elements of a vector.
          weight_clipping: of weights, the maximum if None, as in the paper.
          activation_clipping: of activations, likewise.
          scale: the other choices of the integer scales, its bits and coarse groups aside; the
            paper's if None.
          gradient: of both, a name or a rule; "mph" is MAD for weights and PWL for activations.

        Returns:
          The rule.

        Raises:
          ValueError: the notation cannot be read.
        """
        parsed = Notation.parse(notation)

        def quantizer(
            format: Int,
            stored: int | str | None,
            otherwise: Granularity,
            clipping: Clipping | None,
            gradient: str | GradientRule,
        ) -> Quantizer:
            clipping = AbsMax() if clipping is None else clipping
            if stored is None:
                return Quantizer(format, otherwise, clipping, gradient)
            rule: Scale = (
                dataclasses.replace(scale or IntScale(4), bits=stored, coarse=otherwise)
                if isinstance(stored, int)
                else FloatScale(stored)  # type: ignore[arg-type]
            )
            return Quantizer(format, PerVector(vector_size), clipping, gradient, rule)

        weight_gradient, activation_gradient = _gradients(gradient)
        weight_scale, activation_scale = parsed.vector_scales
        return cls(
            pattern,
            weights=quantizer(
                Int(parsed.weight_bits, narrow=True),
                weight_scale,
                PerChannel(),
                weight_clipping,
                weight_gradient,
            ),
            activations=None
            if parsed.activation_bits is None
            else quantizer(
                Int(parsed.activation_bits, signed=None if parsed.unsigned else True, narrow=True),
                activation_scale,
                PerChannel() if parsed.per_token else PerTensor(),
                activation_clipping,
                activation_gradient,
            ),
        )


@dataclasses.dataclass(frozen=True)
class Policy:
    """An ordered list of rules; the first whose pattern matches a layer's path decides.

    Layers that no rule matches stay as they are. Of an embedding the first decides that matches its
    path and has a quantiser for embeddings.

    Attributes:
      rules: the rules, first match first.

    Raises:
      TypeError: these are not rules.

    Example:
      >>> w8, w4 = Quantizer(Int(8)), Quantizer(Int(4))
      >>> policy = Policy([Rule("stem", weights=w8), Rule(".*", weights=w4)])
      >>> policy.place(["stem", "head"])["head"].weights.format
      Int(bits=4, signed=True, narrow=False)
    """

    rules: Sequence[Rule]

    def __post_init__(self) -> None:
        if isinstance(self.rules, str):
            raise TypeError(f"a Policy has rules: for one of a name, write preset({self.rules!r})")
        if isinstance(self.rules, Rule):
            raise TypeError("rules is one rule: give a list of rules, [rule] for one")
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f'{rule!r} is no rule: give rules, such as Rule(".*", weights=w4)')

    @classmethod
    def from_notation(
        cls,
        notation: str,
        *,
        first: str | None = None,
        last: str | None = None,
        edges: str | None = None,
        **options: Any,
    ) -> "Policy":
        """The policy that VS-Quant's notation names.

        Args:
          notation: W/A/ws/as of every layer but the ends, such as "4/4U/4/6": see `Notation`.
          first: pattern of the first convolution, if it is to follow ``edges``.
          last: pattern of the classifier, likewise.
          edges: notation of these two, clipped at the maximum; 8/8U if None, or 8/- where
            ``notation`` leaves activations alone.
          **options: of `Rule.from_notation`.

        Returns:
          A policy that covers every layer.

        Example:
          >>> rule = Policy.from_notation("4/4U/4/6").rules[0]
          >>> rule.weights.granularity, rule.weights.scale.bits, rule.activations.scale.bits
          (PerVector(size=16), 4, 6)
        """
        if edges is None:
            edges = edges_beside(Notation.parse(notation).activation_bits is None)
        ends = [Rule.from_notation(end, edges) for end in (first, last) if end is not None]
        return cls([*ends, Rule.from_notation(".*", notation, **options)])

    def place(self, paths: Sequence[str], embeddings: Sequence[str] = ()) -> dict[str, Rule]:
        """The rule of each path that has one.

        Args:
          paths: the paths of the layers that can be quantised, embeddings aside.
          embeddings: the paths of those.

        Returns:
          A rule for each path that some rule matches.

        Raises:
          ValueError: if a rule decides for no layer; it lists the paths there are. Only a last
            rule for everything else may find nothing left.
        """
        placed: dict[str, Rule] = {}
        for rule in self.rules:
            there = [*paths, *(embeddings if rule.embeddings is not None else ())]
            matched = [path for path in there if re.fullmatch(rule.pattern, path)]
            new = [path for path in matched if path not in placed]
            if not new and not (rule is self.rules[-1] and len(matched) == len(there) > 0):
                if matched:
                    reason = "only layers that earlier rules decide"
                elif any(re.fullmatch(rule.pattern, path) for path in embeddings):
                    reason = "only embeddings, and has no quantiser for them: give embeddings=…"
                else:
                    reason = "no layer"
                raise ValueError(
                    f"rule {rule.pattern!r} matches {reason}. Patterns match whole paths; "
                    f"there are: {', '.join(there) or 'none'}"
                )
            placed.update(dict.fromkeys(new, rule))
        return placed


def edges_beside(weights_alone: bool) -> str:
    """The notation of the ends, beside layers that quantise their weights alone or not."""
    return "8/-" if weights_alone else "8/8U"


def uniform_policy(
    weight_bits: int,
    activation_bits: int | None,
    *,
    clipping: Clipping | None = None,
    gradient: str | GradientRule = "mph",
    narrow: bool = True,
    first: str | None = None,
    last: str | None = None,
    edge_bits: int = 8,
    edge_clipping: Clipping | None = None,
    activation_granularity: Granularity = PerTensor(),
) -> Policy:
    """The same bits in all layers but the first convolution and the classifier.

    This is the recipe of OCTAV's convolutional networks (arXiv:2206.06501, section 5): weights
    per output channel, the classifier's per tensor, activations per tensor and signed only where
    the data is; first and last layer at 8 bits. Only the grids are others by default.

    Args:
      weight_bits: of the weights between the two ends.
      activation_bits: of the activations between the two ends; None leaves all activations as
        they are, the ends' too.
      clipping: how thresholds are found, OCTAV by default.
      gradient: "ste", "pwl", "mad" or a rule for weights and activations alike, or "mph", the
        paper's choice: MAD for weights, PWL for activations.
      narrow: whether the threshold is itself a code (see `Int`). The paper's grids are not
        narrow; below 8 bits the missing code at +s costs more than the noise model knows of
        (docs/decisions.md).
      first: pattern of the first convolution, if one is to have ``edge_bits``.
      last: pattern of the classifier, likewise.
      edge_bits: of what is quantised of those two.
      edge_clipping: of those two, ``clipping`` by default.
      activation_granularity: of all activations; `PerShard` saves collectives.

    Returns:
      A policy that covers every layer.
    """
    clipping = Octav() if clipping is None else clipping
    edge_clipping = clipping if edge_clipping is None else edge_clipping
    weight_gradient, activation_gradient = _gradients(gradient)

    def weights(bits: int, granularity: PerChannel | PerTensor, clipping: Clipping) -> Quantizer:
        return Quantizer(Int(bits, narrow=narrow), granularity, clipping, weight_gradient)

    def activations(bits: int | None, clipping: Clipping) -> Quantizer | None:
        if bits is None:
            return None
        format = Int(bits, signed=None, narrow=narrow)
        return Quantizer(format, activation_granularity, clipping, activation_gradient)

    rules = []
    edge_activations = activations(activation_bits and edge_bits, edge_clipping)
    if first is not None:
        edge_weights = weights(edge_bits, PerChannel(), edge_clipping)
        rules.append(Rule(first, edge_weights, edge_activations))
    if last is not None:
        edge_weights = weights(edge_bits, PerTensor(), edge_clipping)
        rules.append(Rule(last, edge_weights, edge_activations))
    between = weights(weight_bits, PerChannel(), clipping)
    return Policy([*rules, Rule(".*", between, activations(activation_bits, clipping))])


# The block formats: format, vector size, scale.
_BLOCKS: dict[str, tuple[Format, int, Scale]] = {
    "nvfp4": (Float(2, 1), 16, E4M3()),
    "mxfp4": (Float(2, 1), 32, E8M0()),
    "mxfp6": (Float(2, 3), 32, E8M0()),
    "mxfp6-e3m2": (Float(3, 2), 32, E8M0()),
    "mxfp8": (Float(4, 3), 32, E8M0()),
    "mxfp8-e5m2": (Float(5, 2), 32, E8M0()),
    "mxint8": (Int(8, narrow=True), 32, E8M0()),
}
_ALONE = "-weights"  # what follows the name of a block format that activations do not have
BLOCK_FORMATS = (*_BLOCKS, *(name + _ALONE for name in _BLOCKS))


def preset(name: str, *, first: str | None = None, last: str | None = None) -> Policy:
    """A named policy: ``octav-w4a4``, ``max-w8a8``, ``vsquant-4/4U/4/6``, ``nvfp4``, ….

    Weights alone have names too: ``octav-w4``, ``vsquant-4/-/4/-``, ``mxfp4-weights``. Beside them
    activations stay in floating point, where ``octav-w4a16`` makes them integers of 16 bits.

    Args:
      name: one of three kinds. ``octav`` or ``max``, then the bits of weights and, if they are
        quantised, of activations, then if wanted the gradient (``mph`` if not): see
        `uniform_policy`. ``vsquant-`` and a `Notation`: see `Policy.from_notation`. ``nvfp4``,
        ``mxfp4``, ``mxfp6`` (E2M3), ``mxfp6-e3m2``, ``mxfp8`` (E4M3), ``mxfp8-e5m2`` or
        ``mxint8``: weights and activations of all layers, the ends too, in that block format;
        followed by ``-weights``, the weights alone.
      first: pattern of the first convolution, kept at 8 bits; block formats do not.
      last: pattern of the classifier, likewise.

    Returns:
      The policy.

    Raises:
      ValueError: if there is no such preset.

    Example:
      >>> preset("octav-w4a4", first="stem", last="head").rules[0].weights.format.bits
      8
      >>> print(preset("octav-w4").rules[0].activations)
      None
    """
    if name in BLOCK_FORMATS:
        format, size, scale = _BLOCKS[name.removesuffix(_ALONE)]
        block = Quantizer(format, PerVector(size), AbsMax(), "ste", scale)
        return Policy([Rule(".*", block, None if name.endswith(_ALONE) else block)])
    if name.startswith("vsquant-"):
        return Policy.from_notation(name.removeprefix("vsquant-"), first=first, last=last)
    match = re.fullmatch(r"(octav|max)-w(\d+)(?:a(\d+))?(?:-(mph|mad|pwl|ste))?", name)
    if match is None:
        raise ValueError(
            f"no preset {name!r}: write octav-w4a4 or max-w4a4 with bits of your own, octav-w4 for "
            "weights alone, and a gradient if you like, as in octav-w4a4-ste (mph, mad, pwl or "
            f"ste); vsquant-4/4U/4/6; or {', '.join(_BLOCKS)}, or one of these with {_ALONE}"
        )
    clipping, weight_bits, activation_bits, gradient = match.groups()
    return uniform_policy(
        int(weight_bits),
        None if activation_bits is None else int(activation_bits),
        clipping=Octav() if clipping == "octav" else AbsMax(),
        gradient=gradient or "mph",
        first=first,
        last=last,
    )


def _gradients(gradient: str | GradientRule) -> tuple[str | GradientRule, str | GradientRule]:
    """Of weights and of activations."""
    return ("mad", "pwl") if gradient == "mph" else (gradient, gradient)


def preset_for_layers(
    policy: Policy | str, convolutions: Sequence[str], linears: Sequence[str]
) -> Policy:
    """A named policy whose ends are the first convolution and the last linear layer.

    Args:
      policy: a name, see `preset`; or a policy, which stays what it is.
      convolutions: paths of the model's convolutions, in order.
      linears: paths of its linear layers, in order.

    Returns:
      The policy; an end that the model lacks has no rule.

    Raises:
      TypeError: it is neither.
      ValueError: if there is no such preset.

    Example:
      >>> [rule.pattern for rule in preset_for_layers("octav-w4a4", ["stem", "body"], []).rules]
      ['stem', '.*']
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"policy is {policy!r}: give a Policy, or the name of a preset")
    return preset(
        policy,
        first=re.escape(convolutions[0]) if convolutions else None,
        last=re.escape(linears[-1]) if linears else None,
    )
