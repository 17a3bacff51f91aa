"""Models of a library that nobody here wrote, from tiny configurations."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.checking.cases import CE, ragged
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


def ids() -> Tensor:
    return torch.randint(2, 40, (6, 6))


def labels() -> Tensor:
    return torch.arange(6) % 2


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, max_position_embeddings=16))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    )


def vit() -> nn.Module:
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=2)
    )


def mixtral(**options: Any) -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=4, **options)
    )


def each_records_mean(out: Any, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(out.logits.transpose(1, 2), batch["labels"], reduction="none").mean(1).mean()


def text() -> dict[str, Tensor]:
    tokens = ids()
    return {"input_ids": tokens, "labels": tokens}


SOUND: dict[str, tuple[Any, Any, Any]] = {
    "BERT with attention_mask, its own loss": (
        bert, None, lambda: {"input_ids": ids(), "attention_mask": ragged(6), "labels": labels()}
    ),
    "BERT, a loss module": (bert, CE, lambda: {"input_ids": ids(), "attention_mask": ragged(6), "labels": labels()}),
    "GPT-2": (gpt2, each_records_mean, text),
    "GPT-2 with LoRA": (lora, each_records_mean, text),
    "T5": (
        t5, each_records_mean,
        lambda: {"input_ids": ids(), "attention_mask": ragged(6), "decoder_input_ids": ids(), "labels": ids()},
    ),
    "ViT": (vit, CE, lambda: (torch.rand(6, 3, 8, 8), labels())),
    "Mixtral": (mixtral, each_records_mean, text),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_model_passes(name: str) -> None:
    build, criterion, batch = SOUND[name]
    model = build().train()
    report = sf.check(model, criterion, batch())
    assert report.ok, str(report)
    assert report.coverage.keys() == {n for n, p in model.named_parameters() if p.requires_grad}


VIOLATIONS: dict[str, tuple[Any, Any, Any]] = {
    "the mean over all tokens": (
        gpt2, None, lambda: {"input_ids": (t := ids()), "labels": t.masked_fill(ragged(6) == 0, -100)}
    ),
    "the balancing loss of experts": (
        lambda: mixtral(output_router_logits=True, router_aux_loss_coef=0.01), None, text
    ),
    "num_items_in_batch": (gpt2, None, lambda: {**text(), "num_items_in_batch": 30}),
}  # fmt: skip


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_found(name: str) -> None:
    build, criterion, batch = VIOLATIONS[name]
    report = sf.check(build().train(), criterion, batch())
    assert not report.ok
    assert any("loss" in p.where or "num_items" in p.where for p in report.problems), report
