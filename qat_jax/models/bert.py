"""BERT encoders and their question-answering head.

Devlin, Chang, Lee and Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding" (NAACL 2019). `BERT_BASE` and `BERT_LARGE` are its two sizes, `MINILM`
that of a small distilled one.

A new model has not said whether it trains: call `train()` or `eval()` on it first, for its dropout.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

_INITIAL_DEVIATION = 0.02
_EPSILON = 1e-12  # of layer norms


@dataclasses.dataclass(frozen=True)
class BertSize:
    """The dimensions of an encoder.

    Attributes:
        layers: how many, one after the other.
        hidden: features of a token between layers.
        heads: of each attention; they share the hidden features equally.
        intermediate: features of a token inside a layer.
        vocabulary: tokens there are.
        positions: the longest sequence.
        token_types: kinds of segments: a question and its context are two.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int = 30522
    positions: int = 512
    token_types: int = 2

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(
                f"hidden {self.hidden} is no multiple of heads {self.heads}: heads share it equally"
            )


BERT_BASE = BertSize(layers=12, hidden=768, heads=12, intermediate=3072)
BERT_LARGE = BertSize(layers=24, hidden=1024, heads=16, intermediate=4096)
MINILM = BertSize(layers=6, hidden=384, heads=12, intermediate=1536)

_normal = nnx.initializers.normal(_INITIAL_DEVIATION)


class Embeddings(nnx.Module):
    """Word, position and segment embeddings, summed and normalised."""

    def __init__(
        self, size: BertSize, *, dropout: float, rngs: nnx.Rngs, dtype: DTypeLike | None = None
    ):
        embed = partial(
            nnx.Embed, features=size.hidden, embedding_init=_normal, dtype=dtype, rngs=rngs
        )
        self.word = embed(size.vocabulary)
        self.position = embed(size.positions)
        self.token_type = embed(size.token_types)
        self.norm = nnx.LayerNorm(size.hidden, epsilon=_EPSILON, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, tokens: jax.Array, token_types: jax.Array) -> jax.Array:
        """Two int [B, L] to [B, L, hidden]."""
        positions = jnp.arange(tokens.shape[1])[None]
        x = self.word(tokens) + self.position(positions) + self.token_type(token_types)
        return self.dropout(self.norm(x))


class EncoderLayer(nnx.Module):
    """Self-attention and a feed-forward network, each around a shortcut and normalised after it."""

    def __init__(
        self,
        size: BertSize,
        *,
        dropout: float,
        broadcast_dropout: bool,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
    ):
        linear = partial(nnx.Linear, kernel_init=_normal, dtype=dtype, rngs=rngs)
        norm = partial(nnx.LayerNorm, size.hidden, epsilon=_EPSILON, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            size.heads,
            size.hidden,
            dropout_rate=dropout,
            broadcast_dropout=broadcast_dropout,
            kernel_init=_normal,
            decode=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.attention_norm = norm()
        self.intermediate = linear(size.hidden, size.intermediate)
        self.output = linear(size.intermediate, size.hidden)
        self.output_norm = norm()
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, L, hidden] and bool [B, 1, 1, L] to [B, L, hidden]."""
        x = self.attention_norm(x + self.dropout(self.attention(x, mask=mask)))
        inner = nnx.gelu(self.intermediate(x), approximate=False)
        return self.output_norm(x + self.dropout(self.output(inner)))


class Bert(nnx.Module):
    """An encoder of tokens.

    Attributes:
        size: its dimensions (static).

    Args:
        size: its dimensions.
        dropout: the share of activations that training drops, attention weights included.
        broadcast_dropout: whether all sequences and heads of a batch lose the same attention
            weights; False, as BERT was trained, draws many more random numbers.
        pooling: whether there is the layer that makes one vector of a sequence.
        remat: whether training computes the inside of a layer a second time instead of keeping it:
            less memory for a third more time.
        dtype: of the computation; parameters stay float32.
        rngs: makes the initial weights, and the dropout of training.

    Example:
        >>> model = Bert(BertSize(2, 8, 2, 16, vocabulary=11, positions=5), rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 3, 8)
    """

    def __init__(
        self,
        size: BertSize,
        *,
        dropout: float = 0.1,
        broadcast_dropout: bool = False,
        pooling: bool = False,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.size = size
        self.remat = remat
        layer = partial(
            EncoderLayer,
            size,
            dropout=dropout,
            broadcast_dropout=broadcast_dropout,
            dtype=dtype,
            rngs=rngs,
        )
        self.embeddings = Embeddings(size, dropout=dropout, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([layer() for _ in range(size.layers)])
        if pooling:
            self.pooler = nnx.Linear(
                size.hidden, size.hidden, kernel_init=_normal, dtype=dtype, rngs=rngs
            )

    def __call__(
        self,
        tokens: jax.Array,
        token_types: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Encode sequences.

        Args:
            tokens: int [B, L].
            token_types: int [B, L]; all 0 if None.
            mask: bool [B, L], False for padding, which nothing attends to; all True if None.

        Returns:
            [B, L, hidden]; what stands at padding means nothing.
        """
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        attended = mask[:, None, None, :]
        x = self.embeddings(tokens, token_types)
        run = nnx.remat(_run_layer) if self.remat else _run_layer
        for layer in self.layers:
            x = run(layer, x, attended)
        return x

    def pool(self, encoded: jax.Array) -> jax.Array:
        """One vector a sequence, made of its first token: [B, L, hidden] to [B, hidden]."""
        return jnp.tanh(self.pooler(encoded[:, 0]))


class BertForQuestionAnswering(nnx.Module):
    """An encoder that says for each token how likely an answer starts or ends there.

    Args:
        size: the encoder's dimensions.
        dropout: as of `Bert`, and so are the next three.
        broadcast_dropout: see there.
        remat: see there.
        dtype: of the computation; the logits are float32.
        rngs: as of `Bert`.
    """

    def __init__(
        self,
        size: BertSize,
        *,
        dropout: float = 0.1,
        broadcast_dropout: bool = False,
        remat: bool = False,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.bert = Bert(
            size,
            dropout=dropout,
            broadcast_dropout=broadcast_dropout,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
        self.answer = nnx.Linear(size.hidden, 2, kernel_init=_normal, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        token_types: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of starts and ends.

        Args:
            tokens: int [B, L].
            token_types: as of `Bert`.
            mask: as of `Bert`.

        Returns:
            float32 [B, L, 2]: of the start, of the end.
        """
        return self.answer(self.bert(tokens, token_types, mask)).astype(jnp.float32)


def _run_layer(layer: EncoderLayer, x: jax.Array, mask: jax.Array) -> jax.Array:
    return layer(x, mask)
