//! Image tower and text encoder against the published ones.

use burn::tensor::{Device, Tensor};

use super::Golden;
use crate::attention::hide;
use crate::config::{LanguageConfig, VisionConfig};
use crate::language::TextEncoder;
use crate::parameters::ParameterTable;
use crate::vision::{BranchKeep, ImageProjection, VisionTower, channels_last, frame_position};
use crate::weights::Weights;

impl Golden {
    /// Returns the sizes of the image tower.
    pub(super) fn vision_config(&self) -> VisionConfig {
        VisionConfig {
            image_size: self.size("px"),
            dims: self.sizes("dims"),
            heads: self.sizes("vheads"),
            groups: self.sizes("groups"),
            depths: self.sizes("depths"),
            window: self.size("window"),
            stochastic_depth: 0.0,
            siglip: None,
        }
    }

    /// Returns the sizes of the text encoder; `layers` and `heads` are the keys that hold them.
    pub(super) fn language_config(&self, layers: &str, heads: &str) -> LanguageConfig {
        LanguageConfig {
            width: self.size("d"),
            layers: self.size(layers),
            heads: self.size(heads),
            ffn: self.size("ffn"),
            vocab_size: self.shape("weight.vlm.language_model.model.shared.weight")[0],
            max_positions: self.size("maxpos"),
            dropout: 0.0,
            decoder: None,
        }
    }

    /// Compares the frame positions, of which the model computes the first row.
    pub(super) fn check_frame_positions(&self, device: &Device) {
        let name = "weight.vlm.visual_temporal_embed.pos_idx_to_embed";
        let row = super::values(frame_position(self.shape(name)[1], device));
        for (&a, &b) in row.iter().zip(self.numbers(name)) {
            assert_eq!(f64::from(a), b, "first row of {name}");
        }
    }
}

fn channels_first(x_BHWC: Tensor<4>) -> Tensor<4> {
    x_BHWC.permute([0, 3, 1, 2])
}

pub(super) fn tower(golden: &Golden, device: &Device) {
    let config = golden.vision_config();
    let mut table = ParameterTable::default();
    table.vision(&config, golden.size("d"));
    let mut source = |spec: &crate::ParameterSpec| golden.weight(spec);
    let mut weights = Weights::new(&table, &mut source, device);
    let tower = VisionTower::new(&mut weights, &config);
    let projection = ImageProjection::new(&mut weights);

    let images: Tensor<4> = golden.tensor("input.pixel_values", device);
    let mut x = images.clone().permute([0, 2, 3, 1]);
    for (stage, (conv, pairs)) in tower.convs.iter().zip(&tower.blocks).enumerate() {
        x = conv.forward(x);
        golden.output(&format!("stage{stage}_conv"), channels_first(x.clone()));
        for (i, pair) in pairs.iter().enumerate() {
            x = pair.spatial_block.forward(x, &BranchKeep::ALL);
            if i == 0 {
                let name = format!("stage{stage}_block0_spatial");
                golden.output(&name, channels_first(x.clone()));
            }
            x = pair.channel_block.forward(x, &BranchKeep::ALL);
        }
        golden.output(&format!("stage{stage}"), channels_first(x.clone()));
    }
    let blocks = 0..tower.first_block(config.depths.len());
    let map = tower.run_blocks(channels_last(images), None, blocks);
    golden.output("feature_map", channels_first(map.clone()));
    let tokens = projection.forward(map);
    assert_eq!(tokens.dims()[1], config.num_tokens());
    golden.output("tokens", tokens);
    golden.check_frame_positions(device);
}

pub(super) fn bart_encoder(golden: &Golden, device: &Device) {
    let config = golden.language_config("layers", "heads");
    let mut table = ParameterTable::default();
    table.language(&config);
    let mut source = |spec: &crate::ParameterSpec| golden.weight(spec);
    let model = TextEncoder::new(&mut Weights::new(&table, &mut source, device), &config);

    let ids = golden.ids("input.token_ids", device);
    golden.output("token_embeddings", model.token_embeddings(ids));
    let x: Tensor<3> = golden.tensor("input.inputs_embeds", device);
    let mask: Tensor<2> = golden.tensor("input.attention_mask", device);
    let embedded = model.encoder.embed(x.clone(), None);
    golden.output("after_embedding_norm", embedded.clone());
    let first = model.encoder.layers[0].forward(embedded, None, false);
    golden.output("after_layer0_no_mask", first);
    let ones = mask.ones_like();
    let encoded = model.encoder.forward(x.clone(), Some(&hide(ones)), None);
    golden.output("encoded_all_ones_mask", encoded);
    golden.output(
        "encoded_with_mask",
        model.encoder.forward(x, Some(&hide(mask)), None),
    );
}
