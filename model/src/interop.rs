//! Weights and activations of the small model, for `make test-interop` to compare with the
//! `transformers` package.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use pollen_core::{ActionSpace, ActionSpaceFile, Seed};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::observation::Observation;
use crate::testing::{flower_config, values};

const BATCH: usize = 2;
const WORDS: usize = 7;

/// The action spaces of the demo recipe, whose model this is.
fn demo_spaces() -> Vec<ActionSpace> {
    ["eef_delta", "bimanual_eef_delta"]
        .map(|name| {
            let root = env!("CARGO_MANIFEST_DIR");
            let path = format!("{root}/../configs/embodiments/{name}.toml");
            let text = std::fs::read_to_string(&path).expect("part of the repository");
            ActionSpaceFile::parse(&text, &path).expect("an action space")
        })
        .into()
}

fn save(path: &Path, tensors: BTreeMap<&str, (Vec<usize>, Vec<f32>)>) {
    let bytes: BTreeMap<&str, (Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, (shape, values))| {
            let bytes = values.into_iter().flat_map(f32::to_le_bytes).collect();
            (name, (shape, bytes))
        })
        .collect();
    let views = bytes.iter().map(|(name, (shape, bytes))| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).expect("the shape fits");
        (*name, view)
    });
    safetensors::serialize_to_file(views, None, path).expect("is written");
}

#[test]
#[ignore = "writes files for make test-interop into POLLEN_INTEROP_DIR"]
fn write_weights_and_activations() {
    let dir = std::env::var("POLLEN_INTEROP_DIR").expect("POLLEN_INTEROP_DIR is set");
    let dir = PathBuf::from(dir);
    std::fs::create_dir_all(dir.join("weights")).expect("a folder");
    let config = flower_config("flower-tiny.toml");
    let device = Device::flex();
    let fresh = config
        .init(&demo_spaces(), Seed::new(11), &device)
        .expect("valid");
    // Initial biases are 0 and norms 1; noise on them shows when one is mixed up.
    let start: BTreeMap<String, Tensor<1>> = fresh.flat_parameters().into_iter().collect();
    let model = fresh.with_flat_parameters(&mut |name| {
        let value = start[name].clone();
        let mut noise = vec![0.0; value.dims()[0]];
        Seed::new(12).child(name).draws().fill_normal(&mut noise);
        Some(value + Tensor::<1>::from_floats(noise.as_slice(), &device) * 0.1)
    });
    let parameters = model.parameters();
    let flat: BTreeMap<String, Vec<f32>> = model
        .flat_parameters()
        .into_iter()
        .map(|(name, value)| (name, values(value)))
        .collect();
    let weights = parameters
        .iter()
        .map(|info| {
            let values = flat[&info.name].clone();
            (info.name.as_str(), (info.shape.clone(), values))
        })
        .collect();
    save(&dir.join("weights/model.safetensors"), weights);

    let (cameras, side) = (config.num_cameras, config.vision.image_size);
    let shape = [BATCH, cameras, 3, side, side];
    let mut pixels = vec![0.0; shape.iter().product()];
    Seed::new(13).draws().fill_normal(&mut pixels);
    let words = config.language.vocab_size - 1;
    let ids: Vec<i64> = (0..BATCH * WORDS)
        .map(|i| (i * 37 % words) as i64)
        .collect();
    // The second text is shorter.
    let text_mask: Vec<f32> = (0..BATCH * WORDS)
        .map(|i| if i >= 2 * WORDS - 3 { 0.0 } else { 1.0 })
        .collect();
    let obs = Observation {
        images: Tensor::from_data(TensorData::new(pixels.clone(), shape), &device),
        camera_present: None,
        input_ids: Tensor::<2, Int>::from_data(
            TensorData::new(ids.clone(), [BATCH, WORDS]),
            &device,
        ),
        text_mask: Tensor::from_data(TensorData::new(text_mask, [BATCH, WORDS]), &device),
        frequency_hz: Tensor::full([BATCH], 10.0, &device),
        proprio: None,
        spaces: vec![0; BATCH],
    };
    let images = model.encoder.image_tokens(obs.images.clone(), None);
    let tokens = images.dims();
    let content = model.encoder.content_mask(&obs, tokens[1]);
    let (joined, _) = model.encoder.join(images.clone(), obs.input_ids.clone());
    let joined_shape = joined.dims();
    let encoded = model.encoder.encode(joined, None, &content, None);
    let ids = ids.into_iter().map(|id| id as f32).collect();
    save(
        &dir.join("activations.safetensors"),
        BTreeMap::from([
            ("input.images", (shape.to_vec(), pixels)),
            ("input.ids", (vec![BATCH, WORDS], ids)),
            (
                "input.mask",
                (vec![BATCH, joined_shape[1]], values(content)),
            ),
            ("output.image_tokens", (tokens.to_vec(), values(images))),
            ("output.encoded", (joined_shape.to_vec(), values(encoded))),
        ]),
    );
}
