"""Configurations of the All-attention Transformer, and of the Transformer-XL to compare it with."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedConfig

POSITIONS = ("learned", "sinusoidal", "rotary")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "memory_length", "segment_length")


class AllAttentionConfig(PreTrainedConfig):
    """Configuration of an All-attention Transformer (Sukhbaatar et al. 2019) with segment memory (Dai et al. 2019).

    Args:
        vocab_size: V, number of tokens in the vocabulary.
        hidden_size: D, width of the model.
        num_hidden_layers: L, number of layers.
        num_attention_heads: H, heads of a layer before any cut; must divide D.
        num_persistent: N, persistent key/value vectors of each head, in place of a feed-forward layer; 0 for none.
        feed_forward_size: width of a feed-forward layer after each attention layer; 0 for none. With it, and without
            persistent vectors, the model is a Transformer-XL (see `TransformerXLConfig`).
        memory_length: M; every query attends to itself and the M positions before it ("same length" attention).
        segment_length: T, tokens that a training step reads; evaluation uses it as its stride.
        position: "learned" or "sinusoidal" relative positions, or "rotary" ones (our extension).
        share_position_bias: whether all layers share u and v.
        attend_initial_memory: whether the M positions before the first token count as zero hidden states that are
            attended to like any other (as in the authors' code), or are left out.
        projection_bias: whether the q, k, v and r projections have biases.
        final_layer_norm: whether there is a layer norm before the output layer.
        lm_head_bias: whether the output layer has a bias.
        adaptive_cutoffs: ranks that divide the vocabulary into a shortlist and tails of decreasing width (adaptive
            input and softmax), or None for plain embeddings.
        adaptive_factor: the width of each tail is that of the previous one divided by this number.
        attention_dropout: dropout of the attention weights, persistent ones included.
        hidden_dropout: dropout of each layer's output, and within a feed-forward layer.
        embedding_dropout: dropout of the scaled embeddings.
        output_dropout: dropout of the last hidden states.
        layer_norm_eps: ε of the layer norms.
        initializer_range: standard deviation of the initial values of projections and (times √D) embeddings; None
            stands for 1/√D.
        head_plan: the plan that this model was cut by, as in `head_plan.json`; None for a dense model. Its blocks are
            of feed-forward layers, or, if there are none, of persistent vectors: block j is the j-th run of vectors in
            every head of the layer.
    """

    model_type = "deadhead_all_attention"
    keys_to_ignore_at_inference = ["past_key_values", "memory"]

    vocab_size: int = 257
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_persistent: int = 128
    feed_forward_size: int = 0
    memory_length: int = 64
    segment_length: int = 64
    position: Literal["learned", "sinusoidal", "rotary"] = "learned"
    share_position_bias: bool = False
    attend_initial_memory: bool = False
    projection_bias: bool = False
    final_layer_norm: bool = True
    lm_head_bias: bool = False
    adaptive_cutoffs: list[int] | None = None
    adaptive_factor: int = 4
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    embedding_dropout: float = 0.0
    output_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    head_plan: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.adaptive_cutoffs is not None:
            self.adaptive_cutoffs = list(self.adaptive_cutoffs)
        super().__post_init__(**kwargs)
        # transformers runs validators of classes under its `strict` decorator only, and wraps their sentences.
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Check that the sizes fit each other.

        Raises:
            ValueError: a size does not fit; the message is one sentence that names it.
        """
        for name in (*_SIZES, "num_persistent", "feed_forward_size"):
            value, least = getattr(self, name), int(name in _SIZES)
            if not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, but it is {value!r}.")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, but it is {value}.")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"num_attention_heads must divide hidden_size, but {self.num_attention_heads} does not divide "
                f"{self.hidden_size}."
            )
        if self.position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, but it is {self.position!r}.")
        even_needed = {"rotary": self.head_dim, "sinusoidal": self.hidden_size}.get(self.position, 0)
        if even_needed % 2:
            raise ValueError(f"position {self.position!r} needs an even width, but it is {even_needed}.")
        for name in ("attention_dropout", "hidden_dropout", "embedding_dropout", "output_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, but it is {getattr(self, name)}.")
        if self.adaptive_factor < 1 or not self.layer_norm_eps > 0:
            raise ValueError(
                f"adaptive_factor must be at least 1 and layer_norm_eps above 0, but they are {self.adaptive_factor} "
                f"and {self.layer_norm_eps}."
            )
        cutoffs = self.adaptive_cutoffs
        if cutoffs is not None and (
            not cutoffs or cutoffs[0] < 1 or cutoffs[-1] >= self.vocab_size or cutoffs != sorted(set(cutoffs))
        ):
            raise ValueError(
                f"adaptive_cutoffs must rise and lie between 1 and vocab_size {self.vocab_size}, but are {cutoffs}."
            )
        if cutoffs is not None and self.hidden_size // self.adaptive_factor ** len(cutoffs) < 1:
            raise ValueError(
                f"hidden_size {self.hidden_size} is too small for {len(cutoffs)} tails at adaptive_factor "
                f"{self.adaptive_factor}."
            )
        if self.head_plan is not None:
            self._validate_plan()

    def _validate_plan(self) -> None:
        heads = {str(layer): self.num_attention_heads for layer in range(self.num_hidden_layers)}
        self._validate_units(self.head_plan, "head", heads)
        units = self.feed_forward_size or self.num_persistent
        what = "hidden units" if self.feed_forward_size else "persistent vectors"
        if (blocks := (self.head_plan or {}).get("blocks")) is not None:
            size = blocks.get("size") if isinstance(blocks, dict) else None
            if not isinstance(size, int):
                raise ValueError(f"head_plan must give blocks a size, a whole number, but it is {size!r}.")
            total = self._validate_units(blocks, "block")
            if any(count * size != units for count in total.values()):
                raise ValueError(f"head_plan's blocks of {size} do not make up the {units} {what} of a layer.")
        elif (hidden := (self.head_plan or {}).get("hidden_units")) is not None:
            kept = hidden.get("kept") if isinstance(hidden, dict) else None
            if not isinstance(kept, dict) or not all(isinstance(text, str) for text in kept.values()):
                raise ValueError("head_plan must keep hidden_units as ranges by layer, such as '0-4,6'.")
            found = {layer: [index for pair in _ranges(text) for index in pair] for layer, text in kept.items()}
            total = self._validate_units({"kept": found, "total": hidden.get("total")}, what.removesuffix("s"))
            if any(count != units for count in total.values()):
                raise ValueError(f"head_plan's hidden_units are not the {units} {what} of a layer.")

    def _validate_units(self, plan: Any, what: str, most: dict[str, int] | None = None) -> dict[str, int]:
        """Check the units that a plan keeps in each layer against `most`, or its own total; return the latter."""
        kept, total = (plan.get(name) if isinstance(plan, dict) else None for name in ("kept", "total"))
        layers = {str(layer) for layer in range(self.num_hidden_layers)}
        if not (isinstance(kept, dict) and isinstance(total, dict) and set(kept) == set(total) == layers):
            raise ValueError(
                f"head_plan must name each of the {self.num_hidden_layers} layers in kept and total of its {what}s."
            )
        for layer, indices in kept.items():
            count = (most or total)[layer]
            if any(not isinstance(index, int) or not 0 <= index < count for index in indices):
                raise ValueError(f"head_plan names a {what} of layer {layer} that is not one of {count}: {indices}.")
        return total

    @property
    def head_dim(self) -> int:
        """E, width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def sliding_window(self) -> int:
        """Positions that a query attends to, its own included; transformers' caches keep one less."""
        return self.memory_length + 1

    @sliding_window.setter
    def sliding_window(self, positions: int) -> None:
        self.memory_length = positions - 1

    @property
    def max_position_embeddings(self) -> int | None:
        """None, because relative positions and a sliding window do not limit the length of a text."""
        return None

    def layer_heads(self, layer: int) -> tuple[int, ...]:
        """Return the heads that are left in `layer`, by their indices in the dense model."""
        if self.head_plan is None:
            return tuple(range(self.num_attention_heads))
        return tuple(self.head_plan["kept"][str(layer)])

    def layer_feed_forward(self, layer: int) -> int:
        """Return the number of hidden units left in the feed-forward part of `layer`."""
        return self._left_of(layer, self.feed_forward_size) if self.feed_forward_size else 0

    def layer_persistent(self, layer: int) -> int:
        """Return the number of persistent vectors left in each head of `layer`, if it has heads."""
        return self.num_persistent if self.feed_forward_size else self._left_of(layer, self.num_persistent)

    def _left_of(self, layer: int, dense: int) -> int:
        """Return how many of a layer's `dense` units a plan of any version keeps."""
        plan = self.head_plan or {}
        if (blocks := plan.get("blocks")) is not None:
            return len(blocks["kept"][str(layer)]) * int(blocks["size"])
        if (hidden := plan.get("hidden_units")) is not None:
            return sum(last - first + 1 for first, last in _ranges(hidden["kept"][str(layer)]))
        return dense


def _ranges(text: str) -> list[tuple[int, int]]:
    """Return the first and the last index of each range in a text such as `0-4,6`; ValueError for other texts."""
    parts = [part.partition("-") for part in text.split(",")] if text else []
    found = [(int(first), int(last or first)) for first, _, last in parts]
    ends = [index for pair in found for index in pair]
    if any(first > last for first, last in found) or any(a >= b for a, b in zip(ends[1::2], ends[2::2], strict=False)):
        raise ValueError(f"head_plan's ranges of units must ascend, but are {text!r}.")
    return found


class TransformerXLConfig(AllAttentionConfig):
    """Configuration of a Transformer-XL language model; see `AllAttentionConfig` for all fields.

    Args:
        num_persistent: must be 0.
        feed_forward_size: width of the feed-forward layers.
    """

    model_type = "deadhead_transformer_xl"

    num_persistent: int = 0
    feed_forward_size: int = 512

    def validate_architecture(self) -> None:
        """Check the sizes as `AllAttentionConfig` does, and that they describe a Transformer-XL."""
        super().validate_architecture()
        if self.num_persistent or not self.feed_forward_size:
            raise ValueError(
                "A Transformer-XL has no persistent vectors and a feed-forward layer, but num_persistent is "
                f"{self.num_persistent} and feed_forward_size {self.feed_forward_size}."
            )
