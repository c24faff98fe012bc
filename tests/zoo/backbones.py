"""Small configurations of the backbone families of keras_hub, under a pooling and a linear head."""

import keras
import keras_hub

from tests.zoo.specimen import TOKENS, classifier

TEXT = {"vocabulary_size": TOKENS, "num_layers": 2, "hidden_dim": 8, "intermediate_dim": 12}
HEADS = TEXT | {"num_heads": 2}
GROUPED = TEXT | {"num_query_heads": 2, "num_key_value_heads": 1}
IMAGE = {"image_shape": (16, 16, 3)}
GEMMA = GROUPED | {"head_dim": 4}
VIT = IMAGE | {"patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 8}


def _hub(name, **options):
    return lambda: classifier(getattr(keras_hub.models, f"{name}Backbone")(**options))


def _mit():
    return keras_hub.models.MiTBackbone(
        image_shape=(32, 32, 3),
        num_layers=2,
        hidden_dims=[4, 8],
        layerwise_depths=[1, 1],
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        max_drop_path_rate=0.0,
    )


def _segformer():
    mit = keras_hub.models.MiTBackbone(
        image_shape=(32, 32, 3),
        num_layers=4,
        hidden_dims=[4, 6, 8, 10],
        layerwise_depths=[1, 1, 1, 1],
        layerwise_num_heads=[1, 1, 2, 2],
        layerwise_sr_ratios=[4, 2, 1, 1],
        layerwise_patch_sizes=[7, 3, 3, 3],
        layerwise_strides=[4, 2, 2, 2],
        max_drop_path_rate=0.0,
    )
    return classifier(keras_hub.models.SegFormerBackbone(image_encoder=mit, projection_filters=8))


def _resnet(block_type, use_pre_activation):
    return _hub(
        "ResNet",
        image_shape=(16, 16, 3),
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type=block_type,
        use_pre_activation=use_pre_activation,
    )


def _whisper():
    model = keras_hub.models.WhisperBackbone(
        **HEADS, num_mels=4, max_encoder_sequence_length=8, max_decoder_sequence_length=8
    )
    return classifier(model, {"encoder_features": 8})


def _diffusion_transformer():
    from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT

    model = MMDiT(
        patch_size=2,
        hidden_dim=8,
        num_layers=2,
        num_heads=2,
        position_size=4,
        latent_shape=(4, 4, 2),
        context_shape=(3, 8),
        pooled_projection_shape=(6,),
    )
    return classifier(model)


def _diffusion_autoencoder():
    from keras_hub.src.models.vae.vae_backbone import VAEBackbone

    blocks = {"encoder_num_blocks": [1, 1], "decoder_num_blocks": [1, 1]}
    filters = {"encoder_num_filters": [32, 32], "decoder_num_filters": [32, 32]}
    model = VAEBackbone(**blocks, **filters, sampler_method="mode", sample_channels=8)
    images = keras.Input((8, 8, 3), name="images")
    return classifier(keras.Model(images, model(images), name="vae"))


BACKBONES = {
    "GPT2": _hub("GPT2", **HEADS, dropout=0.0),
    "BERT": _hub("Bert", **HEADS),
    "ALBERT": _hub("Albert", **HEADS, embedding_dim=4),
    "DeBERTaV3": _hub("DebertaV3", **HEADS, bucket_size=8),
    "RoBERTa": _hub("Roberta", **HEADS),
    "XLM-RoBERTa": _hub("XLMRoberta", **HEADS),
    "DistilBERT": _hub("DistilBert", **HEADS),
    "BART": _hub("Bart", **HEADS),
    "T5": _hub("T5", **HEADS),
    "Bloom": _hub("Bloom", **HEADS),
    "OPT": _hub("OPT", **HEADS),
    "GPT-NeoX": _hub("GPTNeoX", **HEADS, rotary_percentage=0.5),
    "Llama": _hub("Llama", **GROUPED),
    "Llama3": _hub("Llama3", **GROUPED),
    "Mistral": _hub("Mistral", **GROUPED, sliding_window=3),
    "Mixtral": _hub("Mixtral", **GROUPED, num_experts=3, top_k=2),
    "Gemma": _hub("Gemma", **GEMMA),
    "Gemma2": _hub(
        "Gemma",
        **GEMMA,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=50.0,
        use_sliding_window_attention=True,
        sliding_window_size=3,
    ),
    "Gemma3": _hub("Gemma3", **GEMMA, image_size=16, use_sliding_window_attention=True, sliding_window_size=3),
    "Phi3": _hub("Phi3", **GROUPED),
    "Qwen": _hub("Qwen", **GROUPED),
    "Qwen3": _hub("Qwen3", **GROUPED, head_dim=4),
    "Qwen-MoE": _hub(
        "QwenMoe", **GROUPED, moe_intermediate_dim=6, shared_expert_intermediate_dim=6, num_experts=3, top_k=2
    ),
    "GPT-OSS": _hub("GptOss", **GROUPED, num_experts=3, top_k=2, sliding_window=3),
    "RWKV7": _hub(
        "RWKV7",
        hidden_size=8,
        head_size=4,
        num_layers=2,
        vocabulary_size=TOKENS,
        intermediate_dim=12,
        gate_lora=4,
        mv_lora=4,
        aaa_lora=4,
        decay_lora=4,
    ),
    "XLNet": _hub("XLNet", **HEADS),
    "FNet": _hub("FNet", **TEXT),
    "Whisper": _whisper,
    "ViT": _hub("ViT", **VIT, mlp_dim=12),
    "DeiT": _hub("DeiT", **VIT, intermediate_dim=12),
    "DINOv2": _hub("DINOV2", **VIT, intermediate_dim=12, position_embedding_shape=(16, 16, 3)),
    "Swin": _hub(
        "SwinTransformer", image_shape=(16, 16, 3), embed_dim=4, depths=[1, 1], num_heads=[1, 2], window_size=2
    ),
    "ResNet": _resnet("basic_block", False),
    "ResNetV2": _resnet("bottleneck_block", True),
    "VGG": _hub("VGG", image_shape=(16, 16, 3), stackwise_num_repeats=[1, 1], stackwise_num_filters=[4, 8]),
    "DenseNet": _hub("DenseNet", image_shape=(32, 32, 3), stackwise_num_repeats=[1, 1], growth_rate=4),
    "MiT": lambda: classifier(_mit()),
    "SegFormer": _segformer,
    "MMDiT (Stable Diffusion 3)": _diffusion_transformer,
    "VAE (Stable Diffusion 3)": _diffusion_autoencoder,
}
