//! From the path of a parameter inside the modules to its name in published checkpoints.

/// Replacements, applied in this order to a module path.
const RULES: [(&str, &str); 26] = [
    ("encoder.vision_tower.Davit.", "vlm.vision_tower."),
    (
        "encoder.vision_tower.Siglip.layers.",
        "vlm.vision_model.encoder.layers.",
    ),
    ("encoder.vision_tower.Siglip.", "vlm.vision_model."),
    (
        "encoder.projection.Connector.proj.",
        "vlm.connector.modality_projection.proj.",
    ),
    ("encoder.projection.Florence.", "encoder.projection."),
    ("encoder.language_model.Llama.", "vlm.text_model."),
    ("encoder.language_model.Bart.", "encoder.language_model."),
    (".conv1.", ".conv1.fn.dw."),
    (".conv2.", ".conv2.fn.dw."),
    (".window_attn.qkv.", ".window_attn.fn.qkv."),
    (".window_attn.proj.", ".window_attn.fn.proj."),
    (".channel_attn.qkv.", ".channel_attn.fn.qkv."),
    (".channel_attn.proj.", ".channel_attn.fn.proj."),
    (".ffn.net.", ".ffn.fn.net."),
    ("encoder.projection.linear", "vlm.image_projection"),
    ("encoder.projection.norm.", "vlm.image_proj_norm."),
    (
        "encoder.projection.positions.rows.",
        "vlm.image_pos_embed.row_embeddings.",
    ),
    (
        "encoder.projection.positions.columns.",
        "vlm.image_pos_embed.column_embeddings.",
    ),
    ("encoder.language_model.", "vlm.language_model.model."),
    // The feed-forward layers of the text encoder lie directly in the layer.
    (".ffn.fc", ".fc"),
    ("encoder.prompt_embeds", "prompt_embeds"),
    ("head.", ""),
    ("_embedder.first.", "_embedder.mlp.0."),
    ("_embedder.second.", "_embedder.mlp.2."),
    (".modulation.down.", ".adaLN_modulation.1."),
    (".modulation.up.", ".adaLN_modulation.2."),
];

/// Modules that exist once per action space: an index in the path, a name in the checkpoint.
const PER_SPACE: [&str; 4] = [
    "adaln",
    "action_encoders",
    "action_decoders",
    "proprio_encoders",
];

/// Returns the canonical name of the parameter at `path`; `spaces` are the names of the model's
/// action spaces in order.
pub(crate) fn canonical(path: &str, spaces: &[&str]) -> String {
    let mut name = path.to_owned();
    for (from, to) in RULES {
        name = name.replacen(from, to, 1);
    }
    let mut parts = name.splitn(3, '.');
    if let (Some(module), Some(index), Some(rest)) = (parts.next(), parts.next(), parts.next())
        && PER_SPACE.contains(&module)
    {
        let index: usize = index
            .parse()
            .expect("these modules are vectors, whose paths hold an index");
        let layer = if module == "adaln" { "modCX.1." } else { "" };
        return format!("{module}.{}.{layer}{rest}", spaces[index]);
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_published_names() {
        for (path, name) in [
            (
                "encoder.vision_tower.Davit.blocks.2.0.spatial_block.ffn.net.fc1.weight",
                "vlm.vision_tower.blocks.2.0.spatial_block.ffn.fn.net.fc1.weight",
            ),
            (
                "encoder.language_model.Bart.encoder.layers.3.ffn.fc2.bias",
                "vlm.language_model.model.encoder.layers.3.fc2.bias",
            ),
            (
                "encoder.vision_tower.Siglip.layers.0.layer_norm1.weight",
                "vlm.vision_model.encoder.layers.0.layer_norm1.weight",
            ),
            (
                "encoder.language_model.Llama.layers.2.mlp.up_proj.weight",
                "vlm.text_model.layers.2.mlp.up_proj.weight",
            ),
            ("head.adaln.1.weight", "adaln.b.modCX.1.weight"),
            ("head.dit.4.mlp.fc1.weight", "dit.4.mlp.fc1.weight"),
            ("encoder.prompt_embeds", "prompt_embeds"),
        ] {
            assert_eq!(canonical(path, &["a", "b"]), name);
        }
    }
}
