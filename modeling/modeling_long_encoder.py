"""Long encoder: Beltagy, Peters and Cohan 2020, "Longformer: The Long-Document Transformer" (arXiv:2004.05150), and
Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences" (arXiv:2007.14062), with the global-local attention of
Ainslie et al. 2020, "ETC" (arXiv:2004.08483), as one system.

Blocks and attention, with its call of ALL_ATTENTION_FUNCTIONS.get_interface(...), are those of the vanilla encoder. A
token sees what its layer's pattern shows and the global tokens; these see all. Section numbers are Longformer's.

Shapes: B batch, T tokens, G global tokens of a row, H heads, D head dim.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import cross_attention_mask, new_positions
from .attention_patterns import Pattern
from .checks import check_counted, check_some_token
from .classification import token_classification_loss
from .configuration_long_encoder import LongEncoderConfig
from .modeling_vanilla_encoder import (
    MultiHeadAttention,
    VanillaEncoderForMaskedLM,
    VanillaEncoderForSequenceClassification,
    VanillaEncoderModel,
    VanillaEncoderPreTrainedModel,
    VanillaTransformerEncoderBlock,
)


class GlobalRows(NamedTuple):
    """The global tokens of each row, at the front, and others behind them up to the same number.

    Attributes:
        index: [B, G], which tokens; none is there twice.
        is_global: [B, G], False for the others.
        mask: which keys they see, in the form that the backend takes.
    """

    index: torch.Tensor
    is_global: torch.Tensor
    mask: Any

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """From [B, T, ...] those tokens, [B, G, ...]."""
        return states.gather(1, self._like(self.index, states).expand(-1, -1, *states.shape[2:]))

    def put(self, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] with `new` [B, G, ...] in the place of the global tokens."""
        new = torch.where(self._like(self.is_global, states), new, self.of(states))
        return states.scatter(1, self._like(self.index, states).expand_as(new), new)

    @staticmethod
    def _like(tensor: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return tensor.view(*tensor.shape, *[1] * (states.ndim - 2))


class GlobalProjectedAttention(MultiHeadAttention):
    """Attention whose global tokens attend to all with queries, keys and values of their own (section 3.1)."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.global_q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.layer_bias)
        self.global_k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.layer_bias)
        self.global_v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.layer_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask,
        order=None,
        global_rows: GlobalRows | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden], and the weights [B, H, T, T] where the backend has them: those of the usual
        projections, which the outputs of global tokens do not use."""
        output, weights = super().forward(hidden_states, attention_mask, order, **kwargs)
        if global_rows is None:
            return output, weights
        query = self.split_heads(self.global_q_proj(global_rows.of(hidden_states)))  # [B, H, G, D]
        key, value = (self.split_heads(proj(hidden_states)) for proj in (self.global_k_proj, self.global_v_proj))
        own, _ = self.attend(query, key, value, global_rows.mask, order, **kwargs)
        return global_rows.put(output, own), weights


class LongEncoderBlock(VanillaTransformerEncoderBlock):
    """The vanilla encoder's, with projections for global tokens where the config has them."""

    def __init__(self, config: LongEncoderConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.global_projections:
            self.self_attn = GlobalProjectedAttention(config, layer_idx)


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens are global


class Row(NamedTuple):
    """What rules of global tokens look at: ids [B, T] if there are any, positions [B or 1, T], the padding mask."""

    input_ids: torch.Tensor | None
    positions: torch.Tensor
    attention_mask: torch.Tensor | None


class NoneGlobal:
    """No token is global."""

    def __init__(self, config: LongEncoderConfig):
        pass

    def __call__(self, row: Row) -> tuple[torch.Tensor | None, int | None]:
        """[B or 1, T] bool, and at most how many of a row, None if that is not known; None where there are none."""
        return None, None


class FirstGlobal(NoneGlobal):
    """The first tokens of each row, or of each document."""

    def __init__(self, config: LongEncoderConfig):
        self.count = config.num_global_tokens if config.global_tokens == "first" else 1

    def __call__(self, row: Row) -> tuple[torch.Tensor, int | None]:
        counted = row.positions.shape[0] == 1 and row.attention_mask is None
        return row.positions < self.count, min(self.count, row.positions.shape[1]) if counted else None


class EdgesGlobal(NoneGlobal):
    """The first and the last block of each row (Big Bird, section 2)."""

    def __init__(self, config: LongEncoderConfig):
        self.block = config.num_global_tokens

    def __call__(self, row: Row) -> tuple[torch.Tensor, int]:
        last = row.positions.amax(dim=1, keepdim=True) // self.block * self.block
        most = min(2 * self.block, row.positions.shape[1])
        return (row.positions < self.block) | (row.positions >= last), most if row.attention_mask is None else None


class QuestionGlobal(NoneGlobal):
    """The tokens before the first separator (section 4)."""

    def __init__(self, config: LongEncoderConfig):
        self.separator = config.sep_token_id

    def __call__(self, row: Row) -> tuple[torch.Tensor, None]:
        if row.input_ids is None or self.separator is None:
            raise ValueError(
                f"The question, whose tokens are global, ends with sep_token_id={self.separator} in input_ids; give "
                "both, or a global_attention_mask."
            )
        ends = row.input_ids == self.separator
        if not torch.compiler.is_compiling() and not bool(ends.any(dim=1).all()):
            missing = (~ends.any(dim=1)).nonzero().flatten().tolist()
            raise ValueError(
                f"input_ids have no sep_token_id={self.separator} in row {', '.join(map(str, missing))}, so that no "
                "token is global; end each question with it, or give a global_attention_mask."
            )
        return ends.cumsum(dim=1) == 0, None


RULES = {"by_task": NoneGlobal, "none": NoneGlobal, "first": FirstGlobal, "edges": EdgesGlobal}


@torch.compiler.disable  # how many there are is in the values
def _most(global_tokens: torch.Tensor) -> int:
    if torch.compiler.is_exporting():
        raise ValueError(
            "How many tokens are global is in the values of global_attention_mask or attention_mask, which an export "
            "cannot look at; leave both out and the choice to the config's global_tokens."
        )
    return int(global_tokens.sum(dim=1).max())


# ---------------------------------------------------------------------------------------------------------------------
# Models


class LongEncoderPreTrainedModel(VanillaEncoderPreTrainedModel):
    """What Transformers wants to know about the family."""

    config: LongEncoderConfig
    _no_split_modules = ["LongEncoderBlock"]
    _can_record_outputs = {"hidden_states": LongEncoderBlock, "attentions": MultiHeadAttention}


class LongEncoderModel(VanillaEncoderModel, LongEncoderPreTrainedModel):
    """The encoder without a head: ids or embeddings in, hidden states [B, T, hidden] out."""

    config: LongEncoderConfig
    block_class = LongEncoderBlock
    _tp_plan = {
        **VanillaEncoderModel._tp_plan,
        "layers.*.self_attn.global_q_proj": "colwise",
        "layers.*.self_attn.global_k_proj": "colwise",
        "layers.*.self_attn.global_v_proj": "colwise",
    }

    def __init__(self, config: LongEncoderConfig, task_rule: type[NoneGlobal] = NoneGlobal):
        super().__init__(config)
        self.default_globals = (task_rule if config.global_tokens == "by_task" else RULES[config.global_tokens])(config)

    def patterns_for(self, length: int) -> list[Pattern]:
        """Blocks are drawn for a length (Big Bird, section 2)."""
        return [pattern.bind((length,)) for pattern in self.patterns]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            global_attention_mask: [B, T], 1 for global tokens, which see all and which all see, and 0 for others; None
                for those that config.global_tokens says.

        The other arguments are those of VanillaEncoderModel.
        """
        embeddings = self.token_embeddings(input_ids, inputs_embeds)
        check_some_token(attention_mask)
        marked, most = self.find_globals(input_ids, embeddings, attention_mask, global_attention_mask, position_ids)
        embeddings = embeddings + self.type_embeddings(token_type_ids, embeddings)
        hidden_states, masks, order = self.prepare(
            embeddings, attention_mask, position_ids, global_tokens=marked, most_global=most
        )
        if self.config.global_projections and marked is not None:
            kwargs["global_rows"] = self.global_rows(marked, most, embeddings, attention_mask, position_ids)
        hidden_states = self.dropout(self.embedding_norm(hidden_states))
        for layer, mask in zip(self.layers, masks):
            hidden_states = layer(hidden_states, mask, order=order, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

    def find_globals(
        self, input_ids, embeddings, attention_mask, global_attention_mask, position_ids
    ) -> tuple[torch.Tensor | None, int | None]:
        """[B, T] bool, which tokens are global, and at most how many of a row; None where there are none."""
        if global_attention_mask is not None:
            if global_attention_mask.shape != embeddings.shape[:2]:
                raise ValueError(
                    f"global_attention_mask must have shape {list(embeddings.shape[:2])}, "
                    f"got {list(global_attention_mask.shape)}."
                )
            marked, most = global_attention_mask.bool(), None
        else:
            if isinstance(self.default_globals, EdgesGlobal):
                check_counted(position_ids, 0, "global_tokens='edges', which looks for the end of a row,")
            positions, _ = new_positions(embeddings, attention_mask, position_ids)
            marked, most = self.default_globals(Row(input_ids, positions, attention_mask))
        if marked is None:
            return None, None
        marked = marked.expand(embeddings.shape[:2])
        if attention_mask is not None and attention_mask.ndim == 2:
            marked = marked & attention_mask.bool()
        most = _most(marked) if most is None else most
        return (marked, most) if most else (None, None)

    def global_rows(self, marked, most: int, embeddings, attention_mask, position_ids) -> GlobalRows:
        """The global tokens of each row, and that they see all of it."""
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                "global_projections=True take a 2-D attention_mask beside global tokens, got "
                f"{attention_mask.ndim} dimensions."
            )
        if attention_mask is None:
            check_counted(position_ids, 0, "global_projections=True, whose global tokens see whole rows,")
        index = marked.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        mask = cross_attention_mask(self.config, index, embeddings, attention_mask)
        return GlobalRows(index, marked.gather(1, index), mask)


class LongEncoderForMaskedLM(VanillaEncoderForMaskedLM, LongEncoderPreTrainedModel):
    """The encoder with the logits of what stood at each position."""

    config: LongEncoderConfig
    model_class = LongEncoderModel

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        Args:
            labels: [B, T] ids that stood at each position, not shifted; -100 is ignored.

        The other arguments are those of LongEncoderModel.
        """
        return super().forward(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            labels,
            global_attention_mask=global_attention_mask,
            **kwargs,
        )


class LongEncoderForSequenceClassification(VanillaEncoderForSequenceClassification, LongEncoderPreTrainedModel):
    """The encoder with a classifier on what it made of each row's first token, which is global (section 4)."""

    config: LongEncoderConfig

    def __init__(self, config: LongEncoderConfig):
        super().__init__(config)
        self.act_fn = ACT2FN[config.pooler_act]

    @staticmethod
    def model_class(config: LongEncoderConfig) -> LongEncoderModel:
        return LongEncoderModel(config, FirstGlobal)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """
        Args:
            labels: [B] classes, [B] numbers where num_labels is 1, or [B, num_labels] of 0 and 1 for several classes.

        The other arguments are those of LongEncoderModel.
        """
        return super().forward(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            labels,
            global_attention_mask=global_attention_mask,
            **kwargs,
        )


class LongEncoderForTokenClassification(LongEncoderPreTrainedModel):
    """The encoder with a linear classifier of every token."""

    def __init__(self, config: LongEncoderConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.loss_function = token_classification_loss
        self.model = LongEncoderModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """
        Args:
            labels: [B, T] classes; -100 is ignored.

        The other arguments are those of LongEncoderModel.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            global_attention_mask=global_attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class LongEncoderForQuestionAnswering(LongEncoderPreTrainedModel):
    """The encoder with scores of where an answer begins and ends; the question's tokens are global (section 4)."""

    def __init__(self, config: LongEncoderConfig):
        super().__init__(config)
        self.model = LongEncoderModel(config, QuestionGlobal)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """
        Args:
            start_positions, end_positions: [B], the slots of an answer's first and last token; ignored outside the
                row.

        The other arguments are those of LongEncoderModel.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            global_attention_mask=global_attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (_slot_loss(start_logits, start_positions) + _slot_loss(end_logits, end_positions)) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _slot_loss(logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in float32, of logits [B, T] to slots [B]."""
    slots = slots.to(logits.device).reshape(-1).clamp(0, logits.shape[1])
    return nn.functional.cross_entropy(logits.float(), slots, ignore_index=logits.shape[1])


LongEncoder = LongEncoderModel

__all__ = [
    "LongEncoder",
    "LongEncoderForMaskedLM",
    "LongEncoderForQuestionAnswering",
    "LongEncoderForSequenceClassification",
    "LongEncoderForTokenClassification",
    "LongEncoderModel",
    "LongEncoderPreTrainedModel",
]
