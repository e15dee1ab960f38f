"""Configuration of Transformer-XL (Dai et al. 2019, arXiv:1901.02860)."""

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .attention_patterns import check_known
from .checks import check_heads_divide, check_not_negative, check_probabilities, check_sizes


@strict
class TransformerXLConfig(PreTrainedConfig):
    """What a Transformer-XL is made of. The defaults are a small model of bytes.

    Args:
        vocab_size: number of token ids, the frequent ones first if there are cutoffs.
        hidden_size: width of the residual stream; even.
        num_hidden_layers: number of layers.
        num_attention_heads: number of heads.
        head_dim: size of a query, key or value; hidden_size / num_attention_heads if None.
        intermediate_size: width of the feed-forward layer; 4 * hidden_size if None.
        hidden_act: activation of the feed-forward layer.
        embedding_size: width of the embeddings of the first cluster; hidden_size if None.
        cutoffs: where the vocabulary is cut into clusters (adaptive input and softmax); [] for one cluster.
        div_val: each cluster's embeddings are so many times narrower than those of the one before.
        tie_projections: for each cluster, does the softmax share the projection of the input embeddings? All but the
            first if None.
        mem_len: number of slots in every layer's memory, at least 1.
        same_length: every query sees exactly its last mem_len tokens, itself included, so that nothing depends on
            where segments end; otherwise it sees the whole memory and its own segment up to itself.
        segment_length: longer inputs are read in segments of so many tokens, with the memory between them (and no
            gradient through it); None for never.
        clamp_len: larger distances count as this one; None for no limit.
        untie_r: every layer has its own u and v; otherwise all share one pair.
        norm_first: layer norm at the start of each residual branch; otherwise after the sum, as in the paper.
        zero_initial_memory: begin with mem_len zero hidden states that are attended to, as the authors' TensorFlow
            code and TransfoXL in Transformers 4 did, instead of with an empty memory.
        hidden_dropout: dropout on embeddings, distances, and in and after each sublayer.
        attention_dropout: dropout on attention weights.
        layer_norm_eps: epsilon of the layer norms.
        initializer_range: standard deviation of the initial weights.
        projection_initializer_range: the same for the projections of adaptive embeddings.
        chunk_size_feed_forward: positions that feed-forward layers and their norms take at a time, 0 for all; training
            then keeps only what they begin with.
        chunk_size_lm_head: positions whose logits the loss takes at a time, 0 for all; then it comes without logits.
    """

    model_type = "transformer_xl"
    keys_to_ignore_at_inference = ["past_key_values"]  # the Trainer adds a list to it
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.r_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "relu"
    embedding_size: int | None = None
    cutoffs: list[int] | tuple[int, ...] = ()
    div_val: int = 1
    tie_projections: list[bool] | tuple[bool, ...] | None = None
    mem_len: int = 128
    same_length: bool = False
    segment_length: int | None = None
    clamp_len: int | None = None
    untie_r: bool = False
    norm_first: bool = False
    zero_initial_memory: bool = False
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    projection_initializer_range: float = 0.01
    chunk_size_feed_forward: int = 0
    chunk_size_lm_head: int = 0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.head_dim is None and self.num_attention_heads > 0:
            check_heads_divide(self)
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        self.cutoffs = list(self.cutoffs)
        if self.tie_projections is None:
            self.tie_projections = [i > 0 and self.tie_word_embeddings for i in range(len(self.cutoffs) + 1)]
        self.tie_projections = list(self.tie_projections)
        super().__post_init__(**{"auto_map": {}, **kwargs})  # TRL reads it of every config

    @property
    def is_adaptive(self) -> bool:
        """Are there clusters or projections, rather than one table of embeddings as wide as the model?"""
        return bool(self.cutoffs) or self.div_val > 1 or self.embedding_size != self.hidden_size

    def validate_sizes(self):
        """Every size is at least 1, or more where the model needs more."""
        sizes = "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim intermediate_size div_val"
        check_sizes(self, *sizes.split())
        for name in ("segment_length", "clamp_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None for no limit, got {value}.")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size must be even (distances are sines and cosines), got {self.hidden_size}.")
        check_probabilities(self, "hidden_dropout", "attention_dropout")
        check_known(self, "hidden_act", ACT2FN)
        check_not_negative(self, "layer_norm_eps", "initializer_range", "projection_initializer_range")
        check_not_negative(self, "chunk_size_feed_forward", "chunk_size_lm_head")

    def validate_memory(self):
        """A model without a memory could not continue a text from its cache."""
        if self.mem_len < 1:
            raise ValueError(
                f"mem_len must be at least 1, got {self.mem_len}. For a model without recurrence give use_cache=False "
                "to every call, and no segment_length."
            )

    def validate_clusters(self):
        """Cutoffs rise within the vocabulary, and every cluster has a width."""
        ends = [0, *self.cutoffs, self.vocab_size]
        if any(start >= end for start, end in zip(ends, ends[1:])):
            raise ValueError(
                f"cutoffs must rise between 0 and vocab_size={self.vocab_size}, both excluded, got {self.cutoffs}."
            )
        narrowest = self.embedding_size // self.div_val ** len(self.cutoffs)
        if narrowest < 1:
            raise ValueError(
                f"embedding_size={self.embedding_size} divided by div_val={self.div_val} for each of the "
                f"{len(self.cutoffs)} cutoffs leaves no width for the last cluster."
            )
        if len(self.tie_projections) != len(self.cutoffs) + 1:
            raise ValueError(
                f"tie_projections must say so for each of {len(self.cutoffs) + 1} clusters, got {self.tie_projections}."
            )
        if any(self.tie_projections) and not self.tie_word_embeddings:
            raise ValueError("tie_projections without tie_word_embeddings: projections are tied only with embeddings.")


__all__ = ["TransformerXLConfig"]
