//! FLOWER: Florence-2's encoder and a rectified-flow transformer, in Burn and without a backend.
//! The device decides where it runs and whether gradients are recorded.
//!
//! ```text
//! images --VisionTower--> image tokens --+
//! <Flow> prompt vector ------------------+--Encoder--> features --norm, linear--> Context
//! text ids --token table-----------------+                                           |
//! noisy chunk, flow time --FlowTransformer (cross-attention to the context)--> velocity
//! noise --n Euler steps--> action chunk
//! ```
//!
//! | module | job |
//! |---|---|
//! | `config` | sizes and switches: the `[model]` table of a recipe |
//! | `parameters` | names, shapes and first values of all parameters |
//! | `cost` | work and memory by part |
//! | `flower` | the model as its users see it |
//! | `observation` | what it is given |
//! | `segments` | a forward pass in segments, whose backward finishes gradients one by one |
//! | `flat` | parameters and gradients as flat, named tensors |
//! | `names` | module paths to the names in published checkpoints |
//! | `vision` | DaViT or SigLIP, and the projection to tokens |
//! | `language`, `bart_decoder` | BART's encoder; its decoder, for late fusion |
//! | `llama` | a LLaMA-type decoder, for decoder-only vision-language models |
//! | `fusion` | joins and encodes images, prompt vector and text |
//! | `flow_transformer`, `flow_block` | conditioning, blocks, encoders and decoders per action space |
//! | `rows` | groups a batch by action space |
//! | `sinusoid`, `rope` | embeddings of time, frequency and position |
//! | `rectified_flow`, `sampler` | noisy actions and loss; Euler denoising |
//! | `layers`, `attention` | what the others are made of |
//! | `operations` | single operations at the model's shapes, for measuring |
//! | [`golden`] | comparison with the published code |
//! | `weights`, `init` | where parameters come from while the model is built |
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use pollen_model::{noisy_actions, velocity_loss};
//! let device = Device::flex();
//! let actions = Tensor::<3>::from_floats([[[0.5, -0.5]]], &device);
//! let noise = Tensor::<3>::from_floats([[[1.5, 0.5]]], &device);
//! let t = Tensor::<1>::from_floats([0.25], &device);
//! let noisy = noisy_actions(actions.clone(), noise.clone(), t);
//! assert_eq!(noisy.into_data().try_to_vec::<f32>().unwrap(), [0.75, -0.25]);
//! let velocity = noise.clone() - actions.clone();
//! let valid = actions.ones_like();
//! assert_eq!(velocity_loss(velocity, noise, actions, valid).into_scalar::<f32>(), 0.0);
//! ```

#![allow(
    non_snake_case,
    reason = "tensor names carry their axes, as in `noisy_BHA`"
)]

mod attention;
mod bart_decoder;
mod config;
mod cost;
mod error;
mod flat;
mod flow_block;
mod flow_transformer;
mod flower;
mod fusion;
pub mod golden;
mod init;
mod language;
mod layers;
mod llama;
mod names;
mod observation;
mod operations;
mod parameters;
mod rectified_flow;
mod rope;
mod rows;
mod sampler;
mod segments;
mod sinusoid;
mod vision;
mod weights;

#[cfg(test)]
mod interop;
#[cfg(test)]
mod precision;
#[cfg(test)]
mod switches;
#[cfg(test)]
mod testing;

pub use config::{
    CrossAttentionMask, DecoderConfig, EncoderMask, FlowConfig, FlowerConfig, Fusion,
    LanguageConfig, ModulationKind, NormVariant, Part, Precision, SiglipConfig, TokenOrder,
    VisionConfig,
};
pub use cost::{ModelCost, ModulationSaving, PartCost};
pub use error::Error;
pub use flat::ParameterInfo;
pub use flow_transformer::Context;
pub use flower::Flower;
pub use observation::{Observation, TrainMasks};
pub use operations::{Operation, OperationKind};
pub use parameters::{PROMPT, ParameterSpec, ParameterTable, TOKEN_TABLE};
pub use rectified_flow::{noisy_actions, velocity_loss};
pub use rope::tables as rope_tables;
pub use segments::{Backward, SegmentedPass};
