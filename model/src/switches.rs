//! Tests of the switches that the paper's ablations turn.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use pollen_core::{ActionSpace, ActionSpaceFile, Seed};

use crate::config::{CrossAttentionMask, FlowerConfig, Fusion, ModulationKind, Part};
use crate::flower::Flower;
use crate::observation::{Observation, TrainMasks};
use crate::testing::{bits, hold_generator, mini, mini_decoder, mini_observation, space};

fn spaces() -> [ActionSpace; 2] {
    [space("eef_delta", 7, 0), space("bimanual_nav", 9, 4)]
}

/// Builds, differentiates once, moves every trained parameter against its gradient and samples.
/// Returns the names that got a gradient, and the samples before and after. The pass in segments
/// must give the same gradients to the bit.
fn step(config: &FlowerConfig, obs: &Observation) -> (Vec<String>, Vec<u32>, Vec<u32>) {
    step_in(&spaces(), config, obs)
}

fn step_in(
    spaces: &[ActionSpace],
    config: &FlowerConfig,
    obs: &Observation,
) -> (Vec<String>, Vec<u32>, Vec<u32>) {
    let device = Device::flex().autodiff();
    let model = config.init(spaces, Seed::new(5), &device).expect("valid");
    let before = sample(&model, obs);
    let masks = TrainMasks::new(Seed::new(6));
    let valid = model.valid_mask(&obs.spaces, &device);
    let noise = Tensor::ones(valid.dims(), &device) * valid.clone();
    let z = noise.clone() * 0.75;
    let t = Tensor::full([obs.spaces.len()], 0.5, &device);
    let loss = |velocity: Tensor<3>| {
        crate::velocity_loss(velocity, noise.clone(), noise.clone() * 0.5, valid.clone())
    };

    let _held = hold_generator();
    let context = model.encode(obs, Some(&masks));
    let whole = loss(model.velocity(&context, z.clone(), t.clone(), Some(&masks)));
    let mut steps: BTreeMap<_, _> = model
        .take_gradients(&mut whole.backward())
        .into_iter()
        .collect();
    let pass = model.segments(obs, &masks, z, t);
    let cut = loss(pass.velocity());
    for (name, grad) in pass.backward(&cut).flatten() {
        assert_eq!(grad.map(bits), steps[&name].clone().map(bits), "{name}");
    }

    let trained = steps
        .iter()
        .filter(|(_, grad)| grad.is_some())
        .map(|(name, _)| name.clone())
        .collect();
    let old: BTreeMap<_, _> = model.flat_parameters().into_iter().collect();
    let moved = model.with_flat_parameters(&mut |name| {
        let grad = steps.remove(name).flatten()?;
        Some(old[name].clone() - grad * 0.1)
    });
    let after = sample(&moved, obs);
    (trained, before, after)
}

fn sample(model: &Flower, obs: &Observation) -> Vec<u32> {
    let shape = [
        obs.spaces.len(),
        model.config().flow.action_horizon,
        model.action_width(),
    ];
    let noise = Tensor::full(shape, 0.25, &Device::flex().autodiff());
    bits(model.sample(&model.encode(obs, None), noise, 2))
}

fn observation(cameras: usize) -> Observation {
    let device = Device::flex().autodiff();
    let mut obs = mini_observation(&[0, 1, 0], &device);
    let first = obs.images.clone().narrow(1, 0, 1);
    obs.images = match cameras {
        1 => first,
        2 => obs.images,
        _ => Tensor::cat(vec![obs.images, first * 0.5], 1),
    };
    obs
}

#[test]
fn any_number_of_cameras_is_seen() {
    for cameras in 1..=3 {
        let mut config = mini();
        config.num_cameras = cameras;
        let mut obs = observation(cameras);
        let (_, before, after) = step(&config, &obs);
        assert_ne!(before, after, "{cameras} camera(s) train");
        let [batch, _, _, height, width] = obs.images.dims();
        let last = [0..batch, cameras - 1..cameras, 0..3, 0..height, 0..width];
        let brighter = obs.images.clone().slice(last.clone()) * 2.0;
        obs.images = obs.images.slice_assign(last, brighter);
        let (_, other, _) = step(&config, &obs);
        assert_ne!(before, other, "the last of {cameras} camera(s) counts");
    }
}

#[test]
fn adaln_zero_gives_each_block_a_matrix_and_starts_as_the_identity() {
    let mut config = mini();
    config.flow.modulation = ModulationKind::AdalnZero;
    let device = Device::flex();
    let obs = mini_observation(&[0, 1], &device);
    let model = config
        .init(&spaces(), Seed::new(5), &device)
        .expect("valid");
    let names: Vec<String> = model.parameters().into_iter().map(|p| p.name).collect();
    assert!(!names.iter().any(|name| name.starts_with("adaln.")));
    assert!(!names.iter().any(|name| name.contains("adaLN_modulation.2")));
    let width = config.flow.width;
    let table = config.parameter_table(&spaces()).expect("valid");
    for layer in 0..config.flow.layers {
        let name = format!("dit.{layer}.adaLN_modulation.1.weight");
        assert_eq!(table.get(&name).expect("listed").shape, [6 * width, width]);
    }
    // All gates are zero, so only the cross-attention moves the tokens: without it nothing does.
    let silent = model.with_flat_parameters(&mut |name| {
        let silenced = name.contains(".cross_attn.proj.");
        silenced.then(|| Tensor::zeros([width * width], &device))
    });
    let context = silent.encode(&obs, None);
    let z = Tensor::ones([2, config.flow.action_horizon, 9], &device);
    let t = Tensor::full([2], 0.5, &device);
    let start = silent.head.start(&context, z, t);
    let layers = 0..config.flow.layers;
    let end = silent.head.run_blocks(start.clone(), None, None, layers);
    assert_eq!(bits(end.x_BTD), bits(start.x_BTD));
    let (trained, before, after) = step(&config, &observation(2));
    assert_ne!(before, after);
    assert!(trained.contains(&"dit.0.adaLN_modulation.1.weight".into()));
}

#[test]
fn global_adaln_saves_what_the_matrices_of_the_blocks_cost() {
    let spaces = [
        space("joint_single", 8, 0),
        space("eef_delta", 7, 0),
        space("bimanual_nav", 16, 0),
    ];
    let mut config = crate::testing::flower_config("flower.toml");
    let count = |config: &FlowerConfig| config.parameter_table(&spaces).expect("valid").count();
    let global = count(&config);
    config.flow.modulation = ModulationKind::AdalnZero;
    let d = 1024;
    let plain = 18 * (6 * d * d + 6 * d);
    assert_eq!(count(&config) - global, plain - 18 * 1_841_408 - 28_311_552);
}

#[test]
fn the_number_of_flow_layers_is_free() {
    for layers in [1, 3] {
        let mut config = mini();
        config.flow.layers = layers;
        let table = config.parameter_table(&spaces()).expect("valid");
        let blocks = table
            .iter()
            .filter(|spec| spec.name.ends_with("norm3.weight"));
        assert_eq!(blocks.count(), layers);
        let (_, before, after) = step(&config, &observation(2));
        assert_ne!(before, after, "{layers} layer(s) train");
    }
}

#[test]
fn a_frozen_vlm_gets_no_gradient_and_no_dropout() {
    let mut config = mini();
    config.frozen = vec!["vlm.".into()];
    config.language.dropout = 0.5;
    config.vision.stochastic_depth = 0.5;
    let obs = observation(2);
    let (trained, before, after) = step(&config, &obs);
    assert!(!trained.iter().any(|name| name.starts_with("vlm.")));
    assert!(trained.contains(&"cond_linear.weight".into()));
    assert_ne!(before, after, "the head trains");

    let device = Device::flex();
    let model = config
        .init(&spaces(), Seed::new(5), &device)
        .expect("valid");
    let listed = model.parameters();
    assert!(
        listed
            .iter()
            .all(|p| !(p.trained && p.name.starts_with("vlm.")))
    );
    let obs = mini_observation(&[0, 1], &device);
    let _held = hold_generator();
    let mut dropped = TrainMasks::new(Seed::new(6));
    dropped.depth_keep = Some(Tensor::zeros([2, config.num_depth_blocks()], &device));
    let features = |masks| bits(model.encode(&obs, masks).tokens_BSD);
    assert_eq!(features(Some(&dropped)), features(None));
}

#[test]
fn parts_can_be_frozen_by_name_and_unknown_names_are_refused() {
    let mut config = mini();
    config.frozen = vec!["vlm.language_model.model.shared.".into()];
    let (trained, ..) = step(&config, &observation(2));
    assert!(!trained.contains(&"vlm.language_model.model.shared.weight".into()));
    assert!(trained.contains(&"vlm.image_projection".into()));
    config.frozen = vec!["vlm.vison_tower".into()];
    let error = config
        .parameter_table(&spaces())
        .expect_err("a typing error");
    assert!(error.to_string().contains("vlm.vison_tower"), "{error}");
    config.frozen = vec![String::new()];
    let error = config
        .parameter_table(&spaces())
        .expect_err("nothing trains");
    assert!(
        error.to_string().contains("no parameter to train"),
        "{error}"
    );
}

#[test]
fn proprioception_can_be_hidden() {
    let mut config = mini();
    let obs = observation(2);
    let mut other = obs.clone();
    other.proprio = obs.proprio.clone().map(|x| x + 1.0);
    let (_, seen, _) = step(&config, &obs);
    assert_ne!(step(&config, &other).1, seen);
    config.proprioception = false;
    let (trained, hidden, _) = step(&config, &obs);
    assert_eq!(step(&config, &other).1, hidden);
    assert!(
        !trained
            .iter()
            .any(|name| name.starts_with("proprio_encoders."))
    );
}

/// What of the language layers is left: layers, whether the decoder or its last norm is there, and
/// the tokens of the context.
#[track_caller]
fn assert_fusion(config: &FlowerConfig, layers: usize, behind: bool, context: usize) {
    let table = config.parameter_table(&spaces()).expect("valid");
    let ends = |end: &str| table.iter().filter(|spec| spec.name.ends_with(end)).count();
    let (layer, last) = match config.language.decoder {
        Some(_) => ("up_proj.weight", "vlm.text_model.norm.weight"),
        None => (
            ".self_attn_layer_norm.bias",
            "vlm.language_model.model.decoder.layernorm_embedding.bias",
        ),
    };
    assert_eq!(ends(layer), layers);
    assert_eq!(ends(last), usize::from(behind));
    assert_eq!(config.context_len(4), context);
    let device = Device::flex();
    let model = config
        .init(&spaces(), Seed::new(5), &device)
        .expect("valid");
    let obs = mini_observation(&[0, 1], &device);
    let tokens = model.encode(&obs, None).tokens_BSD;
    assert_eq!(tokens.dims(), [2, context, config.flow.width]);
    // The words count, and padding behind them is hidden where the mask is kept.
    let (_, before, after) = step(config, &observation(2));
    assert_ne!(before, after);
    let mut other = observation(2);
    other.input_ids = other.input_ids + 1;
    assert_ne!(step(config, &other).1, before);
}

#[test]
fn fusion_takes_the_context_before_between_or_behind_the_language_layers() {
    let mut config = mini();
    config.cross_attention_mask = CrossAttentionMask::Boolean;
    config.language.layers = 2;
    let joined = 2 * config.vision.num_tokens() + 1 + 4;
    assert_fusion(&config, 2, false, joined);
    config.fusion = Fusion::Early;
    assert_fusion(&config, 0, false, joined);
    config.fusion = Fusion::Late;
    // Two layers of the encoder and two of the decoder.
    assert_fusion(&config, 4, true, 4);
}

#[test]
fn fusion_drops_the_last_layers_of_a_decoder() {
    let mut config = mini_decoder();
    let joined = 2 * 16 + 1 + 4;
    assert_fusion(&config, 3, false, joined);
    config.fusion = Fusion::Early;
    assert_fusion(&config, 0, false, joined);
    config.fusion = Fusion::Late;
    assert_fusion(&config, 4, true, joined);
}

#[test]
fn variants_of_the_language_layers_are_frozen_and_recomputed_alike() {
    let mut late = mini();
    late.fusion = Fusion::Late;
    late.language.dropout = 0.2;
    let mut table_frozen = late.clone();
    table_frozen.frozen = vec!["vlm.language_model.model.shared.".into()];
    let mut encoder_frozen = late.clone();
    encoder_frozen.frozen = vec!["vlm.vision".into(), "vlm.image".into()];
    for config in [late, table_frozen, encoder_frozen, mini_decoder()] {
        let (plain, _, after) = step(&config, &observation(2));
        let mut again = config.clone();
        again.recompute = [Part::Vision, Part::Language, Part::Flow].into();
        let (recomputed, _, after_again) = step(&again, &observation(2));
        assert_eq!(plain, recomputed);
        assert_eq!(after, after_again);
    }
}

#[test]
fn a_tower_without_its_decoder_is_refused() {
    let mut config = mini_decoder();
    config.language.decoder = None;
    config.vision.image_size = 36;
    let faults = config.validate().join("; ");
    assert!(faults.contains("give both or neither"), "{faults}");
    assert!(faults.contains("multiple of 8 pixels"), "{faults}");
    let mut config = mini_decoder();
    config.language.dropout = 0.1;
    config.vision.window = 12;
    let faults = config.validate().join("; ");
    assert!(faults.contains("language.dropout"), "{faults}");
    assert!(faults.contains("neither groups, window"), "{faults}");
}

/// Every file of `configs/embodiments` in one model: a new action space is a file and nothing else.
#[test]
fn all_embodiments_of_the_repository_train_and_sample_together() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/embodiments");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .expect("a folder of the repository")
        .map(|entry| entry.expect("a file").path())
        .collect();
    files.sort();
    let spaces: Vec<ActionSpace> = files
        .iter()
        .map(|path| {
            let text = std::fs::read_to_string(path).expect("a text file");
            ActionSpaceFile::parse(&text, &path.display().to_string()).expect("valid")
        })
        .collect();
    let named = |name: &str| {
        let space = spaces.iter().find(|space| space.name == name);
        space
            .unwrap_or_else(|| panic!("no action space {name}"))
            .dim()
    };
    assert_eq!(named("mobile_manipulator"), 12);
    assert_eq!(named("humanoid_upper_body"), 31);

    let device = Device::flex().autodiff();
    let all: Vec<usize> = (0..spaces.len()).collect();
    let mut obs = mini_observation(&all, &device);
    let proprio = spaces.iter().map(|space| space.proprio_dim).max();
    let shape = [all.len(), proprio.expect("some action space")];
    obs.proprio = Some(Tensor::full(shape, 0.5, &device));
    let (trained, before, after) = step_in(&spaces, &mini(), &obs);
    for space in &spaces {
        for module in [
            "action_encoders",
            "action_decoders",
            "proprio_encoders",
            "adaln",
        ] {
            let expected = module != "proprio_encoders" || space.proprio_dim > 0;
            let prefix = format!("{module}.{}.", space.name);
            let found = trained.iter().any(|name| name.starts_with(&prefix));
            assert_eq!(found, expected, "{prefix}");
        }
    }
    let rows = before.len() / all.len();
    let (before, after) = (before.chunks(rows), after.chunks(rows));
    for ((before, after), space) in before.zip(after).zip(&spaces) {
        assert_ne!(before, after, "{} learns", space.name);
    }
}
