//! The flow transformer against the published one.

use burn::tensor::activation::silu;
use burn::tensor::{Device, Tensor};

use super::values;
use super::{Golden, pad};
use crate::attention::{causal, hide};
use crate::config::{CrossAttentionMask, NormVariant};
use crate::flat::pending;
use crate::flow_block::{FlowBlock, Shared, modulate};
use crate::flow_transformer::{Context, Encoded, FlowTransformer};
use crate::parameters::ParameterTable;
use crate::rectified_flow::{noisy_actions, velocity_loss};
use crate::rope::Rope;
use crate::sampler::times;
use crate::sinusoid::frequencies;
use crate::weights::Weights;

/// The control frequency that the finetuning code always feeds.
pub(super) const FINETUNE_HZ: f64 = 3.0;
/// The action space that the finetuning code always uses.
pub(super) const FINETUNE_SPACE: &str = "eef_delta";

fn block(golden: &Golden, norm: NormVariant, device: &Device) -> FlowBlock {
    let mut config = golden.flow_config("");
    config.norm = norm;
    let mut table = ParameterTable::default();
    table.flow_block(&config, "");
    let mut source = |spec: &crate::ParameterSpec| golden.weight(spec);
    FlowBlock::new(&mut Weights::new(&table, &mut source, device), "", &config)
}

pub(super) fn flow_block(golden: &Golden, device: &Device) {
    let config = golden.flow_config("");
    let rope = Rope::new(
        config.rope_theta,
        config.rope_table_len,
        config.head_dim(),
        device,
    );
    golden.output("rope_q", rope.rotate(golden.tensor("input.rope_q", device)));
    golden.output("rope_k", rope.rotate(golden.tensor("input.rope_k", device)));

    let x: Tensor<3> = golden.tensor("input.x", device);
    let global: Tensor<3> = golden.tensor("input.global_adaln", device);
    let [_, batch, width] = global.dims();
    let global = global
        .swap_dims(0, 1)
        .reshape([batch, 9 * width])
        .narrow(1, 0, 6 * width);
    let mask: Tensor<2> = golden.tensor("input.cross_mask_float", device);
    let keys = mask.dims()[1];
    let shared = |cross_bias: Option<Tensor<4>>, global: Option<Tensor<2>>| Shared {
        cond_BD: silu(golden.tensor("input.cond", device)),
        global,
        context_BSD: golden.tensor("input.context", device),
        cross_bias,
        causal_bias: causal(x.dims()[1], device),
        rope: &rope,
        train: false,
    };
    let plain = shared(None, Some(global.clone()));

    let published = block(golden, NormVariant::Rms, device);
    golden.output(
        "local_modulation",
        published.modulation.local(plain.cond_BD.clone()),
    );
    let modulation = published.modulation.forward(&plain);
    let normed = published.norm1.forward(x.clone());
    golden.output("norm1_of_x", normed.clone());
    let modulated = modulate(
        normed,
        modulation.shift_attention,
        modulation.scale_attention,
    );
    golden.output("modulated_norm1", modulated.clone());
    golden.output("self_attn", published.self_attn.forward(modulated, &plain));
    let normed = published.norm2.forward(x.clone());
    golden.output(
        "cross_attn_of_norm2",
        published.cross_attn.forward(normed, &plain),
    );
    golden.output("mlp_of_x", published.mlp.forward(x.clone(), false));

    golden.output("block", published.forward(x.clone(), &plain));
    golden.output(
        "block_no_global",
        published.forward(x.clone(), &shared(None, None)),
    );
    let additive = mask.clone().reshape([batch, 1, 1, keys]);
    let additive = shared(Some(additive), Some(global.clone()));
    golden.output(
        "block_additive_mask",
        published.forward(x.clone(), &additive),
    );
    let boolean = shared(Some(hide(mask)), Some(global));
    golden.output("block_boolean_mask", published.forward(x.clone(), &boolean));
    let variance = block(golden, NormVariant::Variance, device);
    golden.output("block_variance_norm", variance.forward(x.clone(), &plain));
    golden.check_tables(&config);
}

pub(super) fn sinusoids(golden: &Golden, device: &Device) {
    let number = |key: &str| golden.config[key].as_f64().expect("a number");
    for (name, base, scale, input) in [
        (
            "timestep",
            number("timestep_base"),
            number("timestep_scale"),
            "input.t",
        ),
        (
            "frequency",
            number("frequency_base"),
            1.0,
            "input.frequency_hz",
        ),
    ] {
        let table = frequencies(base, scale as f32);
        let stored = golden.numbers(&format!("weight.{name}_frequencies"));
        for (&a, &b) in table.iter().zip(stored) {
            let apart = a.to_bits().abs_diff((b as f32).to_bits());
            assert!(
                apart <= 1,
                "{name}: {a} is {apart} units in the last place from {b}"
            );
        }
        let rows = golden.numbers(input).len();
        let x: Tensor<1> = Tensor::from_floats(
            golden
                .numbers(input)
                .iter()
                .map(|&x| x as f32)
                .collect::<Vec<_>>()
                .as_slice(),
            device,
        );
        let half = table.len();
        let angles = x.reshape([rows, 1])
            * Tensor::<1>::from_floats(table.as_slice(), device).reshape([1, half]);
        let sinusoid = Tensor::cat(vec![angles.clone().cos(), angles.sin()], 1);
        golden.output(&format!("{name}_sinusoid"), sinusoid);
    }
}

/// The flow transformer of a file.
struct Head<'a> {
    golden: &'a Golden,
    device: Device,
    model: FlowTransformer,
}

impl<'a> Head<'a> {
    fn new(golden: &'a Golden, device: Device) -> Self {
        let config = golden.flow_config("dit.0.");
        let (spaces, _) = golden.spaces();
        let mut table = ParameterTable::default();
        table.flow(&config, golden.size("vlm"), &spaces);
        let mut source = |spec: &crate::ParameterSpec| golden.weight(spec);
        let mut weights = Weights::new(&table, &mut source, &device);
        let mask = CrossAttentionMask::Additive;
        let model = FlowTransformer::new(&mut weights, &config, mask, &spaces);
        golden.check_tables(&config);
        Self {
            golden,
            device,
            model,
        }
    }

    fn features(&self) -> Tensor<3> {
        self.golden.tensor("input.features", &self.device)
    }

    /// The pretraining path.
    fn context(&self, features: Tensor<3>) -> Context {
        self.model.context(Encoded {
            features_BSC: features,
            mask_BS: self.golden.tensor("input.attention_mask", &self.device),
            frequency_hz: self.golden.rows("frequency_hz", &self.device),
            proprio_BP: Some(self.golden.rows("proprio", &self.device)),
            spaces: &self.golden.space_of_rows(),
            dropout_seed: None,
        })
    }

    /// The same weights on the finetuning path, and a context for them.
    fn finetune(&self) -> (FlowTransformer, Context) {
        let mut model = self.model.clone();
        model.cross_mask = CrossAttentionMask::None;
        let features = self.features();
        let [batch, tokens, _] = features.dims();
        let space = finetune_space(&model);
        let context = model.context(Encoded {
            features_BSC: features,
            mask_BS: Tensor::ones([batch, tokens], &self.device),
            frequency_hz: Tensor::full([batch], FINETUNE_HZ, &self.device),
            proprio_BP: None,
            spaces: &vec![space; batch],
            dropout_seed: None,
        });
        (model, context)
    }
}

/// Returns the index of the finetuning code's action space.
pub(super) fn finetune_space(model: &FlowTransformer) -> usize {
    let names = model.space_names();
    names
        .iter()
        .position(|name| *name == FINETUNE_SPACE)
        .expect("the finetuning space")
}

/// Cuts the padding of the finetuning path off.
pub(super) fn unpad(model: &FlowTransformer, x: Tensor<3>) -> Tensor<3> {
    x.narrow(2, 0, model.spaces[finetune_space(model)].dim)
}

pub(super) fn dit(golden: &Golden, device: &Device) {
    let head = Head::new(golden, device.clone());
    let (model, device) = (&head.model, &head.device);
    let t: Tensor<1> = golden.tensor("input.t", device);
    let frequency: Tensor<1> = golden.rows("frequency_hz", device);
    golden.output("timestep_sinusoid", model.t_embedder.sinusoid(t.clone()));
    golden.output("timestep_embed", model.t_embedder.forward(t.clone()));
    golden.output(
        "frequency_sinusoid",
        model.frequency_embedder.sinusoid(frequency.clone()),
    );
    golden.output(
        "frequency_embed",
        model.frequency_embedder.forward(frequency.clone()),
    );
    let context = head.context(head.features());
    golden.output("context", context.tokens_BSD.clone());
    let proprio = model.proprio(&context.groups, golden.rows("proprio", device), false);
    golden.output("proprio_embed", proprio);
    let cond = model.conditioning(&context, t.clone());
    golden.output("global_cond", cond.clone());
    let [batch, width] = cond.dims();
    let global = model.global_modulation(&context.groups, cond.clone());
    golden.output(
        "global_adaln",
        global.reshape([batch, 9, width]).swap_dims(0, 1),
    );
    let z: Tensor<3> = golden.tensor("input.z", device);
    let tokens = model.encode_actions(&context.groups, z.clone());
    golden.output("action_tokens", tokens);
    let state = model.start(&context, z.clone(), t.clone());
    let bias = context.cross_bias.as_ref();
    let state = model.run_blocks(state, bias, None, 0..model.dit.len());
    golden.output("dit_out", state.x_BTD);
    golden.output("velocity", model.velocity(&context, z, t.clone(), None));
    golden.output(
        "action_space_embed_unused",
        model.action_space_embedder.forward(&golden.space_of_rows()),
    );

    let (tuned, context) = head.finetune();
    let constant = Tensor::full_like(&frequency, FINETUNE_HZ);
    golden.output(
        "finetune_frequency_embed",
        tuned.frequency_embedder.forward(constant),
    );
    let z = pad(
        golden.tensor("input.finetune_z", device),
        tuned.action_width(),
    );
    let velocity = tuned.velocity(&context, z, t, None);
    golden.output("finetune_velocity", unpad(&tuned, velocity));
}

pub(super) fn flow_loss(golden: &Golden, device: &Device) {
    let head = Head::new(golden, device.clone().autodiff());
    let device = &head.device;
    let input = |name: &str| -> Tensor<3> { golden.tensor(&format!("input.{name}"), device) };

    let features = head.features().require_grad();
    let context = head.context(features.clone());
    let (actions, noise) = (input("actions"), input("noise"));
    let t: Tensor<1> = golden.tensor("input.t", device);
    let z = noisy_actions(actions.clone(), noise.clone(), t.clone());
    golden.output("z_t", z.clone());
    let velocity = head.model.velocity(&context, z.clone(), t, None);
    golden.output("velocity", velocity.clone());
    let valid = head.model.valid_mask(&context.spaces, z.dims()[1], device);
    golden.output("valid_mask", valid.clone());
    let loss = velocity_loss(velocity, noise, actions, valid.clone()) / valid.sum();
    golden.output("loss", loss.clone());

    let mut grads = loss.backward();
    golden.grad("grad.features", features.grad(&grads).expect("a gradient"));
    let names = head.model.space_names();
    let mut norm = Tensor::<1>::zeros([1], &device.clone().inner());
    for parameter in pending(&head.model, &names) {
        let (name, grad) = parameter.take(&mut grads);
        let stored = format!("grad.{name}");
        let Some(grad) = grad else {
            assert!(!golden.has(&stored), "{name} has no gradient");
            continue;
        };
        if name.starts_with("dit.") {
            norm = norm + grad.clone().square().sum();
        }
        if name.starts_with("adaln.") {
            let count = grad.dims()[0];
            let unused = grad.clone().narrow(0, count / 3 * 2, count / 3);
            assert!(
                values(unused).iter().all(|&x| x == 0.0),
                "{name} beyond 6 vectors"
            );
        }
        golden.grad(&stored, grad);
    }
    golden.output("grad_norm_dit_only", norm.sqrt());

    let (tuned, context) = head.finetune();
    let width = tuned.action_width();
    let (actions, noise) = (input("finetune_actions"), input("finetune_noise"));
    let (actions, noise) = (pad(actions, width), pad(noise, width));
    let t: Tensor<1> = golden.tensor("input.finetune_t", device);
    let z = noisy_actions(actions.clone(), noise.clone(), t.clone());
    let valid = tuned.valid_mask(&context.spaces, z.dims()[1], device);
    let velocity = tuned.velocity(&context, z, t, None);
    let loss = velocity_loss(velocity, noise, actions, valid.clone()) / valid.sum();
    golden.output("finetune_loss", loss.clone());
    let mut grads = loss.backward();
    for parameter in pending(&tuned, &names) {
        let (name, grad) = parameter.take(&mut grads);
        let stored = format!("grad_finetune.{name}");
        if golden.has(&stored) {
            golden.grad(&stored, grad.expect("a gradient"));
        }
    }
}

pub(super) fn sampler(golden: &Golden, device: &Device) {
    let head = Head::new(golden, device.clone());
    let (model, device) = (&head.model, &head.device);
    let steps = golden.size("steps");
    let noise: Tensor<3> = golden.tensor("input.noise", device);
    let context = head.context(head.features());
    let mut z = model.zero_padding(&context, noise.clone());
    let mut trajectory = vec![z.clone()];
    for t in times(steps) {
        z = model.euler_step(&context, z, t, steps);
        trajectory.push(z.clone());
    }
    golden.output("trajectory", Tensor::stack::<4>(trajectory, 0));
    golden.output("actions", model.sample(&context, noise, steps));

    let (tuned, context) = head.finetune();
    let noise = pad(
        golden.tensor("input.finetune_noise", device),
        tuned.action_width(),
    );
    let batch = noise.dims()[0];
    let (mut inputs, mut all_times, mut z) = (Vec::new(), Vec::new(), noise.clone());
    for t in times(steps) {
        inputs.push(unpad(&tuned, z.clone()));
        all_times.push(Tensor::<1>::full([batch], t, device));
        z = tuned.euler_step(&context, z, t, steps);
    }
    golden.output("finetune_times", Tensor::stack::<2>(all_times, 0));
    golden.output("finetune_trajectory_inputs", Tensor::stack::<4>(inputs, 0));
    let actions = tuned.sample(&context, noise.clone(), steps);
    golden.output("finetune_actions", unpad(&tuned, actions));
    let actions = tuned.sample(&context, noise, 5);
    golden.output("finetune_actions_5_steps", unpad(&tuned, actions));
}
