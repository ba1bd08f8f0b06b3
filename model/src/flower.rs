//! FLOWER: observations in, action chunks out.
//!
//! Legend: B batch, N cameras, S context tokens, D width of the encoder, H action horizon,
//! A padded action width.

use std::collections::BTreeSet;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use pollen_core::ActionSpace;

use crate::config::{FlowerConfig, Precision};
use crate::flow_transformer::{Context, Encoded, FlowTransformer};
use crate::fusion::JointEncoder;
use crate::layers::{like, to};
use crate::observation::{Observation, TrainMasks};
use crate::parameters::ParameterTable;
use crate::weights::Weights;

/// The model: joint encoder of images and text, and flow transformer.
#[derive(Module, Debug)]
pub struct Flower {
    pub(crate) encoder: JointEncoder,
    pub(crate) head: FlowTransformer,
    #[module(skip)]
    pub(crate) frozen: BTreeSet<String>,
    #[module(skip)]
    pub(crate) config: FlowerConfig,
    #[module(skip)]
    precision: Precision,
}

impl Flower {
    pub(crate) fn new(
        config: &FlowerConfig,
        spaces: &[ActionSpace],
        weights: &mut Weights,
    ) -> Self {
        let frozen: BTreeSet<String> = ParameterTable::new(config, spaces)
            .iter()
            .filter(|spec| !spec.trained)
            .map(|spec| spec.name.clone())
            .collect();
        Self {
            encoder: JointEncoder::new(weights, config),
            head: FlowTransformer::new(weights, &config.flow, config.cross_attention_mask, spaces),
            frozen,
            config: config.clone(),
            precision: Precision::F32,
        }
    }

    /// Returns the model with another element type of activations. Parameters and their gradients
    /// stay f32, and so do norms, softmax, time and loss.
    #[must_use]
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// Returns images in the element type that the model computes in; what follows takes it over.
    pub(crate) fn in_precision<const D: usize>(&self, images: Tensor<D>) -> Tensor<D> {
        to(images, self.precision.dtype())
    }

    /// Returns the configuration the model was built from.
    pub fn config(&self) -> &FlowerConfig {
        &self.config
    }

    /// Returns the width that the actions of all spaces are padded to.
    pub fn action_width(&self) -> usize {
        self.head.action_width()
    }

    /// Encodes a batch of observations, once for all flow times. With `masks` the model trains:
    /// dropout acts; without, it is in evaluation.
    ///
    /// # Shapes
    /// See [`Observation`] and [`TrainMasks`].
    pub fn encode(&self, obs: &Observation, masks: Option<&TrainMasks>) -> Context {
        let encoder_masks = self.encoder_masks(masks);
        let images = self.in_precision(obs.images.clone());
        let images = self.encoder.image_tokens(images, encoder_masks);
        let content_BS = self.encoder.content_mask(obs, images.dims()[1]);
        let (joined_BSD, words_BTD) = self.encoder.join(images, obs.input_ids.clone());
        let seed = encoder_masks.map(|masks| masks.dropout);
        let mut features = self
            .encoder
            .encode(joined_BSD, words_BTD, &content_BS, seed);
        if let Some(keep) = masks.and_then(|masks| masks.token_keep.clone()) {
            let keep = like(keep, &features);
            features = features * keep;
        }
        self.head.context(Encoded {
            features_BSC: features,
            mask_BS: self.encoder.context_mask(content_BS, obs.text_mask.clone()),
            frequency_hz: obs.frequency_hz.clone(),
            proprio_BP: obs.proprio.clone(),
            spaces: &obs.spaces,
            dropout_seed: masks.map(|masks| masks.dropout),
        })
    }

    /// Returns the masks that act inside the encoder: none if it is frozen.
    pub(crate) fn encoder_masks<'a>(
        &self,
        masks: Option<&'a TrainMasks>,
    ) -> Option<&'a TrainMasks> {
        masks.filter(|_| !self.config.vlm_frozen())
    }

    /// Returns the velocity at the noisy chunk `z` and flow time `t` (1 is pure noise). With `masks`
    /// dropout acts.
    ///
    /// # Shapes
    /// `z: [B, H, A]`, `t: [B]` -> `[B, H, A]`, zero beyond each sample's action space
    pub fn velocity(
        &self,
        context: &Context,
        z: Tensor<3>,
        t: Tensor<1>,
        masks: Option<&TrainMasks>,
    ) -> Tensor<3> {
        let seed = masks.map(|masks| masks.dropout);
        self.head.velocity(context, z, t, seed)
    }

    /// Denoises `noise` in `steps` Euler steps; the result lies in [-1, 1] and is zero beyond
    /// each sample's action space.
    ///
    /// # Shapes
    /// `[B, H, A] -> [B, H, A]`
    pub fn sample(&self, context: &Context, noise: Tensor<3>, steps: usize) -> Tensor<3> {
        self.head.sample(context, noise, steps)
    }

    /// Returns 1 for the dimensions of each sample's action space and 0 for padding.
    ///
    /// # Shapes
    /// `[B, H, A]` for the spaces of `B` samples
    pub fn valid_mask(&self, spaces: &[usize], device: &Device) -> Tensor<3> {
        self.head
            .valid_mask(spaces, self.config.flow.action_horizon, device)
    }
}

impl FlowTransformer {
    /// Returns 1 for the dimensions of each sample's action space and 0 for padding.
    pub(crate) fn valid_mask(
        &self,
        spaces: &[usize],
        horizon: usize,
        device: &Device,
    ) -> Tensor<3> {
        let width = self.action_width();
        let rows: Vec<f32> = spaces
            .iter()
            .flat_map(|&space| {
                let dim = self.spaces[space].dim;
                (0..width).map(move |i| if i < dim { 1.0 } else { 0.0 })
            })
            .collect();
        let data = TensorData::new(rows, [spaces.len(), 1, width]);
        Tensor::<3>::from_data(data, device).expand([spaces.len(), horizon, width])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CrossAttentionMask, EncoderMask};
    use crate::testing::{bits, hold_generator, mini, mini_observation, space, values};
    use burn::tensor::Int;
    use pollen_core::Seed;

    fn spaces() -> [ActionSpace; 2] {
        [space("eef_delta", 7, 0), space("bimanual_nav", 9, 4)]
    }

    /// A model whose global modulation is not zero, as after some training.
    fn model(config: &FlowerConfig) -> Flower {
        model_on(config, &Device::flex())
    }

    fn model_on(config: &FlowerConfig, device: &Device) -> Flower {
        let fresh = config.init(&spaces(), Seed::new(3), device).expect("valid");
        let values: Vec<(String, usize)> = fresh
            .parameters()
            .into_iter()
            .map(|info| (info.name, info.shape.iter().product()))
            .collect();
        fresh.with_flat_parameters(&mut |name| {
            let (_, count) = values.iter().find(|(other, _)| other == name)?;
            let mut noise = vec![0.0; *count];
            Seed::new(4).child(name).draws().fill_normal(&mut noise);
            let norm = name.ends_with("norm.weight") || name.contains(".norm");
            for value in &mut noise {
                *value = *value * 0.2 + if norm { 1.0 } else { 0.0 };
            }
            Some(Tensor::from_floats(
                noise.as_slice(),
                &device.clone().inner(),
            ))
        })
    }

    fn rows(obs: &Observation, row: usize) -> Observation {
        Observation {
            images: obs.images.clone().narrow(0, row, 1),
            camera_present: obs.camera_present.clone().map(|x| x.narrow(0, row, 1)),
            input_ids: obs.input_ids.clone().narrow(0, row, 1),
            text_mask: obs.text_mask.clone().narrow(0, row, 1),
            frequency_hz: obs.frequency_hz.clone().narrow(0, row, 1),
            proprio: obs.proprio.clone().map(|x| x.narrow(0, row, 1)),
            spaces: vec![obs.spaces[row]],
        }
    }

    fn noise(model: &Flower, batch: usize) -> Tensor<3> {
        let shape = [
            batch,
            model.config().flow.action_horizon,
            model.action_width(),
        ];
        let mut noise = vec![0.0; shape.iter().product()];
        Seed::new(8).draws().fill_normal(&mut noise);
        Tensor::from_data(TensorData::new(noise, shape), &Device::flex())
    }

    #[test]
    fn a_mixed_batch_gives_each_sample_what_it_gets_alone() {
        let model = model(&mini());
        let obs = mini_observation(&[1, 0, 1, 0], &Device::flex());
        let noise = noise(&model, 4);
        let together = model.sample(&model.encode(&obs, None), noise.clone(), 2);
        for row in 0..4 {
            let context = model.encode(&rows(&obs, row), None);
            let alone = model.sample(&context, noise.clone().narrow(0, row, 1), 2);
            let expected = values(together.clone().narrow(0, row, 1));
            for (a, b) in values(alone).iter().zip(expected) {
                assert!((a - b).abs() < 1e-4, "sample {row}: {a} is not {b}");
            }
        }
        let beyond = values(together.narrow(0, 1, 1).narrow(2, 7, 2));
        assert!(
            beyond.iter().all(|&x| x == 0.0),
            "eef_delta has 7 dimensions"
        );
    }

    #[test]
    fn padding_is_left_out_only_where_it_changes_nothing() {
        let device = Device::flex().autodiff();
        let mut obs = mini_observation(&[0, 1], &device);
        let padding = Tensor::<2, Int>::ones([2, 5], &device);
        let masked = Tensor::zeros([2, 5], &device);
        let short = obs.clone();
        obs.input_ids = Tensor::cat(vec![obs.input_ids, padding], 1);
        obs.text_mask = Tensor::cat(vec![obs.text_mask, masked], 1);
        // Tensor by tensor, relative to the norm; a gradient that is zero but for rounding (that of
        // a bias of keys) is measured against the others.
        let norm = |values: &[f32]| values.iter().map(|x| x * x).sum::<f32>().sqrt();
        let apart = |a: &[Vec<f32>], b: &[Vec<f32>]| {
            let largest = b.iter().map(|b| norm(b)).fold(0.0, f32::max);
            let distance = |(a, b): (&Vec<f32>, &Vec<f32>)| {
                let difference: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
                norm(&difference) / norm(b).max(1e-3 * largest)
            };
            a.iter().zip(b).map(distance).fold(0.0, f32::max)
        };
        for encoder_mask in [EncoderMask::TextAndFlow, EncoderMask::None] {
            for cross_attention_mask in [
                CrossAttentionMask::Boolean,
                CrossAttentionMask::Additive,
                CrossAttentionMask::None,
            ] {
                let config = FlowerConfig {
                    encoder_mask,
                    cross_attention_mask,
                    ..mini()
                };
                let model = model_on(&config, &device);
                let run = |obs: &Observation| {
                    let context = model.encode(obs, None);
                    let t = Tensor::full([2], 0.5, &device);
                    let z = noise(&model, 2).autodiff();
                    let velocity = model.velocity(&context, z, t, None);
                    let mut grads = velocity.clone().square().sum().backward();
                    let grads = model.take_gradients(&mut grads).into_iter();
                    let grads = grads.filter_map(|(_, grad)| grad).map(values);
                    (vec![values(velocity)], grads.collect::<Vec<_>>())
                };
                let (padded, trimmed) = (run(&obs), run(&short));
                let apart = apart(&padded.0, &trimmed.0).max(apart(&padded.1, &trimmed.1));
                if config.ignores_padding() {
                    assert!(apart < 1e-5, "{encoder_mask:?}: {apart}");
                } else {
                    let masks = (encoder_mask, cross_attention_mask);
                    assert!(apart > 1e-3, "{masks:?}: {apart}");
                }
            }
        }
    }

    #[test]
    fn hidden_inputs_change_nothing() {
        let model = model(&mini());
        let device = Device::flex();
        let mut obs = mini_observation(&[0, 1], &device);
        let present = Tensor::from_floats([[1.0, 0.0], [1.0, 0.0]], &device);
        obs.camera_present = Some(present);
        let run = |obs: &Observation| {
            let noise = noise(&model, 2);
            bits(model.sample(&model.encode(obs, None), noise, 1))
        };
        let before = run(&obs);
        let mut other = obs.clone();
        let first = obs.images.clone().narrow(1, 0, 1);
        other.images = Tensor::cat(vec![first.clone(), first.clone() * 3.0], 1);
        // The last of four text tokens is padding.
        let words = obs.input_ids.clone().narrow(1, 0, 3);
        let padding = Tensor::<2, Int>::ones([2, 1], &device);
        other.input_ids = Tensor::cat(vec![words, padding], 1);
        assert_eq!(run(&other), before);
        other.images = Tensor::cat(vec![first.clone() * 3.0, first], 1);
        assert_ne!(run(&other), before, "the first camera is there");
    }

    #[test]
    fn masks_act_in_training() {
        let mut config = mini();
        config.vision.stochastic_depth = 0.5;
        let model = model(&config);
        let device = Device::flex();
        let obs = mini_observation(&[0, 1], &device);
        let noise = noise(&model, 2);
        let run = |masks: Option<&TrainMasks>| {
            bits(model.sample(&model.encode(&obs, masks), noise.clone(), 1))
        };
        let columns = config.num_depth_blocks();
        assert_eq!(config.depth_drop_rates().len(), columns);
        assert_eq!(config.depth_drop_rates()[columns - 1], 0.5);
        let masks = |depth_keep, token_keep| TrainMasks {
            depth_keep,
            token_keep,
            ..TrainMasks::new(Seed::new(1))
        };
        let all = masks(Some(Tensor::ones([2, columns], &device)), None);
        let none = run(None);
        assert_eq!(run(Some(&masks(None, None))), none);
        assert_eq!(run(Some(&all)), none);
        let dropped = Tensor::zeros([2, columns], &device);
        assert_ne!(run(Some(&masks(Some(dropped), None))), none);
        let context_len = config.context_len(obs.input_ids.dims()[1]);
        let keep = Tensor::ones([2, context_len, config.language.width], &device) * 0.5;
        let masks = masks(None, Some(keep));
        // The norm behind the mask removes a common factor.
        for (a, b) in run(Some(&masks)).iter().zip(&none) {
            let (a, b) = (f32::from_bits(*a), f32::from_bits(*b));
            assert!((a - b).abs() < 1e-3, "{a} is not {b}");
        }
    }

    #[test]
    fn dropout_acts_only_in_training() {
        let _held = hold_generator();
        let mut config = mini();
        config.language.dropout = 0.3;
        config.flow.dropout_attention = 0.3;
        let model = model(&config);
        let obs = mini_observation(&[0], &Device::flex());
        let run = |masks: Option<&TrainMasks>| {
            let context = model.encode(&obs, masks);
            let t = Tensor::full([1], 0.5, &Device::flex());
            bits(model.velocity(&context, noise(&model, 1), t, masks))
        };
        assert_eq!(run(None), run(None));
        let masks = |seed| TrainMasks::new(Seed::new(seed));
        assert_ne!(run(Some(&masks(1))), run(None));
        assert_eq!(run(Some(&masks(1))), run(Some(&masks(1))));
        assert_ne!(run(Some(&masks(1))), run(Some(&masks(2))));
    }

    #[test]
    fn weights_depend_on_the_seed_alone() {
        let build = |seed| {
            let model = mini()
                .init(&spaces(), Seed::new(seed), &Device::flex())
                .expect("valid");
            model
                .flat_parameters()
                .into_iter()
                .map(|(n, v)| (n, bits(v)))
                .collect::<Vec<_>>()
        };
        assert_eq!(build(1), build(1));
        assert_ne!(build(1), build(2));
    }

    #[test]
    fn faults_are_all_named() {
        let mut config = mini();
        config.flow.heads = 5;
        config.vision.window = 0;
        let error = config
            .init(&[], Seed::new(0), &Device::flex())
            .expect_err("three faults");
        let text = error.to_string();
        for part in ["flow.heads = 5", "vision.window", "no action space"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
