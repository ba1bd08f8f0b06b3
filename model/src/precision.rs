//! Tests of computing in bf16: close to f32, with f32 parameters and gradients, whatever is switched.

use burn::tensor::{DType, Device, Tensor};
use pollen_core::{ActionSpace, Seed};

use crate::config::{CrossAttentionMask, EncoderMask, FlowerConfig, Fusion, Part, Precision};
use crate::flower::Flower;
use crate::observation::{Observation, TrainMasks};
use crate::testing::{bits, hold_generator, mini, mini_decoder, mini_observation, space, values};

/// bf16 keeps 8 bits: one rounding is off by 2^-9 at most, and a pass of this depth adds up some.
const OUTPUT_BOUND: f64 = 0.02;
/// A gradient goes through the pass twice.
const GRADIENT_BOUND: f64 = 0.06;

fn spaces() -> [ActionSpace; 2] {
    [space("eef_delta", 7, 0), space("bimanual_nav", 9, 4)]
}

/// Gradients by name.
type Named = Vec<(String, Tensor<1>)>;

fn model(config: &FlowerConfig, precision: Precision) -> Flower {
    let device = Device::flex().autodiff();
    let fresh = config
        .init(&spaces(), Seed::new(5), &device)
        .expect("valid");
    // The global modulation starts at zero and would hide what lies behind it.
    let width = config.flow.width;
    fresh
        .with_flat_parameters(&mut |name| {
            let plain = device.clone().inner();
            name.starts_with("adaln.").then(|| {
                let mut noise = vec![0.0; 9 * width * width];
                Seed::new(6).child(name).draws().fill_normal(&mut noise);
                Tensor::<1>::from_floats(noise.as_slice(), &plain) * 0.02
            })
        })
        .with_precision(precision)
}

/// Returns the velocity and all gradients of a pass in training, with dropout where `masks` are.
fn pass(model: &Flower, obs: &Observation, masks: &TrainMasks) -> (Tensor<3>, Named) {
    let device = Device::flex().autodiff();
    let valid = model.valid_mask(&obs.spaces, &device);
    let mut noise = vec![0.0; valid.dims().iter().product()];
    Seed::new(8).draws().fill_normal(&mut noise);
    let noise = Tensor::<1>::from_floats(noise.as_slice(), &device).reshape(valid.dims());
    let t = Tensor::full([obs.spaces.len()], 0.5, &device);
    let pass = model.segments(obs, masks, noise.clone() * valid.clone(), t);
    let velocity = pass.velocity();
    let actions = noise.clone() * 0.5;
    let loss = crate::velocity_loss(velocity.clone(), noise, actions, valid);
    let gradients = pass.backward(&loss).flatten();
    let mut named: Named = gradients
        .filter_map(|(name, gradient)| Some((name, gradient?)))
        .collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    (velocity, named)
}

/// Returns the norm of the difference over that of `wanted`.
fn apart(got: &[f32], wanted: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference = got.iter().zip(wanted);
    let difference: f64 = difference.map(|(a, b)| square(f64::from(a - b))).sum();
    let norm: f64 = wanted.iter().map(|&x| square(f64::from(x))).sum();
    (difference / norm.max(1e-30)).sqrt()
}

#[test]
fn every_kind_of_model_stays_near_f32() {
    let _held = hold_generator();
    let late = FlowerConfig {
        fusion: Fusion::Late,
        ..mini()
    };
    let finetuning = FlowerConfig {
        encoder_mask: EncoderMask::None,
        cross_attention_mask: CrossAttentionMask::Additive,
        ..mini()
    };
    let mut padded = mini();
    padded.vision.window += 1;
    for (case, config) in [mini(), late, finetuning, padded, mini_decoder()]
        .into_iter()
        .enumerate()
    {
        let obs = mini_observation(&[0, 1], &Device::flex().autodiff());
        let masks = TrainMasks::new(Seed::new(3));
        let [wide, narrow] = [Precision::F32, Precision::Bf16]
            .map(|precision| pass(&model(&config, precision), &obs, &masks));
        assert_eq!(narrow.0.dtype(), DType::F32, "case {case}");
        let off = apart(&values(narrow.0), &values(wide.0));
        assert!(
            0.0 < off && off < OUTPUT_BOUND,
            "case {case}: velocity {off}"
        );
        assert_eq!(narrow.1.len(), wide.1.len(), "case {case}");
        let (mut got, mut wanted) = (Vec::new(), Vec::new());
        for ((name, gradient), (other, reference)) in narrow.1.into_iter().zip(wide.1) {
            assert_eq!(name, other);
            assert_eq!(gradient.dtype(), DType::F32, "case {case}: {name}");
            got.extend(values(gradient));
            wanted.extend(values(reference));
        }
        let off = apart(&got, &wanted);
        assert!(off < GRADIENT_BOUND, "case {case}: gradients {off}");
    }
}

#[test]
fn recomputed_activations_have_the_same_bits() {
    let _held = hold_generator();
    let mut config = mini();
    config.flow.dropout_residual = 0.1;
    let mut again = config.clone();
    again.recompute = [Part::Vision, Part::Language, Part::Flow].into();
    let obs = mini_observation(&[0, 1], &Device::flex().autodiff());
    let masks = TrainMasks::new(Seed::new(3));
    let [kept, recomputed] = [config, again].map(|config| {
        let (velocity, gradients) = pass(&model(&config, Precision::Bf16), &obs, &masks);
        let gradients = gradients.into_iter().map(|(name, x)| (name, bits(x)));
        (bits(velocity), gradients.collect::<Vec<_>>())
    });
    assert!(kept == recomputed);
}

#[test]
fn a_policy_in_bf16_answers_in_f32() {
    let obs = mini_observation(&[0, 1], &Device::flex());
    let [wide, narrow] = [Precision::F32, Precision::Bf16].map(|precision| {
        let model = mini().init(&spaces(), Seed::new(5), &Device::flex());
        let model = model.expect("valid").with_precision(precision);
        let mut noise = vec![0.0; 2 * mini().flow.action_horizon * 9];
        Seed::new(8).draws().fill_normal(&mut noise);
        let noise = Tensor::<1>::from_floats(noise.as_slice(), &Device::flex());
        let noise = noise.reshape([2, mini().flow.action_horizon, 9]);
        model.sample(&model.encode(&obs, None), noise, 4)
    });
    assert_eq!(narrow.dtype(), DType::F32);
    let off = apart(&values(narrow), &values(wide));
    assert!(0.0 < off && off < OUTPUT_BOUND, "{off}");
}
