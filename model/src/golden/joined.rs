//! The whole model, from pixels and token ids to loss, gradients and actions, on both paths.

use burn::tensor::{Device, Tensor};

use super::flow::{FINETUNE_HZ, finetune_space, unpad};
use super::{Golden, pad};
use crate::config::{CrossAttentionMask, EncoderMask, FlowerConfig, Fusion, TokenOrder};
use crate::flower::Flower;
use crate::observation::Observation;
use crate::parameters::ParameterTable;
use crate::rectified_flow::{noisy_actions, velocity_loss};
use crate::weights::Weights;

fn model(golden: &Golden, device: &Device) -> Flower {
    let config = FlowerConfig {
        num_cameras: 1,
        token_order: TokenOrder::FlowImagesText,
        encoder_mask: EncoderMask::TextAndFlow,
        cross_attention_mask: CrossAttentionMask::Additive,
        token_dropout: 0.0,
        fusion: Fusion::Intermediate,
        proprioception: true,
        frozen: Vec::new(),
        recompute: [].into(),
        vision: golden.vision_config(),
        language: golden.language_config("vl", "vh"),
        flow: golden.flow_config("dit.0."),
    };
    let (spaces, _) = golden.spaces();
    let table = ParameterTable::new(&config, &spaces);
    let mut source = |spec: &crate::ParameterSpec| golden.weight(spec);
    let mut weights = Weights::new(&table, &mut source, device);
    golden.check_tables(&config.flow);
    golden.check_frame_positions(device);
    Flower::new(&config, &spaces, &mut weights)
}

fn observation(golden: &Golden, device: &Device) -> Observation {
    Observation {
        images: golden.tensor("input.image_primary", device),
        camera_present: None,
        input_ids: golden.ids("input.input_ids", device),
        text_mask: golden.tensor("input.text_attention_mask", device),
        frequency_hz: golden.rows("frequency_hz", device),
        proprio: Some(golden.rows("proprio", device)),
        spaces: golden.space_of_rows(),
    }
}

/// Returns the mean loss over the valid entries.
fn loss(
    model: &Flower,
    obs: &Observation,
    actions: Tensor<3>,
    noise: Tensor<3>,
    t: Tensor<1>,
) -> (Tensor<1>, Tensor<3>) {
    let z = noisy_actions(actions.clone(), noise.clone(), t.clone());
    let velocity = model.velocity(&model.encode(obs, None), z, t, None);
    let valid = model.valid_mask(&obs.spaces, &actions.device());
    let sum = velocity_loss(velocity.clone(), noise, actions, valid.clone());
    (sum / valid.sum(), velocity)
}

pub(super) fn joined(golden: &Golden, device: &Device) {
    let device = device.clone().autodiff();
    let steps = golden.size("steps");
    let model = model(golden, &device);
    let input = |name: &str| -> Tensor<3> { golden.tensor(&format!("input.{name}"), &device) };

    let obs = observation(golden, &device);
    let images = model.encoder.image_tokens(obs.images.clone(), None);
    golden.output("image_tokens", images.clone());
    let content = model.encoder.content_mask(&obs, images.dims()[1]);
    golden.output("encoder_mask", content.clone());
    let (joined, _) = model.encoder.join(images, obs.input_ids.clone());
    golden.output("merged_embeds", joined.clone());
    golden.output(
        "features",
        model.encoder.encode(joined, None, &content, None),
    );
    let noise = input("sample_noise");
    let sampled = model.sample(&model.encode(&obs, None), noise, steps);
    golden.output("sampled_actions", sampled);
    let t: Tensor<1> = golden.tensor("input.t", &device);
    let (mean, velocity) = loss(&model, &obs, input("actions"), input("noise"), t);
    golden.output("velocity", velocity);
    golden.output("loss", mean.clone());
    let mut grads = mean.backward();
    for (name, grad) in model.take_gradients(&mut grads) {
        let stored = format!("grad.{name}");
        if golden.has(&stored) {
            golden.grad(&stored, grad.expect("a gradient"));
        }
    }

    check_finetune(golden, model, &obs, &device);
}

/// Runs the finetuning path over the same weights.
fn check_finetune(golden: &Golden, model: Flower, pretrain: &Observation, device: &Device) {
    let mut model = model;
    model.encoder.order = TokenOrder::ImagesFlowText;
    model.encoder.mask = EncoderMask::None;
    model.head.cross_mask = CrossAttentionMask::None;
    let batch = pretrain.spaces.len();
    let second: Tensor<5> = golden.tensor("input.image_second", device);
    let obs = Observation {
        images: Tensor::cat(vec![pretrain.images.clone(), second], 1),
        frequency_hz: Tensor::full([batch], FINETUNE_HZ, device),
        proprio: None,
        spaces: vec![finetune_space(&model.head); batch],
        ..pretrain.clone()
    };
    let images = model.encoder.image_tokens(obs.images.clone(), None);
    let content = model.encoder.content_mask(&obs, images.dims()[1]);
    let (joined, _) = model.encoder.join(images, obs.input_ids.clone());
    golden.output(
        "finetune_features",
        model.encoder.encode(joined, None, &content, None),
    );

    let input = |name: &str| {
        let tensor = golden.tensor::<3>(&format!("input.finetune_{name}"), device);
        pad(tensor, model.action_width())
    };
    let t: Tensor<1> = golden.tensor("input.finetune_t", device);
    let (mean, _) = loss(&model, &obs, input("actions"), input("noise"), t);
    golden.output("finetune_loss", mean.clone());
    let mut grads = mean.backward();
    for (name, grad) in model.take_gradients(&mut grads) {
        let stored = format!("grad_finetune.{name}");
        if golden.has(&stored) {
            golden.grad(&stored, grad.expect("a gradient"));
        }
    }
    let context = model.encode(&obs, None);
    let sampled = model.sample(&context, input("sample_noise"), golden.size("steps"));
    golden.output("finetune_sampled_actions", unpad(&model.head, sampled));
}
