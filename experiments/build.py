"""From a config to the things it names: its kind of data, a model, its quantisers."""

import inspect
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

import qat_jax as qj
from experiments.images import ImageClassification
from experiments.questions import QuestionAnswering
from experiments.tasks import Task
from qat_jax.array_file import read_names
from qat_jax.clipping import Clipping
from qat_jax.expressions import from_text
from qat_jax.models import (
    BertForQuestionAnswering,
    BertSize,
    CifarResNet,
    MobileNetV1,
    MobileNetV2,
    MobileNetV3,
    ResNet,
    find_pretrained,
    load_weights,
)
from qat_jax.policy import BLOCK_FORMATS, edges_beside

FLOAT_BITS = 32
_DTYPES = ("float32", "bfloat16", "float16")  # that networks can compute in


class MaskedBert(BertForQuestionAnswering):
    """A BERT whose quantisers see no padding, unless it is asked for.

    Args:
        size: the arguments of `BertSize`.
        ignore_padding: whether the quantisers take what is at padding for zeros.
        **settings: of `BertForQuestionAnswering`.
    """

    def __init__(self, *, size: dict[str, int], ignore_padding: bool = True, **settings: Any):
        super().__init__(BertSize(**size), **settings)
        self.ignore_padding = ignore_padding

    def __call__(
        self,
        tokens: jax.Array,
        token_types: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """See `BertForQuestionAnswering`."""
        with qj.ignore_padding(mask if self.ignore_padding else None):
            return super().__call__(tokens, token_types, mask)


_MODELS: dict[str, Callable[..., nnx.Module]] = {
    "cifar_resnet": CifarResNet,
    "resnet": ResNet,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3": MobileNetV3,
    "bert": MaskedBert,
}
# Names of the first convolution and of the classifier, which papers keep at 8 bits.
_ENDS: dict[str, tuple[str | None, str]] = {
    "cifar_resnet": ("conv1", "linear"),
    "resnet": ("conv1", "fc"),
    "mobilenet_v1": ("conv1", "classifier"),
    "mobilenet_v2": ("conv1", "classifier"),
    "mobilenet_v3": ("conv1", "classifier"),
    "bert": (None, "answer"),  # norms and the softmax stay in float, embeddings if not asked for
}
_EMBEDDING = ("bert",)  # models that have embeddings
_TASKS: dict[str, Callable[[ConfigDict], Task]] = {
    "image_classification": ImageClassification,
    "question_answering": QuestionAnswering,
}
CLIPPINGS: dict[str, Clipping] = {
    "max": qj.AbsMax(),
    "octav": qj.Octav(),
    "octav10": qj.Octav(10),  # the paper's ten iterations, on all elements
    "exact": qj.Exact(),
    "refit": qj.Refit(),  # for vectors: nearly as good, at the price of a few passes
    "mse": qj.MseSweep(),
    "entropy": qj.Entropy(),
}


def task(config: ConfigDict) -> Task:
    """The kind of data that the config is about.

    Raises:
        ValueError: there is no such kind, or its settings cannot be.
    """
    if config.task not in _TASKS:
        raise ValueError(f"task is {config.task!r}: give one of {', '.join(_TASKS)}")
    return _TASKS[config.task](config)


def float_model(config: ConfigDict) -> nnx.Module:
    """The model, with pretrained weights if the config names some.

    Raises:
        ValueError: there is no such model, or the weights are of another.
        FileNotFoundError: the file of weights does not exist.
    """
    name, settings = _model_name(config), config.model.to_dict()
    del settings["name"]
    pretrained = settings.pop("pretrained")
    if "dtype" in settings:
        if settings["dtype"] not in _DTYPES:
            raise ValueError(
                f"model.dtype is {settings['dtype']!r}: give one of {', '.join(_DTYPES)}"
            )
        settings["dtype"] = jnp.dtype(settings["dtype"])
    _check_settings(name, settings)

    def drawn(key: jax.Array) -> nnx.Module:
        return _MODELS[name](**settings, rngs=nnx.Rngs(key))

    key = jax.random.key(config.seed)
    if pretrained is None:
        return drawn(key)
    path = find_pretrained(pretrained).weights
    model = nnx.eval_shape(drawn, key)  # to draw what a file replaces takes long
    load_weights(_loaded_part(model, path), path)
    _draw_rest(model, drawn, key)
    return model


def teacher(config: ConfigDict) -> nnx.Module | None:
    """The float network that a run learns from, or None where it learns from labels alone.

    Raises:
        ValueError: settings are given that nothing would read, or there are no weights that answer.
        FileNotFoundError: the file of weights does not exist.
    """
    if not distils(config):
        settings = config.get("distillation", ConfigDict())
        for key, unused in (("teacher", None), ("temperature", 1.0)):
            if settings.get(key, unused) != unused:
                raise ValueError(
                    f"distillation.{key} means nothing where the teacher has no share in the loss: "
                    "pass --config.distillation.weight=0.5, or whatever share it is to have"
                )
        return None
    named = config.distillation.teacher or config.model.pretrained
    if named is None:
        raise ValueError(
            "distillation.weight asks for a teacher: pass --config.distillation.teacher=FILE, "
            "weights of this network in float"
        )
    own = config.copy_and_resolve_references()
    own.model.pretrained = named
    model = float_model(own)
    path = find_pretrained(named).weights
    if _loaded_part(model, path) is not model:
        raise ValueError(
            f"{path} has no head and cannot teach to answer: pass "
            "--config.distillation.teacher=FILE, weights that are fine-tuned"
        )
    return model


def distils(config: ConfigDict) -> bool:
    """Whether a run learns from a teacher; those of earlier versions do not."""
    return bool(config.get("distillation", ConfigDict()).get("weight", 0.0))


def _check_settings(name: str, settings: dict[str, Any]) -> None:
    """Raises ValueError unless a config's section `model` is of the model that it names."""
    model: Any = _MODELS[name]
    try:
        inspect.signature(model.__init__).bind(None, **settings, rngs=None)
    except TypeError as error:
        raise ValueError(
            f"the section model of this config is not for model.name {name!r} ({error}): take a "
            "config of that model, or write one"
        ) from error


def _draw_rest(model: nnx.Module, drawn: Callable[[jax.Array], nnx.Module], key: jax.Array) -> None:
    """Fill what is still abstract, such as a new head and the streams of dropout."""
    state = nnx.to_flat_state(nnx.state(model))
    missing = [path for path, x in state if isinstance(x.get_value(), jax.ShapeDtypeStruct)]
    if not missing:
        return

    @jax.jit  # the key is an argument: of a constant XLA would draw everything as it compiles
    def rest(key: jax.Array) -> list[nnx.Variable]:
        whole = dict(nnx.to_flat_state(nnx.state(drawn(key))))
        return [whole[path] for path in missing]

    nnx.update(model, nnx.from_flat_state(zip(missing, rest(key), strict=True)))


def undrawn(make: Callable[[], nnx.Module]) -> nnx.Module:
    """The model of a function, with zeros for what a checkpoint or a file is going to replace."""

    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), x.shape)
        return jnp.zeros(x.shape, x.dtype)

    model = nnx.eval_shape(make)
    nnx.update(model, jax.tree.map(zeros, nnx.state(model)))
    return model


def _model_name(config: ConfigDict) -> str:
    name = config.model.name
    if name not in _MODELS:
        raise ValueError(f"model.name is {name!r}: give one of {', '.join(_MODELS)}")
    return name


def _loaded_part(model: nnx.Module, path: Path) -> nnx.Module:
    """What a file is for: an encoder's has no head, which fine-tuning then begins anew."""
    if not isinstance(model, BertForQuestionAnswering):
        return model
    has_head = any(name.startswith("qa_outputs.") for name in read_names(path, "weights"))
    return model if has_head else model.bert


def clipping(name: str) -> Clipping:
    """A rule by its name in configs: max, octav, exact, mse, entropy, p99.99, my_rules.Cubic(2).

    Raises:
        ValueError: there is no such rule.
    """
    if name in CLIPPINGS:
        return CLIPPINGS[name]
    percent = name.removeprefix("p")
    if name.startswith("p") and percent.replace(".", "", 1).isdigit():
        return qj.Percentile(float(percent))
    if "." in name or "(" in name:
        return from_text(name)
    raise ValueError(
        f"no clipping {name!r}: give one of {', '.join(CLIPPINGS)}, p99.99, or your own with its "
        "module, as in my_rules.Cubic(2)"
    )


def require_notation(config: ConfigDict) -> None:
    """For mains that vary or read what a notation says.

    Raises:
        ValueError: the config has a policy instead.
    """
    if config.quant.policy:
        raise ValueError("this main takes a notation, not quant.policy: --config=FILE:4/4U/4/6")


def activation_bits(config: ConfigDict) -> int:
    """The bits that the notation gives activations, for mains that look at those.

    Raises:
        ValueError: there is none, or it leaves activations alone.
    """
    require_notation(config)
    notation = qj.Notation.parse(config.quant.notation)
    if notation.activation_bits is None:
        raise ValueError(
            f"this main looks at activations, which {notation} leaves alone: give them bits, as in "
            "4/4U"
        )
    return notation.activation_bits


def fewest_examples(model: nnx.Module) -> int:
    """As many as can be cut into the shards of every activation of a quantised model."""
    found = [operand.quantizer.granularity for operand in qj.operand_quantizers(model).values()]
    return math.lcm(*(each.count for each in found if isinstance(each, qj.PerShard)))


def ptq_policy(config: ConfigDict) -> qj.Policy | None:
    """What the sections of `configs/_ptq.py` ask for; None where that is nothing.

    Raises:
        ValueError: a notation, a clipping or an option does not exist.
    """
    quant = config.quant
    _check_overrides(quant, in_float=quant.notation == "float")
    if quant.get("policy"):
        return qj.policy_from_yaml(quant.policy)
    if quant.notation == "float":
        return None
    scale = config.scale.to_dict()
    options: dict[str, Any] = {
        "vector_size": quant.vector_size,
        "weight_clipping": clipping(config.clipping.weights),
        "activation_clipping": clipping(config.clipping.activations),
        "scale": qj.IntScale(4, **(scale | {"clipping": clipping(scale["clipping"])})),
        "gradient": from_text(quant.get("gradient", "ste")),
    }
    first, last = _ENDS[_model_name(config)]
    if quant.notation in BLOCK_FORMATS:
        (inside,) = qj.preset(quant.notation).rules
        edges = quant.edges or edges_beside(inside.activations is None)
        ends = [qj.Rule.from_notation(end, edges) for end in (first, last) if end]
        rest = qj.Policy([*ends, inside])
    else:
        rest = qj.Policy.from_notation(
            quant.notation, first=first, last=last, edges=quant.edges, **options
        )
    rules = [*_overrides(quant, **options), *rest.rules]
    return qj.Policy([*rules, *_of_embeddings(config, options["gradient"])])


def quantised_model(config: ConfigDict) -> nnx.Module:
    """The model with the quantisers of `configs/_quant.py`; without where those say 32 bits.

    Raises:
        ValueError: there is no such model, clipping, gradient or number of bits.
        FileNotFoundError: the file of weights does not exist.
    """
    policy = _training_policy(config)  # what is wrong there is told before a network is made
    model = float_model(config)
    return model if policy is None else qj.quantize_model(model, policy)


def _training_policy(config: ConfigDict) -> qj.Policy | None:
    """What `configs/_quant.py` asks for; None where that is nothing."""
    quant = config.quant
    in_float = not quant.notation and quant.weight_bits == quant.activation_bits == FLOAT_BITS
    _check_overrides(quant, in_float)
    if quant.get("policy"):
        return qj.policy_from_yaml(quant.policy)
    if in_float:
        return None
    first, last = _ENDS[_model_name(config)]
    own_clipping, gradient = clipping(quant.clipping), from_text(quant.gradient)
    if quant.notation:
        rest = qj.Policy.from_notation(
            quant.notation,
            first=first,
            last=last,
            weight_clipping=own_clipping,
            gradient=gradient,
        )
    else:
        rest = qj.uniform_policy(
            quant.weight_bits,
            None if quant.activation_bits == FLOAT_BITS else quant.activation_bits,
            clipping=own_clipping,
            gradient=gradient,
            narrow=quant.narrow,
            first=first,
            last=last,
            edge_bits=quant.edge_bits,
            edge_clipping=clipping(quant.edge_clipping),
            activation_granularity=(
                qj.PerTensor() if quant.shards == 1 else qj.PerShard(quant.shards)
            ),
        )
    overrides = _overrides(
        quant, weight_clipping=own_clipping, activation_clipping=own_clipping, gradient=gradient
    )
    return qj.Policy([*overrides, *rest.rules, *_of_embeddings(config, gradient)])


def _overrides(quant: ConfigDict, **options: Any) -> list[qj.Rule]:
    """The rules that `quant.overrides` puts before all others; options of `Rule.from_notation`."""
    rules = []
    for override in quant.get("overrides", ()):
        pattern, equals, notation = override.rpartition("=")
        if not equals:
            raise ValueError(f"quant.overrides has {override!r}: write PATTERN=NOTATION")
        rules.append(qj.Rule.from_notation(pattern, notation, **options))
    return rules


def _of_embeddings(config: ConfigDict, gradient: Any) -> list[qj.Rule]:
    """The rule of tables that `quant.embeddings` asks for, clipped at the maximum."""
    written = str(config.quant.get("embeddings", ""))  # earlier configs have none
    if not written:
        return []
    if (name := _model_name(config)) not in _EMBEDDING:
        raise ValueError(f"quant.embeddings: {name} has no embeddings, leave it out")
    notation = f"{written}/-" if written.isdigit() else written
    rule = qj.Rule.from_notation(".*", notation, gradient=gradient)
    if rule.activations is not None:
        raise ValueError(
            f"quant.embeddings is {written!r}, but tables have no activations: give their bits, or "
            "a notation such as 8/-, or 4/-/6/- for vectors"
        )
    return [qj.Rule(".*", embeddings=rule.weights)]


def _check_overrides(quant: ConfigDict, in_float: bool) -> None:
    """Raises a ValueError if there are additions to a policy where nothing would read them."""
    for name in ("overrides", "embeddings"):
        if not quant.get(name):
            continue
        if quant.get("policy"):
            raise ValueError(
                f"quant.policy and quant.{name} are both given: write the rules into the policy"
            )
        if in_float:
            raise ValueError(
                f"quant.{name} are of a network that is quantised: give it bits or a notation too, "
                "or name the layers in a quant.policy"
            )


def prepare_quantisers(
    model: nnx.Module,
    quant: ConfigDict,
    batches: Callable[[int], Iterable[tuple[jax.Array, ...]]],
) -> None:
    """Gives a quantised model, in place, the factors, rotations and thresholds it begins with.

    Args:
        model: from `quantised_model`.
        quant: the section of its config; keys that earlier versions did not have may be missing.
        batches: so many batches of inputs.

    Raises:
        ValueError: something asked for cannot be.
    """
    if quant.get("learned") and not quant.static_batches:
        raise ValueError(
            "quant.learned needs thresholds to begin with: pass --config.quant.static_batches=5"
        )
    if quant.get("smoothing_batches"):
        qj.smooth(model, batches(quant.smoothing_batches))
    if quant.get("rotate"):
        qj.rotate(model)
    if quant.static_batches:
        qj.calibrate(model, batches(quant.static_batches))
    if quant.get("learned"):
        qj.learn_thresholds(model)
    if quant.get("carried"):
        qj.carry_thresholds(model, *next(iter(batches(1))))
