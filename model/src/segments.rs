//! The training pass in segments: a backward pass that hands out gradients while it still runs.
//!
//! ```text
//! images -> vision blocks ... -> join -> text layers ... -> condition -> flow blocks ... -> velocity
//!        cut              cut        cut              cut             cut             cut
//! ```
//! At a cut the values go on as leaves of a tape of their own. Their gradients, once the later
//! segment is done, start the backward pass of the earlier one as those of (values * gradients).
//! The bits are those of one tape over all: every tensor that crosses a cut is used by one block
//! and handed on, so no sum of gradients changes its order.
//!
//! The blocks of a part that `model.recompute` names are segments of their own. Their forward pass
//! records nothing; the backward pass runs it again, with the same draws, and records.

mod state;

use std::ops::Range;

use burn::module::Module;
use burn::tensor::{Gradients, Int, Tensor};
use pollen_core::Seed;

use crate::bart_decoder::{BartDecoder, Decoded};
use crate::config::Part;
use crate::flat::Pending;
use crate::flow_transformer::Encoded;
use crate::flower::Flower;
use crate::fusion::all_cameras;
use crate::layers::like;
use crate::observation::{Observation, TrainMasks};
use crate::rows::RowGroups;
use crate::vision::{DepthKeep, channels_last};
use state::State;

/// Blocks or layers of a segment: few enough that the first gradients come early, many enough
/// that cuts cost nothing.
const BLOCKS_PER_SEGMENT: usize = 6;

/// A piece of the forward pass. Every parameter belongs to one.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    /// Blocks of the image tower, counted through all stages.
    Vision(Range<usize>),
    /// Projection of the images, token table, embedding of the joined sequence.
    Join,
    /// Layers of the text encoder.
    Language(Range<usize>),
    /// Embedding of the words that BART's decoder reads.
    Reread,
    /// Layers of BART's decoder.
    Decoder(Range<usize>),
    /// Projection of the context, conditioning vector, action encoders.
    Condition,
    /// Blocks of the flow transformer; the last of them with the action decoders.
    Flow(Range<usize>),
}

/// What segments read beside the state; none of it carries gradients.
#[derive(Debug)]
struct Inputs {
    cameras: usize,
    depth_keep: Option<DepthKeep>,
    token_keep: Option<Tensor<3>>,
    input_ids: Tensor<2, Int>,
    encoder_bias: Option<Tensor<4>>,
    context_BS: Tensor<2>,
    cross_bias: Option<Tensor<4>>,
    frequency_hz: Tensor<1>,
    proprio: Option<Tensor<2>>,
    spaces: Vec<usize>,
    groups: RowGroups,
    z: Tensor<3>,
    t: Tensor<1>,
    /// Of the encoder; none if it is frozen.
    encoder_dropout: Option<Seed>,
    dropout: Seed,
}

/// A segment after its forward pass.
struct Done {
    segment: Segment,
    /// Leaves of the segment's tape.
    input: State,
    /// Its results, on the segment's tape; none: to be computed again.
    output: Option<State>,
    parameters: Vec<Pending>,
}

/// A forward pass in training whose backward pass runs segment by segment.
pub struct SegmentedPass {
    model: Flower,
    inputs: Inputs,
    segments: Vec<Done>,
    velocity: Tensor<3>,
}

/// A backward pass in progress: an iterator over the gradients of one segment after another, the
/// last segment first. Every parameter of the model occurs once, with no gradient if it got none.
pub struct Backward {
    model: Flower,
    inputs: Inputs,
    segments: Vec<Done>,
    grads: Gradients,
    /// Leaves behind the next segment, whose gradients are in `grads`.
    leaves: State,
}

impl Flower {
    /// Predicts the velocity at the noisy chunk `z` and flow time `t` for training, with a tape
    /// per segment: the same bits as [`Flower::encode`] and [`Flower::velocity`] with `masks`.
    ///
    /// # Shapes
    /// `z: [B, H, A]`, `t: [B]`; see [`Observation`] and [`TrainMasks`]
    pub fn segments(
        &self,
        obs: &Observation,
        masks: &TrainMasks,
        z: Tensor<3>,
        t: Tensor<1>,
    ) -> SegmentedPass {
        self.segments_watched(obs, masks, z, t, &mut |_| {})
    }

    /// As [`Flower::segments`]; calls `done` with a part of the model whenever a piece of it has
    /// run. Joints between parts count to the part behind them.
    pub fn segments_watched(
        &self,
        obs: &Observation,
        masks: &TrainMasks,
        z: Tensor<3>,
        t: Tensor<1>,
        done: &mut dyn FnMut(Part),
    ) -> SegmentedPass {
        let inputs = self.inputs(obs, masks, z, t);
        let plan = self.plan();
        let parameters = self.parameters_of(&plan);
        let untrained = || self.clone().no_grad();
        let untrained = (!self.config().recompute.is_empty()).then(untrained);
        let mut state = State::Map(channels_last(all_cameras(
            self.in_precision(obs.images.clone()),
        )));
        let mut segments = Vec::with_capacity(plan.len());
        for (segment, parameters) in plan.into_iter().zip(parameters) {
            let input = state;
            let output;
            match &untrained {
                Some(untrained) if self.is_recomputed(&segment) => {
                    let trains = parameters.iter().any(|parameter| parameter.trained);
                    // What blocks hand on as it is stays as it was.
                    let [x, context, cond, global] = input.tracked();
                    let x = trains || x || context || cond || global;
                    state = untrained
                        .run(&segment, &inputs, input.leaves([false; 4]))
                        .leaves([x, context, cond, global]);
                    // Where nothing is trained the backward pass has nothing to compute again.
                    output = (!x).then(|| state.clone());
                }
                _ => {
                    let tracked = self.run(&segment, &inputs, input.clone());
                    state = tracked.leaves(tracked.tracked());
                    output = Some(tracked);
                }
            }
            done(segment.part_or_next());
            segments.push(Done {
                segment,
                input,
                output,
                parameters,
            });
        }
        let State::Velocity(velocity) = state else {
            unreachable!("the last segment returns a velocity");
        };
        SegmentedPass {
            model: self.clone(),
            inputs,
            segments,
            velocity,
        }
    }

    fn is_recomputed(&self, segment: &Segment) -> bool {
        segment
            .part()
            .is_some_and(|part| self.config().recompute.contains(&part))
    }

    fn inputs(&self, obs: &Observation, masks: &TrainMasks, z: Tensor<3>, t: Tensor<1>) -> Inputs {
        let cameras = obs.images.dims()[1];
        let image_tokens = cameras * self.config().vision.num_tokens();
        let content_BS = self.encoder.content_mask(obs, image_tokens);
        let context_BS = self
            .encoder
            .context_mask(content_BS.clone(), obs.text_mask.clone());
        let encoder_masks = self.encoder_masks(Some(masks));
        Inputs {
            cameras,
            depth_keep: self.encoder.depth_keep(cameras, encoder_masks),
            token_keep: masks.token_keep.clone(),
            input_ids: obs.input_ids.clone(),
            encoder_bias: self.encoder.bias(&content_BS),
            cross_bias: self.head.cross_bias(context_BS.clone()),
            context_BS,
            frequency_hz: obs.frequency_hz.clone(),
            proprio: obs.proprio.clone(),
            groups: RowGroups::new(&obs.spaces, &obs.images.device()),
            spaces: obs.spaces.clone(),
            z,
            t,
            encoder_dropout: encoder_masks.map(|masks| masks.dropout),
            dropout: masks.dropout,
        }
    }

    /// Lists the segments in the order of the forward pass.
    fn plan(&self) -> Vec<Segment> {
        let tower = &self.encoder.vision_tower;
        let cut = |part, blocks| {
            let recomputed = self.config().recompute.contains(&part);
            cut(blocks, if recomputed { 1 } else { BLOCKS_PER_SEGMENT })
        };
        let mut plan = Vec::new();
        for stage in 0..tower.num_stages() {
            let blocks = tower.first_block(stage)..tower.first_block(stage + 1);
            plan.extend(cut(Part::Vision, blocks).map(Segment::Vision));
        }
        plan.push(Segment::Join);
        let model = &self.encoder.language_model;
        plan.extend(cut(Part::Language, 0..model.num_layers()).map(Segment::Language));
        if let Some(decoder) = model.decoder() {
            plan.push(Segment::Reread);
            plan.extend(cut(Part::Language, 0..decoder.layers.len()).map(Segment::Decoder));
        }
        plan.push(Segment::Condition);
        let blocks = self.head.dit.len();
        plan.extend(cut(Part::Flow, 0..blocks).map(Segment::Flow));
        plan
    }

    /// Deals the parameters to the segments.
    fn parameters_of(&self, plan: &[Segment]) -> Vec<Vec<Pending>> {
        let mut dealt: Vec<Vec<Pending>> = plan.iter().map(|_| Vec::new()).collect();
        for pending in self.pending() {
            let unit = self.unit_of(&pending.name);
            let place = plan.iter().position(|segment| segment.holds(&unit));
            dealt[place.expect("the plan covers the whole model")].push(pending);
        }
        dealt
    }

    /// Returns the smallest segment that a parameter could be in.
    fn unit_of(&self, name: &str) -> Segment {
        let parts: Vec<&str> = name.split('.').collect();
        let number = |text: &str| -> usize { text.parse().expect("canonical names hold numbers") };
        let one = |first| first..first + 1;
        match parts[..] {
            ["vlm", "vision_tower", "convs", stage, ..] => {
                Segment::Vision(one(self.encoder.vision_tower.first_block(number(stage))))
            }
            ["vlm", "vision_tower", "blocks", stage, pair, kind, ..] => {
                let first = self.encoder.vision_tower.first_block(number(stage));
                let second = usize::from(kind == "channel_block");
                Segment::Vision(one(first + 2 * number(pair) + second))
            }
            ["vlm", "vision_model", "encoder", "layers", layer, ..] => {
                Segment::Vision(one(number(layer)))
            }
            ["vlm", "vision_model", "embeddings", ..] => Segment::Vision(one(0)),
            ["vlm", "vision_model", ..] => {
                Segment::Vision(one(self.encoder.vision_tower.num_blocks() - 1))
            }
            [
                "vlm",
                "language_model",
                "model",
                "encoder",
                "layers",
                layer,
                ..,
            ]
            | ["vlm", "text_model", "layers", layer, ..] => Segment::Language(one(number(layer))),
            ["vlm", "text_model", "norm", ..] => {
                Segment::Language(one(self.encoder.language_model.num_layers() - 1))
            }
            [
                "vlm",
                "language_model",
                "model",
                "decoder",
                "layers",
                layer,
                ..,
            ] => Segment::Decoder(one(number(layer))),
            ["vlm", "language_model", "model", "decoder", ..] => Segment::Reread,
            ["vlm" | "prompt_embeds", ..] => Segment::Join,
            ["dit", block, ..] => Segment::Flow(one(number(block))),
            ["action_decoders", ..] => Segment::Flow(one(self.head.dit.len() - 1)),
            _ => Segment::Condition,
        }
    }

    fn run(&self, segment: &Segment, inputs: &Inputs, state: State) -> State {
        match (segment, state) {
            (Segment::Vision(blocks), State::Map(map)) => {
                let tower = &self.encoder.vision_tower;
                let keep = inputs.depth_keep.as_ref();
                State::Map(tower.run_blocks(map, keep, blocks.clone()))
            }
            (Segment::Join, State::Map(map)) => {
                let images = self.encoder.project(map, inputs.cameras);
                let (joined, words) = self.encoder.join(images, inputs.input_ids.clone());
                let model = &self.encoder.language_model;
                State::Tokens(model.embed(joined, inputs.encoder_dropout), words)
            }
            (Segment::Language(layers), State::Tokens(tokens, words)) => {
                let model = &self.encoder.language_model;
                let bias = inputs.encoder_bias.as_ref();
                let seed = inputs.encoder_dropout;
                let tokens = model.run_layers(tokens, bias, seed, layers.clone());
                State::Tokens(tokens, words)
            }
            (Segment::Reread, State::Tokens(memory_BSD, Some(words))) => State::Decoded(Decoded {
                words_BTD: self.decoder().embed(words, inputs.encoder_dropout),
                memory_BSD,
            }),
            (Segment::Decoder(layers), State::Decoded(state)) => {
                let bias = inputs.encoder_bias.as_ref();
                let seed = inputs.encoder_dropout;
                let decoder = self.decoder();
                let state = decoder.run_layers(state, bias, seed, layers.clone());
                if layers.end < decoder.layers.len() {
                    return State::Decoded(state);
                }
                State::Tokens(state.words_BTD, None)
            }
            (Segment::Condition, State::Tokens(features, None)) => {
                let features = match &inputs.token_keep {
                    Some(keep) => {
                        let keep = like(keep.clone(), &features);
                        features * keep
                    }
                    None => features,
                };
                let context = self.head.context(Encoded {
                    features_BSC: features,
                    mask_BS: inputs.context_BS.clone(),
                    frequency_hz: inputs.frequency_hz.clone(),
                    proprio_BP: inputs.proprio.clone(),
                    spaces: &inputs.spaces,
                    dropout_seed: Some(inputs.dropout),
                });
                let (z, t) = (inputs.z.clone(), inputs.t.clone());
                State::Flow(Box::new(self.head.start(&context, z, t)))
            }
            (Segment::Flow(blocks), State::Flow(state)) => {
                let bias = inputs.cross_bias.as_ref();
                let seed = Some(inputs.dropout);
                let state = self.head.run_blocks(*state, bias, seed, blocks.clone());
                if blocks.end < self.head.dit.len() {
                    return State::Flow(Box::new(state));
                }
                State::Velocity(self.head.decode(&inputs.groups, state.x_BTD))
            }
            (segment, state) => unreachable!("{segment:?} does not follow on {state:?}"),
        }
    }
}

impl Flower {
    fn decoder(&self) -> &BartDecoder {
        let decoder = self.encoder.language_model.decoder();
        decoder.expect("only plans of models with a decoder have its segments")
    }
}

/// Cuts blocks into pieces of `count`.
fn cut(blocks: Range<usize>, count: usize) -> impl Iterator<Item = Range<usize>> {
    let end = blocks.end;
    blocks
        .step_by(count)
        .map(move |first| first..end.min(first + count))
}

impl Segment {
    /// Returns the part that a recipe may name; none for the joints between parts.
    fn part(&self) -> Option<Part> {
        match self {
            Self::Vision(_) => Some(Part::Vision),
            Self::Language(_) | Self::Decoder(_) => Some(Part::Language),
            Self::Flow(_) => Some(Part::Flow),
            Self::Join | Self::Reread | Self::Condition => None,
        }
    }

    /// Returns the part that the time of the segment counts to.
    fn part_or_next(&self) -> Part {
        self.part().unwrap_or(match self {
            Self::Condition => Part::Flow,
            _ => Part::Language,
        })
    }

    /// Returns whether the segment covers `unit`.
    fn holds(&self, unit: &Self) -> bool {
        let covers =
            |all: &Range<usize>, one: &Range<usize>| all.start <= one.start && one.end <= all.end;
        match (self, unit) {
            (Self::Vision(all), Self::Vision(one))
            | (Self::Language(all), Self::Language(one))
            | (Self::Decoder(all), Self::Decoder(one))
            | (Self::Flow(all), Self::Flow(one)) => covers(all, one),
            _ => self == unit,
        }
    }
}

impl SegmentedPass {
    /// Returns the velocity, `[B, H, A]`: the leaf to compute the loss from.
    pub fn velocity(&self) -> Tensor<3> {
        self.velocity.clone()
    }

    /// Starts the backward pass from a `loss` made of [`SegmentedPass::velocity`]. Each step of
    /// the iterator runs one segment.
    ///
    /// # Panics
    /// When the loss does not depend on the velocity, or nothing in the model is trained.
    pub fn backward(self, loss: &Tensor<1>) -> Backward {
        Backward {
            model: self.model,
            inputs: self.inputs,
            grads: loss.backward(),
            leaves: State::Velocity(self.velocity),
            segments: self.segments,
        }
    }
}

impl Backward {
    /// Returns the part of the model that the next step of the iterator works on.
    pub fn next_part(&self) -> Option<Part> {
        Some(self.segments.last()?.segment.part_or_next())
    }
}

impl Iterator for Backward {
    type Item = Vec<(String, Option<Tensor<1>>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let done = self.segments.pop()?;
        let again = || {
            self.model
                .run(&done.segment, &self.inputs, done.input.clone())
        };
        let output = done.output.unwrap_or_else(again);
        let root = output.root(&self.leaves, &mut self.grads);
        if let Some(root) = root.filter(Tensor::is_tracked) {
            self.grads = root.backward();
        }
        self.leaves = done.input;
        let parameters = done.parameters.into_iter();
        Some(parameters.map(|p| p.take(&mut self.grads)).collect())
    }
}

impl std::fmt::Debug for SegmentedPass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SegmentedPass")
            .field("segments", &self.segments.len())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Backward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backward")
            .field("segments", &self.segments.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FlowerConfig;
    use crate::testing::{bits, hold_generator, mini, mini_observation, space};
    use burn::module::{ModuleMapper, Param};
    use burn::tensor::{Device, TensorData};

    /// Several segments in each part, every dropout on.
    fn deep() -> FlowerConfig {
        let mut config = mini();
        config.vision.depths = vec![1, 4];
        config.vision.stochastic_depth = 0.5;
        config.language.layers = 7;
        config.language.dropout = 0.2;
        config.flow.layers = 8;
        config.flow.dropout_attention = 0.2;
        config.flow.dropout_residual = 0.1;
        config.flow.dropout_mlp = 0.1;
        config.flow.dropout_proprio = 0.1;
        config.token_dropout = 0.1;
        config
    }

    fn model(config: &FlowerConfig, device: &Device) -> Flower {
        let spaces = [
            space("eef_delta", 7, 0),
            space("bimanual_nav", 9, 4),
            space("absent", 3, 0),
        ];
        let model = config.init(&spaces, Seed::new(5), device).expect("valid");
        // The global modulation starts at zero and would hide its own gradients' way.
        model.with_flat_parameters(&mut |name| {
            let width = config.flow.width;
            name.starts_with("adaln.")
                .then(|| Tensor::full([9 * width * width], 0.01, &device.clone().inner()))
        })
    }

    fn random<const D: usize>(name: &str, shape: [usize; D], device: &Device) -> Tensor<D> {
        let mut values = vec![0.0; shape.iter().product()];
        Seed::new(11).child(name).draws().fill_normal(&mut values);
        Tensor::from_data(TensorData::new(values, shape), device)
    }

    fn masks(config: &FlowerConfig, obs: &Observation, device: &Device) -> TrainMasks {
        let batch = obs.spaces.len();
        let half = |x: Tensor<2>| x.greater_elem(0.0).float() * 2.0;
        let context = config.context_len(obs.input_ids.dims()[1]);
        let depth = half(random("depth", [batch, config.num_depth_blocks()], device));
        let width = config.language.width;
        let tokens = half(random("tokens", [batch, context * width], device));
        TrainMasks {
            dropout: Seed::new(3),
            depth_keep: Some(depth),
            token_keep: Some(tokens.reshape([batch, context, width])),
        }
    }

    impl Flower {
        fn recomputing(mut self, parts: [Part; 3]) -> Self {
            self.config.recompute = parts.into();
            self
        }
    }

    type Named = Vec<(String, Option<Vec<u32>>)>;

    fn named(gradients: Vec<(String, Option<Tensor<1>>)>) -> Named {
        let bits = |(name, grad): (String, Option<Tensor<1>>)| (name, grad.map(bits));
        gradients.into_iter().map(bits).collect()
    }

    /// Loss and gradients over one tape, and segment by segment.
    fn both(model: &Flower, device: &Device) -> [(Vec<u32>, Named); 2] {
        let obs = mini_observation(&[0, 1, 1, 0], device);
        let masks = masks(model.config(), &obs, device);
        let valid = model.valid_mask(&obs.spaces, device);
        let z = random("z", valid.dims(), device) * valid.clone();
        let target = random("target", valid.dims(), device);
        let t = Tensor::from_floats([0.2, 0.5, 0.9, 0.1], device);
        let loss = |velocity: Tensor<3>| {
            crate::velocity_loss(velocity, target.clone(), z.clone(), valid.clone())
        };

        let _held = hold_generator();
        let context = model.encode(&obs, Some(&masks));
        let whole = loss(model.velocity(&context, z.clone(), t.clone(), Some(&masks)));
        let mut grads = whole.backward();
        let expected = (bits(whole), named(model.take_gradients(&mut grads)));

        let pass = model.segments(&obs, &masks, z.clone(), t);
        let cut = loss(pass.velocity());
        let mut got: Named = pass.backward(&cut).flat_map(named).collect();
        got.sort();
        [expected, (bits(cut), got)]
    }

    #[track_caller]
    fn assert_same(whole: &(Vec<u32>, Named), cut: &(Vec<u32>, Named)) {
        assert_eq!(cut.0, whole.0, "loss");
        assert_eq!(cut.1.len(), whole.1.len(), "every parameter once");
        for (cut, whole) in cut.1.iter().zip(&whole.1) {
            assert!(cut == whole, "{} and {} differ", cut.0, whole.0);
        }
    }

    #[test]
    fn the_bits_are_those_of_one_backward() {
        let device = Device::flex().autodiff();
        let model = model(&deep(), &device);
        let [whole, cut] = both(&model, &device);
        assert_same(&whole, &cut);
        let absent = |name: &str| name.contains(".absent.");
        for (info, (name, grad)) in model.parameters().iter().zip(&whole.1) {
            assert_eq!(grad.is_some(), info.trained && !absent(name), "{name}");
        }
    }

    #[test]
    fn activations_that_are_computed_again_change_no_bit() {
        let device = Device::flex().autodiff();
        let parts = [Part::Vision, Part::Language, Part::Flow];
        let cases = [vec![parts[0]], vec![parts[1]], vec![parts[2]], parts.into()];
        for recompute in cases {
            let config = FlowerConfig {
                recompute: recompute.into_iter().collect(),
                ..deep()
            };
            let model = model(&config, &device);
            let segments = model.plan().len();
            assert!(segments > deep_plan(&device), "{segments} segments");
            let [whole, cut] = both(&model, &device);
            assert_same(&whole, &cut);
        }
    }

    fn deep_plan(device: &Device) -> usize {
        model(&deep(), device).plan().len()
    }

    #[test]
    fn gradients_arrive_from_the_end() {
        let device = Device::flex().autodiff();
        let model = model(&deep(), &device);
        let obs = mini_observation(&[0, 1], &device);
        let z = random("z", [2, 3, 9], &device);
        let t = Tensor::from_floats([0.2, 0.5], &device);
        let _held = hold_generator();
        let pass = model.segments(&obs, &TrainMasks::new(Seed::new(1)), z, t);
        let loss = pass.velocity().square().sum();
        let firsts: Vec<String> = pass
            .backward(&loss)
            .map(|segment| segment[0].0.clone())
            .collect();
        assert_eq!(firsts.len(), model.plan().len());
        let stage = |stage, pair| format!("vlm.vision_tower.blocks.{stage}.{pair}.");
        let starts = [
            "action_decoders.".to_owned(),
            "dit.0.".to_owned(),
            "action_encoders.".to_owned(),
            "vlm.language_model.model.encoder.layers.6.".to_owned(),
            "vlm.language_model.model.encoder.layers.0.".to_owned(),
            "prompt_embeds".to_owned(),
            stage(1, 3),
            stage(1, 0),
            stage(0, 0),
        ];
        for (first, start) in firsts.iter().zip(&starts) {
            assert!(first.starts_with(start), "{first} is not in {start}");
        }
        assert_eq!(firsts.len(), starts.len());
    }

    #[test]
    fn parts_are_told_in_order() {
        let device = Device::flex().autodiff();
        let model = model(&deep(), &device);
        let obs = mini_observation(&[0, 1], &device);
        let z = random("z", [2, 3, 9], &device);
        let t = Tensor::from_floats([0.2, 0.5], &device);
        let _held = hold_generator();
        let (masks, mut forward) = (TrainMasks::new(Seed::new(1)), Vec::new());
        let pass = model.segments_watched(&obs, &masks, z, t, &mut |part| forward.push(part));
        let loss = pass.velocity().square().sum();
        let mut backward = pass.backward(&loss);
        let mut told = Vec::new();
        while let Some(part) = backward.next_part() {
            told.push(part);
            backward.next();
        }
        let of = |part, count| std::iter::repeat_n(part, count);
        let want = of(Part::Vision, 3)
            .chain(of(Part::Language, 3))
            .chain(of(Part::Flow, 3));
        assert_eq!(forward, want.collect::<Vec<_>>());
        told.reverse();
        assert_eq!(told, forward);
    }

    /// Takes parameters out of training.
    struct Freeze {
        path: Vec<String>,
        frozen: fn(&str) -> bool,
    }

    impl ModuleMapper for Freeze {
        fn enter_module(&mut self, name: &str, _container_type: &str) {
            self.path.push(name.into());
        }

        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.path.pop();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if (self.frozen)(&self.path.join(".")) {
                return param.set_require_grad(false);
            }
            param
        }
    }

    #[test]
    fn frozen_parts_get_no_gradients_and_change_no_others() {
        let device = Device::flex().autodiff();
        let cases: [fn(&str) -> bool; 4] = [
            |path| path.starts_with("encoder."),
            |path| path.starts_with("encoder.vision_tower."),
            |path| path.starts_with("head."),
            |path| path.starts_with("encoder.language_model.") || path.starts_with("head.dit."),
        ];
        for (case, frozen) in cases.into_iter().enumerate() {
            let path = Vec::new();
            let model = model(&deep(), &device).map(&mut Freeze { path, frozen });
            let [whole, cut] = both(&model, &device);
            assert_same(&whole, &cut);
            let again = model
                .clone()
                .recomputing([Part::Vision, Part::Language, Part::Flow]);
            assert_same(&whole, &both(&again, &device)[1]);
            let trained = whole.1.iter().filter(|(_, grad)| grad.is_some()).count();
            assert!(0 < trained && trained < whole.1.len(), "case {case}");
        }
    }
}
