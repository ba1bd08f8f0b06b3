//! Whole vision-language models import into recipes that keep all of their layers, or some.

use std::collections::BTreeMap;

use pollen_model::{DecoderConfig, FlowerConfig, Fusion, PROMPT, SiglipConfig, TOKEN_TABLE};
use safetensors::Dtype;

use super::{Lab, Tensors, bits, canonical, config, file, options};
use crate::Outcome;
use crate::names::{self, Meaning};

/// SmolVLM2 in miniature: four layers of which intermediate fusion keeps three.
fn decoder_only(fusion: Fusion) -> FlowerConfig {
    let mut config = config();
    config.fusion = fusion;
    config.vision.dims = vec![8];
    config.vision.heads = vec![2];
    config.vision.depths = vec![2];
    config.vision.groups = Vec::new();
    config.vision.window = 0;
    config.vision.stochastic_depth = 0.0;
    config.vision.siglip = Some(SiglipConfig {
        patch: 4,
        ffn: 12,
        pixel_shuffle: 2,
        norm_eps: 1e-6,
    });
    config.language.layers = 4;
    config.language.dropout = 0.0;
    config.language.decoder = Some(DecoderConfig {
        kv_heads: 1,
        head_dim: 6,
        rope_theta: 100.0,
        norm_eps: 1e-5,
        dropped_share: 0.3,
    });
    config
}

/// The vision-language model of `config` as `transformers` writes it, with its output layer.
fn native(config: &FlowerConfig) -> Tensors {
    let parameters = canonical(config).into_iter();
    let mut tensors: Tensors = parameters
        .filter_map(|(name, tensor)| {
            let rest = name.strip_prefix("vlm.")?;
            let native = match rest.strip_prefix("language_model.model.decoder.") {
                Some(rest) => format!("model.language_model.decoder.{rest}"),
                None => format!("model.{rest}"),
            };
            Some((native, tensor))
        })
        .collect();
    let logits = (Dtype::F32, vec![2, 2], vec![1.0; 4]);
    tensors.insert("lm_head.weight".into(), logits);
    tensors
}

/// The weights that a recipe takes of a published model; the prompt vector apart.
fn expected(config: &FlowerConfig) -> BTreeMap<String, Vec<u32>> {
    let mut expected = bits(&canonical(config));
    expected.retain(|name, _| name.starts_with("vlm."));
    expected
}

#[test]
fn a_decoder_only_model_imports_with_the_layers_that_the_fusion_keeps() {
    let source = native(&decoder_only(Fusion::Late));
    assert!(source.contains_key("model.text_model.layers.3.mlp.up_proj.weight"));
    for (fusion, dropped) in [
        (Fusion::Late, 0),
        // Nine tensors a layer, and the last norm.
        (Fusion::Intermediate, 10),
        (Fusion::Early, 4 * 9 + 1),
    ] {
        let config = decoder_only(fusion);
        let lab = Lab::with(&file(&source));
        let fitted = lab.fit(&config, &options(&["head"]));
        assert_eq!(fitted.faults, [] as [String; 0], "{}", fitted.report);
        // The output layer is never used.
        assert_eq!(fitted.report.count(Outcome::Unused), dropped + 1);
        lab.import(&config, &options(&["head"])).expect("fits");
        let mut imported = lab.imported("destination");
        let prompt = imported.remove(PROMPT).expect("made from the token table");
        assert_eq!(prompt.len(), config.language.width);
        assert_eq!(imported, expected(&config));
    }
}

#[test]
fn a_decoder_only_model_misses_nothing_in_silence() {
    let mut source = native(&decoder_only(Fusion::Late));
    source.remove("model.connector.modality_projection.proj.weight");
    let lab = Lab::with(&file(&source));
    let config = decoder_only(Fusion::Intermediate);
    let faults = lab.fit(&config, &options(&["head"])).faults.join("; ");
    assert!(
        faults.contains("`vlm.connector.modality_projection.proj.weight` missing"),
        "{faults}"
    );
}

#[test]
fn the_decoder_of_florence_is_read_where_late_fusion_needs_it() {
    let mut late = config();
    late.fusion = Fusion::Late;
    let mut source = native(&late);
    // The decoder's own copy of the token table.
    let table = source["model.language_model.model.shared.weight"].clone();
    source.insert(
        "model.language_model.decoder.embed_tokens.weight".into(),
        table,
    );
    source.retain(|name, _| name.starts_with("model.language_model.decoder."));
    let encoder = canonical(&config()).into_iter();
    source.extend(encoder.filter(|(name, _)| name.starts_with("vlm.")));
    for config in [late, config()] {
        let lab = Lab::with(&file(&source));
        let fitted = lab.fit(&config, &options(&["head"]));
        assert_eq!(fitted.faults, [] as [String; 0], "{}", fitted.report);
        lab.import(&config, &options(&["head"])).expect("fits");
        let mut imported = lab.imported("destination");
        imported.remove(PROMPT).expect("made from the token table");
        let mut expected = expected(&config);
        // The row of the prompt token is not one of the words that transformers has.
        let (table, wanted) = (imported.remove(TOKEN_TABLE), expected.remove(TOKEN_TABLE));
        let words = (config.language.vocab_size - 1) * config.language.width;
        assert_eq!(
            table.map(|values| values[..words].to_vec()),
            wanted.map(|values| values[..words].to_vec())
        );
        assert_eq!(imported, expected);
    }
}

#[test]
fn published_names_of_smolvlm2_are_known() {
    for (native, name) in [
        (
            "model.vision_model.embeddings.patch_embedding.weight",
            "vlm.vision_model.embeddings.patch_embedding.weight",
        ),
        (
            "model.connector.modality_projection.proj.weight",
            "vlm.connector.modality_projection.proj.weight",
        ),
        (
            "model.text_model.embed_tokens.weight",
            "vlm.text_model.embed_tokens.weight",
        ),
    ] {
        let meaning = Meaning::Parameter {
            name: name.into(),
            transposed: false,
        };
        assert_eq!(names::read(native).meaning, meaning);
    }
}
