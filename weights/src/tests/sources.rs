//! Sources in every dialect become the same parameters.

use std::collections::BTreeMap;

use pollen_model::{CrossAttentionMask, NormVariant, PROMPT, TOKEN_TABLE};
use safetensors::Dtype;

use super::{
    Lab, Tensors, bits, canonical, config, file, mean_row, options, published, spaces, trained,
    with_buffers,
};
use crate::names::{self, Meaning, to_transformers};
use crate::{FitOptions, Initial, Outcome};

/// Renames all tensors.
fn renamed(tensors: Tensors, rename: impl Fn(&str) -> String) -> Tensors {
    let tensors = tensors.into_iter();
    tensors
        .map(|(name, tensor)| (rename(&name), tensor))
        .collect()
}

fn old_name(name: &str) -> String {
    let name = name
        .replace(".mlp.fc1.", ".mlp.c_fc1.")
        .replace(".mlp.fc2.", ".mlp.c_fc2.")
        .replace(".mlp.proj.", ".mlp.c_proj.");
    format!("agent.{}", name.replace("model.", ""))
}

#[test]
fn every_name_of_the_full_model_is_known_in_every_dialect() {
    let table = published("flower.toml").parameter_table(&spaces());
    let table = table.expect("valid");
    let mut num_native = 0;
    for spec in table.iter() {
        let parameter = |transposed| Meaning::Parameter {
            name: spec.name.clone(),
            transposed,
        };
        assert_eq!(names::read(&spec.name).meaning, parameter(false));
        assert_eq!(names::read(&old_name(&spec.name)).meaning, parameter(false));
        if let Some((native, transposed)) = to_transformers(&spec.name) {
            assert_eq!(names::read(&native).meaning, parameter(transposed));
            num_native += 1;
        }
    }
    assert_eq!(num_native, 601, "all of the encoder");
}

#[test]
fn flower_checkpoints_of_all_ages_import_to_the_same_bits() {
    let config = config();
    let parameters = canonical(&config);
    let mut expected = bits(&parameters);
    expected.insert(PROMPT.into(), mean_row(&parameters));
    let source = with_buffers(parameters, &config, 1000.0);
    let renames: [fn(&str) -> String; 4] = [
        str::to_owned,
        old_name,
        |name| format!("module.agent.{name}"),
        |name| format!("_orig_mod.{name}"),
    ];
    for rename in renames {
        let lab = Lab::with(&file(&renamed(source.clone(), rename)));
        let fitted = lab.fit(&config, &trained());
        assert_eq!(fitted.faults, [] as [String; 0], "{}", fitted.report);
        assert_eq!(fitted.report.lines().len(), source.len() + 1);
        lab.import(&config, &trained()).expect("fits");
        assert_eq!(lab.imported("destination"), expected);
    }
}

/// What Microsoft published: no head, one row less, a decoder.
fn florence(parameters: &Tensors) -> Tensors {
    let mut tensors = parameters.clone();
    tensors.retain(|name, _| name.starts_with("vlm."));
    let (_, shape, values) = tensors.get_mut(TOKEN_TABLE).expect("there");
    shape[0] -= 1;
    values.truncate(shape[0] * shape[1]);
    let mut tensors = renamed(tensors, |name| name["vlm.".len()..].to_owned());
    for extra in [
        "language_model.model.decoder.layers.0.fc1.weight",
        "language_model.lm_head.weight",
    ] {
        tensors.insert(extra.into(), (Dtype::F32, vec![2, 2], vec![1.0; 4]));
    }
    tensors
}

/// The same as `transformers` has it, with tokens of its own at the end of the table.
fn native(parameters: &Tensors) -> Tensors {
    let mut tensors = Tensors::new();
    for (name, (dtype, shape, values)) in parameters {
        let Some((name, transposed)) = to_transformers(name) else {
            continue;
        };
        let (mut shape, mut values) = (shape.clone(), values.clone());
        if transposed {
            let (rows, columns) = (shape[0], shape[1]);
            values = (0..columns)
                .flat_map(|c| (0..rows).map(move |r| r * columns + c))
                .map(|i| values[i])
                .collect();
            shape.reverse();
        }
        if name.ends_with("shared.weight") {
            let width = shape[1];
            values.extend((0..2 * width).map(|i| i as f32 + 100.0));
            shape[0] += 2;
        }
        tensors.insert(name, (*dtype, shape, values));
    }
    let logits = (Dtype::F32, vec![2, 2], vec![1.0; 4]);
    tensors.insert("lm_head.weight".into(), logits);
    tensors
}

#[test]
fn florence_in_both_dialects_imports_to_the_same_bits() {
    let config = config();
    let parameters = canonical(&config);
    let mut expected = bits(&parameters);
    expected.retain(|name, _| name.starts_with("vlm."));
    let mean = mean_row(&parameters);
    let table = expected.get_mut(TOKEN_TABLE).expect("there");
    table.truncate(table.len() - mean.len());
    table.extend(&mean);
    expected.insert(PROMPT.into(), mean);
    for source in [florence(&parameters), native(&parameters)] {
        let lab = Lab::with(&file(&source));
        let strict = lab.fit(&config, &FitOptions::default());
        assert!(strict.faults[0].contains("--allow-missing head"));
        lab.import(&config, &options(&["head"])).expect("fits");
        assert_eq!(lab.imported("destination"), expected);
        // What a run does with it.
        let table = config.parameter_table(&spaces()).expect("valid");
        let open = || lab.open("destination").expect("opens");
        let refused = Initial::new(open(), &table, &config, &[]).expect_err("no head");
        assert!(
            refused.to_string().contains("init.allow_missing"),
            "{refused}"
        );
        let initial = Initial::new(open(), &table, &config, &["head".into()]).expect("fits");
        assert_eq!(initial.len(), expected.len());
        let norm = lab.wait(initial.read("vlm.image_proj_norm.weight"));
        assert_eq!(norm.expect("is read").map(|values| values.len()), Some(16));
        let head = lab.wait(initial.read("cond_norm.weight"));
        assert_eq!(head.expect("may be missing"), None);
    }
}

#[test]
fn half_precision_is_widened() {
    let config = config();
    let mut parameters = canonical(&config);
    for (i, (dtype, _, values)) in parameters.values_mut().enumerate() {
        for value in values.iter_mut() {
            // Few bits, so that no type rounds.
            *value = (*value * 16.0).round() / 16.0;
        }
        *dtype = [Dtype::F32, Dtype::BF16, Dtype::F16][i % 3];
    }
    let expected = bits(&parameters);
    let lab = Lab::with(&file(&with_buffers(parameters, &config, 1000.0)));
    lab.import(&config, &trained()).expect("fits");
    let mut imported = lab.imported("destination");
    imported.remove(PROMPT);
    assert_eq!(imported, expected);
}

#[test]
fn what_weights_do_not_show_is_asked_for_and_compared() {
    let config = config();
    let source = with_buffers(canonical(&config), &config, 32.0);
    let lab = Lab::with(&file(&source));
    let faults = lab.fit(&config, &FitOptions::default()).faults.join("; ");
    for flag in ["--prompt-from", "--cross-attention-mask", "--norm"] {
        assert!(faults.contains(flag), "{faults}");
    }
    assert!(
        !faults.contains("--rope-theta"),
        "the tables show it: {faults}"
    );
    let mut told = trained();
    told.cross_attention_mask = Some(CrossAttentionMask::Additive);
    told.norm = Some(NormVariant::Variance);
    let faults = lab.fit(&config, &told).faults.join("; ");
    for fix in [
        "set model.flow.rope_theta = 32.0",
        "set model.cross_attention_mask = \"additive\"",
        "set model.flow.norm = \"variance\"",
    ] {
        assert!(faults.contains(fix), "{faults}");
    }
    let mut other = config.clone();
    other.flow.rope_theta = 32.0;
    assert_eq!(lab.fit(&other, &trained()).faults, [] as [String; 0]);
}

#[test]
fn rotary_tables_must_agree_and_be_known() {
    let config = config();
    let mut source = with_buffers(canonical(&config), &config, 1000.0);
    let wrong = with_buffers(
        Tensors::from([(TOKEN_TABLE.to_owned(), source[TOKEN_TABLE].clone())]),
        &config,
        32.0,
    );
    for name in ["dit.1.self_attn.cos", "dit.1.self_attn.sin"] {
        source.insert(name.into(), wrong[name].clone());
    }
    let lab = Lab::with(&file(&source));
    let faults = lab.fit(&config, &trained()).faults.join("; ");
    assert!(faults.contains("`dit.1.self_attn.cos`"), "{faults}");
    assert!(faults.contains("base 32"), "{faults}");
    let source = with_buffers(canonical(&config), &config, 77.0);
    let lab = Lab::with(&file(&source));
    let faults = lab.fit(&config, &trained()).faults.join("; ");
    assert!(faults.contains("none of the bases"), "{faults}");
    let mut bare = canonical(&config);
    bare.retain(|name, _| !name.contains("self_attn.cos"));
    let lab = Lab::with(&file(&bare));
    let faults = lab.fit(&config, &trained()).faults.join("; ");
    assert!(faults.contains("--rope-theta"), "{faults}");
}

#[test]
fn averaged_weights_are_taken_only_when_asked_for() {
    let config = config();
    let parameters = canonical(&config);
    let mut source = with_buffers(parameters.clone(), &config, 1000.0);
    for (name, (dtype, shape, values)) in &parameters {
        let values = values.iter().map(|value| value + 1.0).collect();
        source.insert(format!("ema.{name}"), (*dtype, shape.clone(), values));
    }
    let lab = Lab::with(&file(&source));
    let faults = lab.fit(&config, &trained()).faults.join("; ");
    assert!(faults.contains("--weights ema"), "{faults}");
    let averaged = FitOptions {
        averaged: Some(true),
        rope_theta: Some(1000.0),
        ..trained()
    };
    lab.import(&config, &averaged).expect("fits");
    let norm = "cond_norm.weight";
    let expected: Vec<u32> = parameters[norm]
        .2
        .iter()
        .map(|value| (value + 1.0).to_bits())
        .collect();
    assert_eq!(lab.imported("destination")[norm], expected);
}

#[test]
fn leftovers_and_gaps_need_permission_and_are_reported() {
    let config = config();
    let mut source = with_buffers(canonical(&config), &config, 1000.0);
    source.remove("cond_norm.weight");
    source.insert(
        "dit.9.norm1.weight".into(),
        (Dtype::F32, vec![24], vec![1.0; 24]),
    );
    let rows = "action_space_embedder.action_embeddings";
    source.insert(rows.into(), (Dtype::F32, vec![3, 256], vec![0.5; 768]));
    let lab = Lab::with(&file(&source));
    let strict = lab.fit(&config, &trained());
    assert_eq!(strict.faults.len(), 2, "{:?}", strict.faults);
    let allowed = FitOptions {
        allow_missing: vec!["cond_norm".into()],
        allow_unexpected: vec!["dit.9.".into()],
        ..trained()
    };
    let fitted = lab.fit(&config, &allowed);
    assert_eq!(fitted.faults, [] as [String; 0]);
    let outcome = |key: &str| {
        let mut lines = fitted.report.lines().iter();
        lines.find(|line| line.key == key).expect(key).outcome
    };
    assert_eq!(outcome("cond_norm.weight"), Outcome::Missing);
    assert_eq!(outcome("dit.9.norm1.weight"), Outcome::Unexpected);
    assert_eq!(outcome(rows), Outcome::Reshaped);
    assert_eq!(outcome("dit.0.self_attn.cos"), Outcome::Unused);
    assert_eq!(outcome("dit.0.norm1.weight"), Outcome::Loaded);
    lab.import(&config, &allowed).expect("allowed");
    assert_eq!(lab.imported("destination")[rows].len(), 2 * 256);
}

#[test]
fn shards_and_their_index_are_read() {
    let config = config();
    let parameters = canonical(&config);
    let source = with_buffers(parameters.clone(), &config, 1000.0);
    let (a, b): (Tensors, Tensors) = source
        .clone()
        .into_iter()
        .partition(|(name, _)| name.starts_with("vlm."));
    let mut map = BTreeMap::new();
    for (tensors, name) in [(&a, "model-a.safetensors"), (&b, "model-b.safetensors")] {
        map.extend(tensors.keys().map(|key| (key.clone(), name)));
    }
    let lab = Lab::new();
    lab.write("source/model-a.safetensors", &file(&a));
    lab.write("source/model-b.safetensors", &file(&b));
    let index = |map: &BTreeMap<String, &str>| serde_json::json!({ "weight_map": map }).to_string();
    let name = "source/model.safetensors.index.json";
    lab.write(name, index(&map).as_bytes());
    lab.import(&config, &trained()).expect("fits");
    let mut imported = lab.imported("destination");
    imported.remove(PROMPT);
    assert_eq!(imported, bits(&parameters));

    let first = "cond_norm.weight".to_owned();
    for (change, part) in [
        (Some("model-a.safetensors"), "is in model-b.safetensors"),
        (Some("../../x.safetensors"), "another folder"),
        (None, "does not name tensor `cond_norm.weight`"),
    ] {
        let mut wrong = map.clone();
        match change {
            Some(file) => drop(wrong.insert(first.clone(), file)),
            None => drop(wrong.remove(&first)),
        }
        lab.write(name, index(&wrong).as_bytes());
        let error = lab.open("source").expect_err(part).to_string();
        assert!(
            error.contains(part) && error.contains("index.json"),
            "{error}"
        );
    }
}
