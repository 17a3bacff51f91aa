# ruff: noqa: C408  (keywords read better as keywords)
"""How the matrix builds architectures of transformers: tiny configs, random weights, every dropout off."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from tests.oracle.oracle import B, Case, R, per_record
from torch import Tensor, nn

T, V = 6, 19
LANGUAGE: dict[str, Any] = dict(
    vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
)
BERT = LANGUAGE | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=16)
LLAMA = LANGUAGE | dict(
    num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
BART = dict(
    vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
)  # fmt: skip


def ids(length: int = T) -> Tensor:
    return torch.randint(3, V, (B, length))


def mask(length: int = T) -> Tensor:
    """Padding on the right, of another length for each record; one record has none."""
    return (torch.arange(length) < torch.tensor([length, 3, length - 1, 2])[:, None]).long()


def text() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": mask()}


def plain() -> dict[str, Any]:
    return {"input_ids": ids()}


def pairs() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": mask(), "decoder_input_ids": ids(4)}


def picture(size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": R(B, 3, size, size)}


def logits(out: Any) -> Tensor:
    return per_record(out.logits)


def states(out: Any) -> Tensor:
    return per_record(out.last_hidden_state)


def both(out: Any) -> Tensor:
    return per_record([out.text_embeds, out.image_embeds])


def entry(
    config: str,
    head: str,
    inputs: Callable[[], Any],
    loss: Callable[[Any], Tensor] = logits,
    tier: str = "rule",
    **more: Any,
) -> Case:
    def build() -> nn.Module:
        made = getattr(tf, config)(**more)
        made.use_cache = False
        model: nn.Module = getattr(tf, head)(made)
        return model

    return Case(build, inputs, tier, loss=loss, tol32=1e-4)
