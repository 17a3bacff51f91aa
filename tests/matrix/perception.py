# ruff: noqa: E501, C408  (tables of one-line models)
# fmt: off
"""Models of images, sound and several kinds of input, of transformers."""

from typing import Any

import transformers as tf
from tests.matrix.pretrained import BART, V, entry, ids, mask, picture, text
from tests.oracle.oracle import B, Case, Net, R
from torch import Tensor, nn

import sfumato as sf


def embeddings(s: nn.Module, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's own output is a table of every text against every picture of the batch; its two towers are sound."""
    words = s.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
    pictures = s.clip.get_image_features(pixel_values=pixel_values)
    return words.pooler_output, pictures.pooler_output


def clip() -> nn.Module:
    side = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    config = tf.CLIPConfig(
        text_config=side | dict(vocab_size=V, max_position_embeddings=16, eos_token_id=2),
        vision_config=side | dict(image_size=16, patch_size=8),
        projection_dim=8,
    )
    model: nn.Module = tf.CLIPModel(config)
    return model


def fixed(config: str, head: str, **more: Any) -> Case:
    """A network with BatchNorm after ``sf.fix``."""
    built = entry(config, head, picture(32), **more)
    return Case(lambda: sf.fix(built.build()), built.inputs, loss=built.loss, tol32=1e-4)


def speech() -> dict[str, Tensor]:
    return {"input_values": R(B, 400)}


VIT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, image_size=16, patch_size=8)
WAVE = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=[8, 8], conv_stride=[5, 4], conv_kernel=[10, 8], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0, mask_time_prob=0.0, final_dropout=0.0, classifier_proj_size=8)
MODELS: dict[str, Case] = {
    "ViT": entry("ViTConfig", "ViTForImageClassification", picture(16), **VIT),
    "DeiT": entry("DeiTConfig", "DeiTForImageClassification", picture(16), **VIT),
    "BEiT": entry("BeitConfig", "BeitForImageClassification", picture(16), **VIT, drop_path_rate=0.0, use_relative_position_bias=True),
    "DINOv2": entry("Dinov2Config", "Dinov2ForImageClassification", picture(16), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=8),
    "Swin": entry("SwinConfig", "SwinForImageClassification", picture(16), image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0),
    "ConvNeXt": entry("ConvNextConfig", "ConvNextForImageClassification", picture(32), num_stages=2, hidden_sizes=[8, 12], depths=[1, 1], drop_path_rate=0.0),
    "ConvNeXt-V2": entry("ConvNextV2Config", "ConvNextV2ForImageClassification", picture(32), num_stages=2, hidden_sizes=[8, 12], depths=[1, 1], drop_path_rate=0.0),
    "SegFormer": entry("SegformerConfig", "SegformerForImageClassification", picture(32), num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 12], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0, drop_path_rate=0.0),
    "ResNet, fixed": fixed("ResNetConfig", "ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"),
    "EfficientNet, fixed": fixed("EfficientNetConfig", "EfficientNetForImageClassification", image_size=32, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320, kernel_sizes=[3, 5], in_channels=[8, 16], out_channels=[16, 24], strides=[1, 2], num_block_repeats=[1, 1], expand_ratios=[1, 6], depthwise_padding=[], dropout_rate=0.0, drop_connect_rate=0.0),
    "MobileNet-V2, fixed": fixed("MobileNetV2Config", "MobileNetV2ForImageClassification", depth_multiplier=0.25, classifier_dropout_prob=0.0),
    "RegNet, fixed": fixed("RegNetConfig", "RegNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8),
    "CLIP, its embeddings": Case(lambda: Net(embeddings, clip=clip()), lambda: {**text(), **picture(16)()}, tol32=1e-4),
    "Whisper": entry("WhisperConfig", "WhisperForConditionalGeneration", lambda: {"input_features": R(B, 8, 16), "decoder_input_ids": ids(4)}, **BART, num_mel_bins=8, max_source_positions=8, max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None),
    "Wav2Vec2": entry("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", speech, **WAVE),
    "HuBERT": entry("HubertConfig", "HubertForSequenceClassification", speech, **WAVE),
    "Audio spectrogram transformer": entry("ASTConfig", "ASTForAudioClassification", lambda: {"input_values": R(B, 16, 8)}, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, patch_size=4, frequency_stride=4, time_stride=4, max_length=16, num_mel_bins=8),
    "Perceiver on text": entry("PerceiverConfig", "PerceiverForSequenceClassification", lambda: {"inputs": ids(), "attention_mask": mask()}, num_latents=4, d_latents=16, d_model=16, num_blocks=1, num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=2, vocab_size=V, max_position_embeddings=16, attention_probs_dropout_prob=0.0),
}
