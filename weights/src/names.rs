//! What a key of a published file means: every variant of the names, by fixed rules.
//!
//! Three dialects are known. Canonical names are those of the FLOWER authors' code; what Microsoft
//! published for Florence-2 is the same without `vlm.`; `transformers` has names of its own.

/// What stands behind a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// A parameter by its canonical name.
    Parameter {
        name: String,
        /// The file holds `[out, in]` where the canonical tensor is `[in, out]`.
        transposed: bool,
    },
    /// A table of rotary positions of a block of the flow transformer.
    RopeTable { cosines: bool },
    /// The table of frame positions, a constant.
    TemporalTable,
    /// Known, and not part of the model; the text says why.
    Unused(&'static str),
}

/// A key, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) meaning: Meaning,
    /// The key belongs to an exponential moving average.
    pub(crate) averaged: bool,
    /// Named as `transformers` names it.
    pub(crate) native: bool,
}

/// Prefixes of wrappers, removed as long as there are any.
const WRAPPERS: [&str; 3] = ["state_dict.", "module.", "_orig_mod."];
/// Prefixes of averaged weights.
const AVERAGES: [&str; 3] = ["ema.", "ema_model.", "model_ema."];
/// First parts of canonical names.
const CANONICAL: [&str; 11] = [
    "vlm.",
    "dit.",
    "t_embedder.",
    "frequency_embedder.",
    "action_space_embedder.",
    "cond_norm.",
    "cond_linear.",
    "adaln.",
    "action_encoders.",
    "action_decoders.",
    "proprio_encoders.",
];

/// Reads a key of a published file.
pub(crate) fn read(key: &str) -> Key {
    let mut averaged = false;
    // Wrappers may stand inside, around a part of the model.
    let mut name = key.replace("agent.", "").replace("_orig_mod.", "");
    loop {
        let rest = WRAPPERS
            .iter()
            .find_map(|wrapper| name.strip_prefix(wrapper));
        if let Some(rest) = rest {
            name = rest.into();
        } else if let Some(rest) = AVERAGES.iter().find_map(|prefix| name.strip_prefix(prefix)) {
            averaged = true;
            name = rest.into();
        } else {
            break;
        }
    }
    if let Some(rest) = name.strip_prefix("model.") {
        name = rest.into();
    }
    let native = is_native(&name);
    let meaning = if name == pollen_model::PROMPT {
        parameter(name)
    } else if CANONICAL.iter().any(|part| name.starts_with(part)) {
        flower(&name)
    } else if native {
        transformers(&name)
    } else {
        flower(&format!("vlm.{name}"))
    };
    Key {
        meaning,
        averaged,
        native,
    }
}

fn parameter(name: String) -> Meaning {
    Meaning::Parameter {
        name,
        transposed: false,
    }
}

/// Says whether only `transformers` names a tensor so.
fn is_native(name: &str) -> bool {
    let vision = name.strip_prefix("vision_tower.");
    name.starts_with("multi_modal_projector.")
        || name.starts_with("lm_head.")
        || [
            "language_model.encoder.",
            "language_model.decoder.",
            "language_model.shared.",
        ]
        .iter()
        .any(|part| name.starts_with(part))
        || vision.is_some_and(|rest| {
            let mut parts = rest.split('.');
            match parts.next() {
                // Norms of the convolutions have the same names in all dialects.
                Some("convs") => parts.nth(1) == Some("conv"),
                Some("blocks") => match (parts.nth(3), parts.next()) {
                    (Some("conv1" | "conv2"), Some(next)) => next != "fn",
                    (Some("norm1" | "norm2"), _) => true,
                    (Some("window_attn" | "channel_attn"), Some(next)) => {
                        next == "qkv" || next == "proj"
                    }
                    (Some("ffn"), Some(next)) => next == "fc1" || next == "fc2",
                    _ => false,
                },
                _ => false,
            }
        })
}

/// Reads a canonical name or an older form of one.
fn flower(name: &str) -> Meaning {
    const LANGUAGE: &str = "vlm.language_model.model.";
    let mut name = name.to_owned();
    // Some published files had every `model.` removed from their names.
    for (from, to) in [
        ("vlm.language_encoder.", "encoder."),
        ("vlm.language_shared.", "shared."),
        ("vlm.language_decoder.", "decoder."),
    ] {
        if let Some(rest) = name.strip_prefix(from) {
            name = format!("{LANGUAGE}{to}{rest}");
        }
    }
    for (from, to) in [
        (".mlp.c_fc1.", ".mlp.fc1."),
        (".mlp.c_fc2.", ".mlp.fc2."),
        (".mlp.c_proj.", ".mlp.proj."),
    ] {
        name = name.replacen(from, to, 1);
    }
    if name.starts_with("dit.") {
        for (end, cosines) in [(".self_attn.cos", true), (".self_attn.sin", false)] {
            if name.ends_with(end) {
                return Meaning::RopeTable { cosines };
            }
        }
    }
    if let Some(rest) = name.strip_prefix(LANGUAGE) {
        if rest == "encoder.embed_tokens.weight" {
            return parameter(pollen_model::TOKEN_TABLE.into());
        }
        if rest == "decoder.embed_tokens.weight" {
            return Meaning::Unused(DECODER_TABLE);
        }
    }
    match name.as_str() {
        "vlm.visual_temporal_embed.pos_idx_to_embed" => Meaning::TemporalTable,
        "vlm.language_model.final_logits_bias" | "vlm.language_final_logits_bias" => {
            Meaning::Unused(LOGITS)
        }
        "vlm.language_model.lm_head.weight" | "vlm.language_lm_head.weight" => {
            Meaning::Unused(LM_HEAD)
        }
        other if other.starts_with("vlm.vision_tower.norms.") => Meaning::Unused(CLASSIFIER),
        other if other.starts_with("vlm.vision_tower.head.") => Meaning::Unused(CLASSIFIER),
        _ => parameter(name),
    }
}

const DECODER_TABLE: &str = "the decoder's copy of the token table";
const LM_HEAD: &str = "the language-model head is no part of FLOWER";
const LOGITS: &str = "a bias of the language-model head, which is no part of FLOWER";
const CLASSIFIER: &str = "a part of the image classifier, which Florence-2 does not use";

/// Says why a parameter of a published vision-language model has no place in the recipe's model, if
/// its fusion drops it.
pub(crate) fn dropped(name: &str, decoder_only: bool) -> Option<&'static str> {
    let layer = name.starts_with("vlm.text_model.layers.") || name == "vlm.text_model.norm.weight";
    if decoder_only && layer {
        Some("a language layer that model.fusion drops")
    } else if !decoder_only && name.starts_with("vlm.language_model.model.decoder.") {
        Some("a part of the text decoder, which model.fusion drops")
    } else {
        None
    }
}

/// Reads a name of `transformers`, without its leading `model.`.
fn transformers(name: &str) -> Meaning {
    if name.starts_with("lm_head.") {
        return Meaning::Unused(LM_HEAD);
    }
    if let Some(rest) = name.strip_prefix("language_model.") {
        return flower(&format!("vlm.language_model.model.{rest}"));
    }
    if let Some(rest) = name.strip_prefix("multi_modal_projector.") {
        if rest == "image_projection.weight" {
            return Meaning::Parameter {
                name: "vlm.image_projection".into(),
                transposed: true,
            };
        }
        let rest = rest.replacen("image_position_embed.", "image_pos_embed.", 1);
        return flower(&format!("vlm.{rest}"));
    }
    let mut name = format!("vlm.{name}");
    if name.contains(".convs.") {
        name = name.replacen(".conv.", ".proj.", 1);
    } else {
        let attention = if name.contains(".spatial_block.") {
            "window_attn"
        } else {
            "channel_attn"
        };
        for (from, to) in [
            (".conv1.", ".conv1.fn.dw."),
            (".conv2.", ".conv2.fn.dw."),
            (".norm1.", &*format!(".{attention}.norm.")),
            (".norm2.", ".ffn.norm."),
            ("_attn.qkv.", "_attn.fn.qkv."),
            ("_attn.proj.", "_attn.fn.proj."),
            (".ffn.fc", ".ffn.fn.net.fc"),
        ] {
            name = name.replacen(from, to, 1);
        }
    }
    flower(&name)
}

/// Returns the name that `transformers` gives to a parameter of the encoder, and whether it holds
/// the transpose; none for parameters that it does not know.
pub(crate) fn to_transformers(name: &str) -> Option<(String, bool)> {
    let rest = name.strip_prefix("vlm.")?;
    if rest == "image_projection" {
        let name = "model.multi_modal_projector.image_projection.weight";
        return Some((name.into(), true));
    }
    if rest.starts_with("image_proj_norm.") || rest.starts_with("visual_temporal_embed.") {
        return Some((format!("model.multi_modal_projector.{rest}"), false));
    }
    if let Some(rest) = rest.strip_prefix("image_pos_embed.") {
        let name = format!("model.multi_modal_projector.image_position_embed.{rest}");
        return Some((name, false));
    }
    if let Some(rest) = rest.strip_prefix("language_model.model.") {
        return Some((format!("model.language_model.{rest}"), false));
    }
    let mut name = format!("model.{rest}");
    if name.contains(".convs.") {
        name = name.replacen(".proj.", ".conv.", 1);
    } else {
        for (from, to) in [
            (".conv1.fn.dw.", ".conv1."),
            (".conv2.fn.dw.", ".conv2."),
            (".window_attn.norm.", ".norm1."),
            (".channel_attn.norm.", ".norm1."),
            (".ffn.norm.", ".norm2."),
            ("_attn.fn.", "_attn."),
            (".ffn.fn.net.", ".ffn."),
        ] {
            name = name.replacen(from, to, 1);
        }
    }
    Some((name, false))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(key: &str) -> String {
        match read(key).meaning {
            Meaning::Parameter { name, .. } => name,
            other => panic!("{key} is {other:?}"),
        }
    }

    #[test]
    fn wrappers_of_all_kinds_are_removed() {
        let name = "dit.3.mlp.fc1.weight";
        for key in [
            "dit.3.mlp.fc1.weight",
            "agent.dit.3.mlp.c_fc1.weight",
            "module.dit.3.mlp.fc1.weight",
            "module.agent.dit.3.mlp.fc1.weight",
            "agent.module.dit.3.mlp.c_fc1.weight",
            "state_dict.agent.dit.3.mlp.fc1.weight",
            "_orig_mod.dit.3.mlp.fc1.weight",
            "module._orig_mod.dit.3._orig_mod.mlp.fc1.weight",
            "model.dit.3.mlp.fc1.weight",
        ] {
            assert_eq!(canonical(key), name, "{key}");
            assert!(!read(key).averaged, "{key}");
        }
        for key in [
            "ema.dit.3.mlp.fc1.weight",
            "ema_model.module.dit.3.mlp.fc1.weight",
        ] {
            assert_eq!(canonical(key), name, "{key}");
            assert!(read(key).averaged, "{key}");
        }
        assert_eq!(
            canonical("agent.dit.0.mlp.c_proj.weight"),
            "dit.0.mlp.proj.weight"
        );
    }

    #[test]
    fn names_without_model_are_restored() {
        for (key, name) in [
            (
                "agent.vlm.language_encoder.layers.0.fc1.weight",
                "vlm.language_model.model.encoder.layers.0.fc1.weight",
            ),
            (
                "vlm.language_encoder.embed_tokens.weight",
                pollen_model::TOKEN_TABLE,
            ),
            ("vlm.language_shared.weight", pollen_model::TOKEN_TABLE),
        ] {
            assert_eq!(canonical(key), name);
        }
        let bias = read("agent.vlm.language_final_logits_bias").meaning;
        assert_eq!(bias, Meaning::Unused(LOGITS));
    }

    #[test]
    fn florence_in_both_dialects_means_the_same() {
        for (native, microsoft) in [
            (
                "model.vision_tower.convs.1.conv.weight",
                "vision_tower.convs.1.proj.weight",
            ),
            (
                "model.vision_tower.convs.1.norm.bias",
                "vision_tower.convs.1.norm.bias",
            ),
            (
                "model.vision_tower.blocks.2.8.spatial_block.norm1.weight",
                "vision_tower.blocks.2.8.spatial_block.window_attn.norm.weight",
            ),
            (
                "model.vision_tower.blocks.2.8.channel_block.channel_attn.qkv.bias",
                "vision_tower.blocks.2.8.channel_block.channel_attn.fn.qkv.bias",
            ),
            (
                "model.vision_tower.blocks.2.8.channel_block.ffn.fc2.bias",
                "vision_tower.blocks.2.8.channel_block.ffn.fn.net.fc2.bias",
            ),
            (
                "model.multi_modal_projector.image_position_embed.row_embeddings.weight",
                "image_pos_embed.row_embeddings.weight",
            ),
            (
                "model.language_model.encoder.layers.11.self_attn.q_proj.weight",
                "language_model.model.encoder.layers.11.self_attn.q_proj.weight",
            ),
            (
                "model.language_model.shared.weight",
                "language_model.model.shared.weight",
            ),
        ] {
            let name = canonical(microsoft);
            assert_eq!(name, canonical(native));
            assert_eq!(name, canonical(&format!("vlm.{microsoft}")));
            assert!(!read(microsoft).native);
            if !microsoft.ends_with("norm.bias") {
                assert!(read(native).native, "{native}");
            }
            assert_eq!(to_transformers(&name), Some((native.into(), false)));
        }
        let projection = Meaning::Parameter {
            name: "vlm.image_projection".into(),
            transposed: true,
        };
        let native = "model.multi_modal_projector.image_projection.weight";
        assert_eq!(read(native).meaning, projection);
        assert_eq!(canonical("image_projection"), "vlm.image_projection");
    }

    #[test]
    fn what_flower_leaves_out_is_known() {
        for key in [
            "model.language_model.decoder.embed_tokens.weight",
            "language_model.lm_head.weight",
            "lm_head.weight",
            "language_model.final_logits_bias",
            "vision_tower.norms.weight",
            "vision_tower.head.bias",
        ] {
            assert!(matches!(read(key).meaning, Meaning::Unused(_)), "{key}");
        }
        let table = read("dit.7.self_attn.cos").meaning;
        assert_eq!(table, Meaning::RopeTable { cosines: true });
    }
}
