# ruff: noqa: E501, C408  (tables of one-line models)
# fmt: off
"""Language models of transformers."""

from typing import Any

import torch
from tests.matrix.pretrained import BART, BERT, LANGUAGE, LLAMA, T, V, entry, ids, mask, pairs, plain, text
from tests.oracle.oracle import B, Case

ROUTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(num_local_experts=4, num_experts_per_tok=2)),
    "Qwen2-MoE": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", dict(moe_intermediate_size=12, shared_expert_intermediate_size=12, num_experts=4, num_experts_per_tok=2)),
    "OLMoE": ("OlmoeConfig", "OlmoeForCausalLM", dict(num_experts=4, num_experts_per_tok=2)),
}


def routed(config: str, head: str, way: str, **more: Any) -> Case:
    """A model with routed experts, by one of the ways in which transformers can run them."""
    return entry(config, head, text, tier="microbatch" if way == "eager" else "rule", **LLAMA, **more, experts_implementation=way)


def square() -> dict[str, Any]:
    """A mask for every pair of words, as a caller who packs or prefixes would make it."""
    causal = torch.ones(T, T).tril().bool()
    return {"input_ids": ids(), "attention_mask": (causal & mask()[:, None, None, :].bool()) | torch.eye(T).bool()}


def packed() -> dict[str, Any]:
    """Two documents in each row, told apart by their positions."""
    cut = torch.tensor([2, 3, 4, 6])[:, None]
    place = torch.arange(T).expand(B, T)
    return {"input_ids": ids(), "position_ids": torch.where(place < cut, place, place - cut)}


GPT2 = dict(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
MODELS: dict[str, Case] = {
    "GPT-2, tied head": entry("GPT2Config", "GPT2LMHeadModel", text, **GPT2),
    "GPT-2, no mask": entry("GPT2Config", "GPT2LMHeadModel", plain, **GPT2),
    "GPT-2, eager attention": entry("GPT2Config", "GPT2LMHeadModel", text, **GPT2, attn_implementation="eager"),
    "GPT-2, 4-D mask": entry("GPT2Config", "GPT2LMHeadModel", square, **GPT2),
    "BERT, 4-D mask": entry("BertConfig", "BertForSequenceClassification", square, **BERT),
    "Llama, 4-D mask": entry("LlamaConfig", "LlamaForCausalLM", square, **LLAMA),
    "Llama, packed rows": entry("LlamaConfig", "LlamaForCausalLM", packed, **LLAMA),
    "GPT-2 classifier": entry("GPT2Config", "GPT2ForSequenceClassification", text, **GPT2, pad_token_id=0),
    "GPT-NeoX": entry("GPTNeoXConfig", "GPTNeoXForCausalLM", text, **LANGUAGE, hidden_dropout=0.0, attention_dropout=0.0, max_position_embeddings=16),
    "OPT": entry("OPTConfig", "OPTForCausalLM", text, vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, max_position_embeddings=16, word_embed_proj_dim=16, dropout=0.0, attention_dropout=0.0),
    "BLOOM": entry("BloomConfig", "BloomForCausalLM", text, vocab_size=V, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.0, attention_dropout=0.0),
    "Falcon": entry("FalconConfig", "FalconForCausalLM", text, vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, hidden_dropout=0.0, attention_dropout=0.0),
    "BERT classifier": entry("BertConfig", "BertForSequenceClassification", text, **BERT),
    "BERT, masked words, tied": entry("BertConfig", "BertForMaskedLM", text, **BERT),
    "BERT, no mask": entry("BertConfig", "BertForSequenceClassification", plain, **BERT),
    "BERT, eager attention": entry("BertConfig", "BertForSequenceClassification", text, **BERT, attn_implementation="eager"),
    "DistilBERT": entry("DistilBertConfig", "DistilBertForSequenceClassification", text, vocab_size=V, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0),
    "RoBERTa": entry("RobertaConfig", "RobertaForSequenceClassification", text, **BERT, pad_token_id=1),
    "ELECTRA": entry("ElectraConfig", "ElectraForSequenceClassification", text, **BERT, embedding_size=8),
    "MPNet": entry("MPNetConfig", "MPNetForSequenceClassification", text, **BERT | dict(max_position_embeddings=32), relative_attention_num_buckets=32),
    "DeBERTa-v2": entry("DebertaV2Config", "DebertaV2ForSequenceClassification", text, **BERT, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"], pooler_dropout=0.0, norm_rel_ebd="layer_norm", share_att_key=True),
    "ALBERT, shared layers": entry("AlbertConfig", "AlbertForSequenceClassification", text, **BERT, embedding_size=8, classifier_dropout_prob=0.0),
    "ModernBERT": entry("ModernBertConfig", "ModernBertForSequenceClassification", text, **LANGUAGE, **TOKENS, max_position_embeddings=16, cls_token_id=1, sep_token_id=2),
    "XLNet": entry("XLNetConfig", "XLNetForSequenceClassification", text, vocab_size=V, d_model=16, n_layer=1, n_head=2, d_inner=24, dropout=0.0, summary_last_dropout=0.0),
    "T5, tied, relative bias": entry("T5Config", "T5ForConditionalGeneration", pairs, vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0),
    "BART": entry("BartConfig", "BartForConditionalGeneration", pairs, **BART, max_position_embeddings=16),
    "Pegasus": entry("PegasusConfig", "PegasusForConditionalGeneration", pairs, **BART, max_position_embeddings=16),
    "Llama": entry("LlamaConfig", "LlamaForCausalLM", text, **LLAMA),
    "Llama, eager attention": entry("LlamaConfig", "LlamaForCausalLM", text, **LLAMA, attn_implementation="eager"),
    "Qwen2, tied": entry("Qwen2Config", "Qwen2ForCausalLM", text, **LLAMA, tie_word_embeddings=True),
    "Qwen3": entry("Qwen3Config", "Qwen3ForCausalLM", text, **LLAMA, head_dim=8),
    "Gemma": entry("GemmaConfig", "GemmaForCausalLM", text, **LLAMA, head_dim=8),
    "Gemma 2": entry("Gemma2Config", "Gemma2ForCausalLM", text, **LLAMA, head_dim=8),
    "Mistral": entry("MistralConfig", "MistralForCausalLM", text, **LLAMA, sliding_window=4),
    **{f"{name}, {way}": routed(config, head, way, **more) for name, (config, head, more) in ROUTED.items() for way in ("batched_mm", "eager")},
    "Phi": entry("PhiConfig", "PhiForCausalLM", text, **LLAMA, resid_pdrop=0.0),
    "Phi-3": entry("Phi3Config", "Phi3ForCausalLM", text, **LLAMA),
    "StableLM": entry("StableLmConfig", "StableLmForCausalLM", text, **LLAMA),
    "Mamba": entry("MambaConfig", "MambaForCausalLM", plain, vocab_size=V, hidden_size=8, state_size=4, num_hidden_layers=1, **TOKENS),
    "Mamba-2": entry("Mamba2Config", "Mamba2ForCausalLM", plain, vocab_size=V, hidden_size=16, state_size=4, num_hidden_layers=1, num_heads=4, head_dim=8, n_groups=1, chunk_size=4, **TOKENS),
    "RWKV": entry("RwkvConfig", "RwkvForCausalLM", plain, vocab_size=V, hidden_size=8, num_hidden_layers=2, attention_hidden_size=8, intermediate_size=12),
}
