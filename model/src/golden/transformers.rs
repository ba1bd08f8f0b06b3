//! The language layers of decoder-only models and BART's decoder against those of transformers
//! (`tests/golden/scripts/transformers_vlm.py`).

use burn::tensor::{Device, Tensor};
use pollen_core::Seed;

use super::{Golden, space, values};
use crate::ParameterSpec;
use crate::attention::hide;
use crate::bart_decoder::{BartDecoder, Decoded};
use crate::config::{
    CrossAttentionMask, DecoderConfig, EncoderMask, FlowConfig, FlowerConfig, Fusion,
    LanguageConfig, ModulationKind, NormVariant, SiglipConfig, TokenOrder, VisionConfig,
};
use crate::fusion::JointEncoder;
use crate::init;
use crate::observation::Observation;
use crate::parameters::ParameterTable;
use crate::weights::Weights;

impl Golden {
    fn number(&self, key: &str) -> f64 {
        self.config[key].as_f64().expect("a number")
    }
}

/// A model with the file's image tower and decoder.
fn smolvlm_config(golden: &Golden, fusion: Fusion) -> FlowerConfig {
    FlowerConfig {
        num_cameras: 2,
        fusion,
        vision: VisionConfig {
            image_size: golden.size("px"),
            dims: vec![golden.size("vision_width")],
            heads: vec![golden.size("vision_heads")],
            groups: Vec::new(),
            depths: vec![golden.size("vision_layers")],
            window: 0,
            stochastic_depth: 0.0,
            siglip: Some(SiglipConfig {
                patch: golden.size("patch"),
                ffn: golden.size("vision_ffn"),
                pixel_shuffle: golden.size("pixel_shuffle"),
                norm_eps: golden.number("vision_eps"),
            }),
        },
        language: LanguageConfig {
            width: golden.size("d"),
            layers: golden.size("layers"),
            heads: golden.size("heads"),
            ffn: golden.size("ffn"),
            vocab_size: golden.size("vocab"),
            max_positions: 64,
            dropout: 0.0,
            decoder: Some(DecoderConfig {
                kv_heads: golden.size("kv_heads"),
                head_dim: golden.size("head_dim"),
                rope_theta: golden.number("theta"),
                norm_eps: golden.number("eps"),
                dropped_share: 0.3,
            }),
        },
        token_order: TokenOrder::FlowImagesText,
        encoder_mask: EncoderMask::TextAndFlow,
        cross_attention_mask: CrossAttentionMask::Boolean,
        token_dropout: 0.0,
        proprioception: true,
        frozen: Vec::new(),
        recompute: [].into(),
        // Never built: the file holds the vision-language model alone.
        flow: FlowConfig {
            width: 24,
            heads: 2,
            layers: 1,
            modulation: ModulationKind::GlobalAdaln,
            modulation_rank: 4,
            rope_theta: 1000.0,
            rope_table_len: 4,
            action_horizon: 3,
            dropout_attention: 0.0,
            dropout_residual: 0.0,
            dropout_mlp: 0.0,
            dropout_proprio: 0.0,
            norm: NormVariant::Rms,
        },
    }
}

pub(super) fn smolvlm(golden: &Golden, device: &Device) {
    for fusion in [Fusion::Early, Fusion::Intermediate, Fusion::Late] {
        let config = smolvlm_config(golden, fusion);
        assert!(config.validate().is_empty(), "{:?}", config.validate());
        let spaces = [space("eef_delta", 7, 0)];
        let table = config.parameter_table(&spaces).expect("valid");
        // Everything but the head is in the file, under the same name and in the same shape.
        let mut source = |spec: &ParameterSpec| {
            if spec.name.starts_with("vlm.") || spec.name == "prompt_embeds" {
                golden.weight(spec)
            } else {
                init::draw(spec, &table, Seed::new(1))
            }
        };
        let encoder = JointEncoder::new(&mut Weights::new(&table, &mut source, device), &config);
        let text_mask: Tensor<2> = golden.tensor("input.text_mask", device);
        let batch = text_mask.dims()[0];
        let obs = Observation {
            images: golden.tensor("input.images", device),
            camera_present: Some(golden.tensor("input.camera_present", device)),
            input_ids: golden.ids("input.ids", device),
            text_mask,
            frequency_hz: Tensor::ones([batch], device),
            proprio: None,
            spaces: vec![0; batch],
        };
        let images = encoder.image_tokens(obs.images.clone(), None);
        let content = encoder.content_mask(&obs, images.dims()[1]);
        let (joined, words) = encoder.join(images.clone(), obs.input_ids.clone());
        assert_eq!(
            joined.dims()[1],
            config.context_len(obs.input_ids.dims()[1])
        );
        let features = encoder.encode(joined.clone(), words, &content, None);
        match fusion {
            Fusion::Early => {
                golden.output("image_tokens", images);
                golden.output("joined", features);
                let flat = crate::fusion::all_cameras(obs.images.clone());
                let map = encoder.vision_tower.forward(flat, None);
                golden.output("vision_features", map);
            }
            Fusion::Intermediate => {
                let kept = golden.size("kept");
                assert_eq!(encoder.language_model.num_layers(), kept);
                let bias = encoder.bias(&content);
                let first = encoder
                    .language_model
                    .run_layers(joined, bias.as_ref(), None, 0..1);
                golden.output("after_layer0", first);
                golden.output("intermediate", features);
            }
            Fusion::Late => golden.output("late", features),
        }
    }
}

pub(super) fn bart_decoder(golden: &Golden, device: &Device) {
    let config = LanguageConfig {
        width: golden.size("d"),
        layers: golden.size("layers"),
        heads: golden.size("heads"),
        ffn: golden.size("ffn"),
        vocab_size: 1,
        max_positions: golden.size("maxpos"),
        dropout: 0.0,
        decoder: None,
    };
    let mut table = ParameterTable::default();
    table.bart_decoder(&config);
    let mut source = |spec: &ParameterSpec| golden.weight(spec);
    let decoder = BartDecoder::new(&mut Weights::new(&table, &mut source, device), &config);
    let embedded = decoder.embed(golden.tensor("input.words", device), None);
    golden.output("after_embedding_norm", embedded.clone());
    let state = Decoded {
        words_BTD: embedded,
        memory_BSD: golden.tensor("input.memory", device),
    };
    let layers = 0..decoder.layers.len();
    let run = |bias: Option<Tensor<4>>| {
        decoder
            .run_layers(state.clone(), bias.as_ref(), None, layers.clone())
            .words_BTD
    };
    let masked = run(Some(hide(golden.tensor("input.memory_mask", device))));
    assert_ne!(values(masked.clone()), values(run(None)));
    golden.output("decoded_with_mask", masked);
    golden.output("decoded", run(None));
}
