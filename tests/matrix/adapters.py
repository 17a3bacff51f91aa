# ruff: noqa: E501  (tables of one-line models)
# fmt: off
"""Adapters of peft on frozen language models: only the adapter is trained."""

from collections.abc import Callable
from typing import Any

import peft
import torch
from tests.matrix.language import MODELS as LANGUAGE_MODELS
from tests.oracle.oracle import Case
from torch import nn


def adapted(base: Case, config: Callable[[], Any], tier: str = "rule") -> Case:
    """The base with an adapter whose zero weights are set to random ones, so that every gradient is alive."""

    def build() -> nn.Module:
        model: nn.Module = peft.get_peft_model(base.build(), config())
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad and not p.any():
                    p.normal_(std=0.3)
        return model

    return Case(build, base.inputs, tier, loss=base.loss, tol32=1e-4)


def lora(**more: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(r=2, lora_dropout=0.0, **more)


gpt2, bert, llama, t5 = (LANGUAGE_MODELS[n] for n in ("GPT-2, tied head", "BERT classifier", "Llama", "T5, tied, relative bias"))
MODELS: dict[str, Case] = {
    "GPT-2 + LoRA": adapted(gpt2, lora(target_modules=["c_attn"], fan_in_fan_out=True)),
    "BERT + LoRA, and a trained head": adapted(bert, lora(target_modules=["query", "value"], modules_to_save=["classifier"])),
    "Llama + LoRA on all layers": adapted(llama, lora(target_modules="all-linear")),
    "Llama + LoRA on the embedding": adapted(llama, lora(target_modules=["embed_tokens", "q_proj"])),
    "T5 + LoRA": adapted(t5, lora(target_modules=["q", "v"])),
    "Llama + rsLoRA": adapted(llama, lora(target_modules=["q_proj"], use_rslora=True)),
    "Llama + DoRA": adapted(llama, lora(target_modules=["q_proj", "v_proj"], use_dora=True)),
    "Llama + IA³": adapted(llama, lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "BERT + IA³": adapted(bert, lambda: peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[], task_type="SEQ_CLS")),
    "GPT-2 + prefix tuning": adapted(gpt2, lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "GPT-2 + prefix tuning, projected": adapted(gpt2, lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6)),
    "BERT + prompt tuning": adapted(bert, lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "GPT-2 + prompt tuning": adapted(gpt2, lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "GPT-2 + p-tuning": adapted(gpt2, lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)),
    "Llama + AdaLoRA": adapted(llama, lambda: peft.AdaLoraConfig(target_modules=["q_proj"], init_r=3, target_r=2, total_step=10, lora_dropout=0.0)),
    "Llama + LoHa": adapted(llama, lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]), "microbatch"),
    "Llama + LoKr": adapted(llama, lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"])),
    "Llama + OFT": adapted(llama, lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4), "microbatch"),
    "Llama + VeRA": adapted(llama, lambda: peft.VeraConfig(r=2, target_modules=["q_proj"])),
    "Llama + layer-norm tuning": adapted(llama, lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"])),
}

dora_of_conv1d = adapted(gpt2, lora(target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True))
