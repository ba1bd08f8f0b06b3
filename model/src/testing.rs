//! Small models and inputs for the tests of this crate.

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::tensor::{Device, Tensor, TensorData};
use pollen_core::Seed;

use crate::config::{DecoderConfig, FlowerConfig, SiglipConfig, VisionConfig};
pub(crate) use crate::golden::{space, values};
use crate::observation::Observation;

/// Reads `configs/model/<name>`.
pub(crate) fn flower_config(name: &str) -> FlowerConfig {
    #[derive(serde::Deserialize)]
    struct File {
        model: FlowerConfig,
    }
    let path = format!("{}/../configs/model/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).expect("the file is part of the repository");
    toml::from_str::<File>(&text)
        .expect("a model configuration")
        .model
}

/// Returns a configuration that runs in milliseconds.
pub(crate) fn mini() -> FlowerConfig {
    let mut config = flower_config("flower-tiny.toml");
    config.num_cameras = 2;
    config.vision.image_size = 32;
    config.vision.dims = vec![4, 8];
    config.vision.heads = vec![1, 2];
    config.vision.groups = vec![2, 2];
    config.vision.depths = vec![1, 1];
    config.vision.window = 3;
    config.language.width = 16;
    config.language.heads = 2;
    config.language.layers = 1;
    config.language.ffn = 24;
    config.language.vocab_size = 20;
    config.language.max_positions = 64;
    config.flow.width = 24;
    config.flow.heads = 2;
    config.flow.layers = 2;
    config.flow.modulation_rank = 4;
    config.flow.action_horizon = 3;
    config
}

/// Returns [`mini`] with a decoder-only vision-language model of four layers.
pub(crate) fn mini_decoder() -> FlowerConfig {
    let mut config = mini();
    config.vision = VisionConfig {
        image_size: 32,
        dims: vec![8],
        heads: vec![2],
        groups: Vec::new(),
        depths: vec![2],
        window: 0,
        stochastic_depth: 0.0,
        siglip: Some(SiglipConfig {
            patch: 4,
            ffn: 12,
            pixel_shuffle: 2,
            norm_eps: 1e-6,
        }),
    };
    config.language.layers = 4;
    config.language.decoder = Some(DecoderConfig {
        kv_heads: 1,
        head_dim: 6,
        rope_theta: 100.0,
        norm_eps: 1e-5,
        dropped_share: 0.3,
    });
    config
}

/// Returns random inputs for [`mini`], one sample per entry of `spaces`.
pub(crate) fn mini_observation(spaces: &[usize], device: &Device) -> Observation {
    let config = mini();
    let (batch, side) = (spaces.len(), config.vision.image_size);
    let mut pixels = vec![0.0; batch * config.num_cameras * 3 * side * side];
    Seed::new(1).draws().fill_normal(&mut pixels);
    let ids: Vec<i64> = (0..batch * 4).map(|i| (i % 19) as i64).collect();
    let text_mask: Vec<f32> = (0..batch * 4)
        .map(|i| if i % 4 == 3 { 0.0 } else { 1.0 })
        .collect();
    let proprio: Vec<f32> = (0..batch * 4).map(|i| (i as f32).sin()).collect();
    let shape = [batch, config.num_cameras, 3, side, side];
    Observation {
        images: Tensor::from_data(TensorData::new(pixels, shape), device),
        camera_present: None,
        input_ids: Tensor::from_data(TensorData::new(ids, [batch, 4]), device),
        text_mask: Tensor::from_data(TensorData::new(text_mask, [batch, 4]), device),
        frequency_hz: Tensor::full([batch], 10.0, device),
        proprio: Some(Tensor::from_data(
            TensorData::new(proprio, [batch, 4]),
            device,
        )),
        spaces: spaces.to_vec(),
    }
}

/// Holds the backend's generator, of which a process has one: for tests in which something is
/// drawn from it and compared.
pub(crate) fn hold_generator() -> MutexGuard<'static, ()> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the bits of all values.
pub(crate) fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<u32> {
    values(tensor).into_iter().map(f32::to_bits).collect()
}
