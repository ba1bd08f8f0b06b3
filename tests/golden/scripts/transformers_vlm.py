#!/usr/bin/env python3
"""Makes ../smolvlm.safetensors and ../bart_decoder.safetensors with transformers on random weights.

    pip install torch==2.15.0 transformers==5.24.0 safetensors
    python tests/golden/scripts/transformers_vlm.py

smolvlm: the vision tower, connector and LLaMA decoder of SmolVLMModel over a joined sequence of a prompt
vector, the tokens of two images and text. bart_decoder: the decoder of BartModel, which reads the text
tokens and attends to an encoded sequence. Weights are named as in a Pollen checkpoint.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BartConfig, BartModel, SmolVLMConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMModel

FOLDER = Path(__file__).resolve().parent.parent
TOLERANCE = {"rel_l2": 1e-5}


def randomise(model):
    """Draws every weight, so that none of the first values hides a mistake."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.2)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1.0


def save(name, config, weights, inputs, outputs):
    tensors = {f"weight.{key}": value for key, value in weights.items()}
    tensors |= {f"input.{key}": value for key, value in inputs.items()}
    tensors |= {f"output.{key}": value for key, value in outputs.items()}
    tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    metadata = {"config": json.dumps(config), "tolerance": json.dumps(TOLERANCE)}
    save_file(tensors, FOLDER / f"{name}.safetensors", metadata)


def smolvlm():
    config = {
        "px": 24, "patch": 4, "vision_width": 16, "vision_layers": 2, "vision_heads": 2, "vision_ffn": 24,
        "pixel_shuffle": 2, "vision_eps": 1e-6, "d": 24, "layers": 5, "heads": 4, "kv_heads": 2, "head_dim": 6,
        "ffn": 32, "vocab": 30, "theta": 100.0, "eps": 1e-5, "kept": 4,
    }
    hf = SmolVLMConfig(
        vision_config={
            "hidden_size": config["vision_width"], "intermediate_size": config["vision_ffn"],
            "num_hidden_layers": config["vision_layers"], "num_attention_heads": config["vision_heads"],
            "image_size": config["px"], "patch_size": config["patch"], "layer_norm_eps": config["vision_eps"],
            "hidden_act": "gelu_pytorch_tanh",
        },
        text_config={
            "model_type": "llama", "hidden_size": config["d"], "num_hidden_layers": config["layers"],
            "num_attention_heads": config["heads"], "num_key_value_heads": config["kv_heads"],
            "head_dim": config["head_dim"], "intermediate_size": config["ffn"], "vocab_size": config["vocab"],
            "rms_norm_eps": config["eps"], "pad_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": config["theta"]},
        },
        scale_factor=config["pixel_shuffle"],
    )
    hf._attn_implementation = "eager"
    model = SmolVLMModel(hf).eval()
    randomise(model)
    images = torch.randn(2, 2, 3, config["px"], config["px"])
    ids = torch.tensor([[5, 9, 11, 3, 2], [7, 12, 2, 2, 2]])
    text_mask = torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    present = torch.tensor([[1.0, 1], [1, 0]])
    prompt = torch.randn(1, 1, config["d"])

    flat = images.flatten(0, 1)
    features = model.vision_model(pixel_values=flat).last_hidden_state
    tokens = model.connector(features)
    # The model itself does the same with the images of a conversation.
    merged = model.get_image_features(images).pooler_output
    assert torch.equal(torch.cat([m.flatten(0, -2) for m in merged]), tokens.flatten(0, 1))

    length = tokens.shape[1]
    tokens = tokens.reshape(2, 2 * length, -1)
    joined = torch.cat([prompt.expand(2, 1, -1), tokens, model.get_input_embeddings()(ids)], 1)
    content = torch.cat([torch.zeros(2, 1), present.repeat_interleave(length, 1), text_mask], 1)
    # A token sees the earlier ones that hold something, and itself.
    s = joined.shape[1]
    causal = torch.ones(s, s).tril().bool()
    seen = (causal & content.bool()[:, None, :]) | torch.eye(s).bool()
    bias = torch.zeros(2, 1, s, s).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)

    states = {}
    for i, layer in enumerate(model.text_model.layers):
        layer.register_forward_hook(lambda _m, _i, out, i=i: states.__setitem__(i, out if torch.is_tensor(out) else out[0]))
    last = model.text_model(inputs_embeds=joined, attention_mask=bias).last_hidden_state
    weights = {f"vlm.{key}": value for key, value in model.state_dict().items()}
    weights["prompt_embeds"] = prompt
    save(
        "smolvlm", config, weights,
        {"images": images, "ids": ids, "text_mask": text_mask, "camera_present": present},
        {
            "vision_features": features, "image_tokens": tokens, "joined": joined,
            "after_layer0": states[0], "intermediate": states[config["kept"] - 1], "late": last,
        },
    )


def bart_decoder():
    config = {"d": 20, "layers": 2, "heads": 4, "ffn": 28, "maxpos": 24}
    hf = BartConfig(
        d_model=config["d"], vocab_size=30, max_position_embeddings=config["maxpos"], activation_function="gelu",
        encoder_layers=1, decoder_layers=config["layers"], encoder_attention_heads=config["heads"],
        decoder_attention_heads=config["heads"], encoder_ffn_dim=config["ffn"], decoder_ffn_dim=config["ffn"],
        scale_embedding=False,
    )
    hf._attn_implementation = "eager"
    decoder = BartModel(hf).eval().decoder
    randomise(decoder)
    words = torch.randn(3, 6, config["d"])
    memory = torch.randn(3, 9, config["d"])
    memory_mask = torch.ones(3, 9)
    memory_mask[1, 5:] = 0
    memory_mask[2, 0] = 0

    first = {}
    decoder.layernorm_embedding.register_forward_hook(lambda _m, _i, out: first.setdefault("embedded", out))
    run = lambda mask: decoder(inputs_embeds=words, encoder_hidden_states=memory, encoder_attention_mask=mask).last_hidden_state
    outputs = {"decoded_with_mask": run(memory_mask.long()), "decoded": run(None)}
    prefix = "vlm.language_model.model.decoder."
    weights = {prefix + k: v for k, v in decoder.state_dict().items() if not k.startswith("embed_tokens")}
    save(
        "bart_decoder", config, weights,
        {"words": words, "memory": memory, "memory_mask": memory_mask},
        {"after_embedding_norm": first["embedded"], **outputs},
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        smolvlm()
        bart_decoder()
