//! What is exported comes back to the bit.

use pollen_model::{FlowerConfig, PROMPT, TOKEN_TABLE};
use safetensors::Dtype;

use super::{Lab, Tensors, bits, canonical, config, file, options, spaces};
use crate::{ExportOptions, FitOptions, Initial, What, Written, export};

/// Canonical weights with a prompt vector that is no mean.
fn weights(config: &FlowerConfig) -> Tensors {
    let mut tensors = canonical(config);
    let prompt: Vec<f32> = (0..config.language.width).map(|i| 0.1 * i as f32).collect();
    let shape = vec![1, 1, prompt.len()];
    tensors.insert(PROMPT.into(), (Dtype::F32, shape, prompt));
    tensors
}

/// Exports `weights` to `source`, from where imports read.
fn exported(lab: &Lab, config: &FlowerConfig, what: What, bf16: bool) -> Written {
    lab.write("weights/model.safetensors", &file(&weights(config)));
    let table = config.parameter_table(&spaces()).expect("valid");
    let files = lab.open("weights").expect("opens");
    let initial = Initial::new(files, &table, config, &[]).expect("fits");
    let options = ExportOptions {
        what,
        bf16,
        shard_bytes: 20_000,
    };
    let destination = lab.storage("source");
    lab.wait(export(&initial, config, &table, &options, &destination))
        .expect("is written")
}

#[test]
fn the_whole_model_comes_back_to_the_bit_without_being_told_anything() {
    let config = config();
    let lab = Lab::new();
    let written = exported(&lab, &config, What::Flower, false);
    assert!(written.shards > 1, "{written:?}");
    let fitted = lab.fit(&config, &FitOptions::default());
    assert_eq!(fitted.faults, [] as [String; 0]);
    assert_eq!(
        fitted.choices.map(|choices| choices.rope_theta),
        Some(1000.0)
    );
    lab.import(&config, &FitOptions::default()).expect("fits");
    assert_eq!(lab.imported("destination"), bits(&weights(&config)));
    let mut other = config.clone();
    other.flow.norm = pollen_model::NormVariant::Variance;
    let faults = lab.fit(&other, &FitOptions::default()).faults.join("; ");
    assert!(faults.contains("set model.flow.norm = \"rms\""), "{faults}");
}

#[test]
fn the_encoder_comes_back_to_the_bit() {
    let config = config();
    let lab = Lab::new();
    exported(&lab, &config, What::Vlm, false);
    assert!(lab.exists("source/config.json"));
    lab.import(&config, &options(&["head"])).expect("fits");
    let mut expected = bits(&weights(&config));
    expected.retain(|name, _| name.starts_with("vlm.") || name == PROMPT);
    assert_eq!(lab.imported("destination"), expected);
}

#[test]
fn bf16_comes_back_rounded_and_tables_stay_exact() {
    let config = config();
    let lab = Lab::new();
    exported(&lab, &config, What::Flower, true);
    lab.import(&config, &FitOptions::default()).expect("fits");
    let imported = lab.imported("destination");
    for (name, (_, _, values)) in weights(&config) {
        let rounded: Vec<u32> = values
            .iter()
            .map(|&value| half::bf16::from_f32(value).to_f32().to_bits())
            .collect();
        assert_eq!(imported[&name], rounded, "{name}");
    }
    let files = lab.open("source").expect("opens");
    assert_eq!(files.tensors()["dit.0.self_attn.cos"].dtype, Dtype::F32);
    assert_eq!(files.tensors()[TOKEN_TABLE].dtype, Dtype::BF16);
}
