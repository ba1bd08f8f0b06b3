//! The flow transformer: context and a noisy action chunk in, a velocity out.
//!
//! Legend: B batch, T steps of the chunk, A padded action width, S context tokens, D width,
//! P proprioception.

use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::activation::silu;
use burn::tensor::{DType, Tensor};
use pollen_core::{ActionSpace, Seed};

use crate::attention::{causal, hide};
use crate::config::{CrossAttentionMask, FlowConfig, ModulationKind};
use crate::flow_block::{FlowBlock, Shared};
use crate::layers::{Linear, Mlp, RmsNorm, dropout, fork, like, reseed, stateless_norm, to};
use crate::rope::Rope;
use crate::rows::RowGroups;
use crate::sinusoid::SinusoidEmbedder;
use crate::weights::Weights;

/// What of an action space the model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpaceShape {
    pub(crate) name: String,
    pub(crate) dim: usize,
    pub(crate) proprio_dim: usize,
}

impl From<&ActionSpace> for SpaceShape {
    fn from(space: &ActionSpace) -> Self {
        Self {
            name: space.name.clone(),
            dim: space.dim(),
            proprio_dim: space.proprio_dim,
        }
    }
}

/// An observation after encoding: all that the sampler needs and that does not depend on flow
/// time.
#[derive(Clone, Debug)]
pub struct Context {
    /// `[B, S, D]`, after norm and projection.
    pub(crate) tokens_BSD: Tensor<3>,
    /// `[B, 1, 1, S]`, added to the cross-attention logits.
    pub(crate) cross_bias: Option<Tensor<4>>,
    /// `[B, D]`, the normalised embeddings of frequency and proprioception.
    pub(crate) conditioning_BD: Tensor<2>,
    pub(crate) groups: RowGroups,
    pub(crate) spaces: Vec<usize>,
}

/// An encoded observation and what goes with it, before the projection.
#[derive(Debug)]
pub(crate) struct Encoded<'a> {
    /// `[B, S, C]`, C: width of the encoder.
    pub(crate) features_BSC: Tensor<3>,
    /// `[B, S]`, 0 where the encoder saw nothing of use.
    pub(crate) mask_BS: Tensor<2>,
    /// `[B]`
    pub(crate) frequency_hz: Tensor<1>,
    /// `[B, P]`
    pub(crate) proprio_BP: Option<Tensor<2>>,
    pub(crate) spaces: &'a [usize],
    /// Of the dropouts; none: evaluation.
    pub(crate) dropout_seed: Option<Seed>,
}

/// What the blocks hand from one to the next; all of it carries gradients.
#[derive(Clone, Debug)]
pub(crate) struct FlowState {
    /// Action tokens, `[B, T, D]`.
    pub(crate) x_BTD: Tensor<3>,
    /// `[B, S, D]`
    pub(crate) context_BSD: Tensor<3>,
    /// SiLU of the conditioning vector, `[B, D]`.
    pub(crate) cond_BD: Tensor<2>,
    /// The action space's modulation, `[B, 6 D]`, if there is one.
    pub(crate) global: Option<Tensor<2>>,
}

/// Present in published weights; its output is used nowhere.
#[derive(Module, Debug)]
pub(crate) struct ActionSpaceEmbedder {
    pub(crate) action_embeddings: Param<Tensor<2>>,
    pub(crate) first: Linear,
    pub(crate) second: Linear,
}

impl ActionSpaceEmbedder {
    /// Embeds the action space of each sample, `[B, D]`.
    pub(crate) fn forward(&self, spaces: &[usize]) -> Tensor<2> {
        let rows = spaces
            .iter()
            .map(|&space| self.action_embeddings.val().narrow(0, space, 1))
            .collect();
        self.second
            .forward(silu(self.first.forward(Tensor::cat(rows, 0))))
    }
}

/// The flow transformer.
#[derive(Module, Debug)]
pub(crate) struct FlowTransformer {
    pub(crate) dit: Vec<FlowBlock>,
    pub(crate) t_embedder: SinusoidEmbedder,
    pub(crate) frequency_embedder: SinusoidEmbedder,
    pub(crate) action_space_embedder: ActionSpaceEmbedder,
    pub(crate) cond_norm: RmsNorm,
    pub(crate) cond_linear: Linear,
    pub(crate) adaln: Vec<Linear>,
    pub(crate) action_encoders: Vec<Mlp>,
    pub(crate) action_decoders: Vec<Linear>,
    pub(crate) proprio_encoders: Vec<Option<Mlp>>,
    pub(crate) rope: Rope,
    #[module(skip)]
    pub(crate) spaces: Vec<SpaceShape>,
    #[module(skip)]
    pub(crate) cross_mask: CrossAttentionMask,
    width: usize,
    dropout_proprio: f64,
}

impl FlowTransformer {
    pub(crate) fn new(
        weights: &mut Weights,
        config: &FlowConfig,
        cross_mask: CrossAttentionMask,
        spaces: &[ActionSpace],
    ) -> Self {
        let spaces: Vec<SpaceShape> = spaces.iter().map(SpaceShape::from).collect();
        let dit = (0..config.layers)
            .map(|layer| FlowBlock::new(weights, &format!("dit.{layer}."), config))
            .collect();
        let device = weights.device().clone();
        let embeddings = "action_space_embedder.action_embeddings";
        Self {
            dit,
            t_embedder: SinusoidEmbedder::new(weights, "t_embedder", 10_000.0, 1000.0),
            frequency_embedder: SinusoidEmbedder::new(weights, "frequency_embedder", 1000.0, 1.0),
            action_space_embedder: ActionSpaceEmbedder {
                action_embeddings: weights.param(embeddings),
                first: Linear::new(weights, "action_space_embedder.mlp.0"),
                second: Linear::new(weights, "action_space_embedder.mlp.2"),
            },
            cond_norm: RmsNorm::new(weights, "cond_norm", config.norm),
            cond_linear: Linear::new(weights, "cond_linear"),
            adaln: match config.modulation {
                ModulationKind::GlobalAdaln => per_space(&spaces, |s| {
                    Linear::new(weights, &format!("adaln.{s}.modCX.1"))
                }),
                ModulationKind::AdalnZero => Vec::new(),
            },
            action_encoders: per_space(&spaces, |s| {
                Mlp::new(weights, &format!("action_encoders.{s}"))
            }),
            action_decoders: per_space(&spaces, |s| {
                Linear::new(weights, &format!("action_decoders.{s}"))
            }),
            proprio_encoders: spaces
                .iter()
                .map(|space| {
                    let path = format!("proprio_encoders.{}", space.name);
                    weights
                        .has(&format!("{path}.fc1.weight"))
                        .then(|| Mlp::new(weights, &path))
                })
                .collect(),
            rope: Rope::new(
                config.rope_theta,
                config.rope_table_len,
                config.head_dim(),
                &device,
            ),
            spaces,
            cross_mask,
            width: config.width,
            dropout_proprio: config.dropout_proprio,
        }
    }

    /// Returns the names of the action spaces, in order.
    pub(crate) fn space_names(&self) -> Vec<&str> {
        self.spaces
            .iter()
            .map(|space| space.name.as_str())
            .collect()
    }

    /// Returns the width that actions of all spaces are padded to.
    pub(crate) fn action_width(&self) -> usize {
        self.spaces
            .iter()
            .map(|space| space.dim)
            .max()
            .expect("a model has at least one action space")
    }

    /// Projects the features and embeds what does not depend on flow time.
    pub(crate) fn context(&self, inputs: Encoded) -> Context {
        let device = inputs.features_BSC.device();
        let groups = RowGroups::new(inputs.spaces, &device);
        let cross_bias = self.cross_bias(inputs.mask_BS);
        let tokens_BSD = self
            .cond_linear
            .forward(self.cond_norm.forward(inputs.features_BSC));
        let mut conditioning_BD =
            stateless_norm(self.frequency_embedder.forward(inputs.frequency_hz));
        if let Some(proprio_BP) = inputs.proprio_BP
            && groups.spaces().any(|s| self.proprio_encoders[s].is_some())
        {
            let seed = inputs.dropout_seed.map(|seed| seed.child("proprio"));
            reseed(&device, seed);
            let embedded = self.proprio(&groups, proprio_BP, seed.is_some());
            conditioning_BD = conditioning_BD + stateless_norm(embedded);
        }
        Context {
            tokens_BSD,
            cross_bias,
            conditioning_BD,
            groups,
            spaces: inputs.spaces.to_vec(),
        }
    }

    /// Returns what is added to the logits of the cross-attention for a context of which `mask_BS`
    /// says what is of use, `[B, S] -> [B, 1, 1, S]`.
    pub(crate) fn cross_bias(&self, mask_BS: Tensor<2>) -> Option<Tensor<4>> {
        match self.cross_mask {
            CrossAttentionMask::None => None,
            CrossAttentionMask::Boolean => Some(hide(mask_BS)),
            CrossAttentionMask::Additive => {
                let [batch, tokens] = mask_BS.dims();
                Some(mask_BS.reshape([batch, 1, 1, tokens]))
            }
        }
    }

    /// Encodes proprioception; zero in the spaces that have no encoder.
    ///
    /// # Shapes
    /// `[B, P] -> [B, D]`
    pub(crate) fn proprio(
        &self,
        groups: &RowGroups,
        proprio_BP: Tensor<2>,
        train: bool,
    ) -> Tensor<2> {
        groups.map(proprio_BP, |space, rows| {
            match &self.proprio_encoders[space] {
                Some(encoder) => {
                    let inputs = rows.narrow(1, 0, self.spaces[space].proprio_dim);
                    let output = encoder.forward(inputs, self.dropout_proprio, train);
                    dropout(output, self.dropout_proprio, train)
                }
                None => Tensor::zeros([rows.dims()[0], self.width], &rows.device()),
            }
        })
    }

    /// Returns the conditioning vector of time, frequency and proprioception, `[B, D]`.
    pub(crate) fn conditioning(&self, context: &Context, t: Tensor<1>) -> Tensor<2> {
        stateless_norm(self.t_embedder.forward(t)) + context.conditioning_BD.clone()
    }

    /// Returns the modulation of each sample's action space, `[B, D] -> [B, 9 D]`.
    pub(crate) fn global_modulation(&self, groups: &RowGroups, cond_BD: Tensor<2>) -> Tensor<2> {
        groups.map(silu(cond_BD), |space, rows| self.adaln[space].forward(rows))
    }

    /// Encodes a chunk, `[B, T, A] -> [B, T, D]`.
    pub(crate) fn encode_actions(&self, groups: &RowGroups, z_BTA: Tensor<3>) -> Tensor<3> {
        groups.map(z_BTA, |space, rows| {
            let rows = rows.narrow(2, 0, self.spaces[space].dim);
            self.action_encoders[space].forward(rows, 0.0, false)
        })
    }

    /// Returns the state before the first block.
    pub(crate) fn start(&self, context: &Context, z_BTA: Tensor<3>, t: Tensor<1>) -> FlowState {
        // Time and frequency are embedded in f32, whatever the blocks compute in.
        let cond_BD = like(self.conditioning(context, t), &context.tokens_BSD);
        let z_BTA = like(z_BTA, &context.tokens_BSD);
        // Of the nine vectors that published weights produce, the blocks use six.
        let global = (!self.adaln.is_empty()).then(|| {
            self.global_modulation(&context.groups, cond_BD.clone())
                .narrow(1, 0, 6 * self.width)
        });
        FlowState {
            x_BTD: self.encode_actions(&context.groups, z_BTA),
            context_BSD: context.tokens_BSD.clone(),
            cond_BD: silu(cond_BD),
            global,
        }
    }

    /// Runs some of the blocks. Each draws its dropout from a seed of its own.
    pub(crate) fn run_blocks(
        &self,
        state: FlowState,
        cross_bias: Option<&Tensor<4>>,
        dropout_seed: Option<Seed>,
        range: Range<usize>,
    ) -> FlowState {
        let causal_bias = causal(state.x_BTD.dims()[1], &state.x_BTD.device());
        range.fold(state, |state, block| {
            let seed = dropout_seed.map(|seed| seed.child("block").index(block as u64));
            reseed(&causal_bias.device(), seed);
            let (context_BSD, next_context) = fork(state.context_BSD);
            let (cond_BD, next_cond) = fork(state.cond_BD);
            let (global, next_global) = state.global.map(fork).unzip();
            let shared = Shared {
                cond_BD,
                global,
                context_BSD,
                cross_bias: cross_bias.cloned(),
                causal_bias: causal_bias.clone(),
                rope: &self.rope,
                train: seed.is_some(),
            };
            FlowState {
                x_BTD: self.dit[block].forward(state.x_BTD, &shared),
                context_BSD: next_context,
                cond_BD: next_cond,
                global: next_global,
            }
        })
    }

    /// Decodes to actions in f32, zero beyond each space, `[B, T, D] -> [B, T, A]`.
    pub(crate) fn decode(&self, groups: &RowGroups, x_BTD: Tensor<3>) -> Tensor<3> {
        let width = self.action_width();
        groups.map(x_BTD, |space, rows| {
            let actions = to(self.action_decoders[space].forward(rows), DType::F32);
            let [batch, horizon, dim] = actions.dims();
            if dim == width {
                return actions;
            }
            let padding = Tensor::zeros([batch, horizon, width - dim], &actions.device());
            Tensor::cat(vec![actions, padding], 2)
        })
    }

    /// Returns the velocity at the noisy chunk `z` and flow time `t`. With a seed the dropouts act.
    ///
    /// # Shapes
    /// `z_BTA: [B, T, A]`, `t: [B]` -> `[B, T, A]`
    pub(crate) fn velocity(
        &self,
        context: &Context,
        z_BTA: Tensor<3>,
        t: Tensor<1>,
        dropout_seed: Option<Seed>,
    ) -> Tensor<3> {
        let state = self.start(context, z_BTA, t);
        let bias = context.cross_bias.as_ref();
        let state = self.run_blocks(state, bias, dropout_seed, 0..self.dit.len());
        self.decode(&context.groups, state.x_BTD)
    }
}

fn per_space<M>(spaces: &[SpaceShape], mut build: impl FnMut(&str) -> M) -> Vec<M> {
    spaces.iter().map(|space| build(&space.name)).collect()
}
