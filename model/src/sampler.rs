//! Euler sampler: from noise at flow time 1 to actions at 0.

use burn::tensor::Tensor;

use crate::flow_transformer::{Context, FlowTransformer};

impl FlowTransformer {
    /// Sets the dimensions beyond each sample's action space to zero; the velocity is zero there,
    /// so they stay zero over all steps.
    ///
    /// # Shapes
    /// `[B, H, A] -> [B, H, A]`
    pub(crate) fn zero_padding(&self, context: &Context, z_BHA: Tensor<3>) -> Tensor<3> {
        let horizon = z_BHA.dims()[1];
        let valid = self.valid_mask(&context.spaces, horizon, &z_BHA.device());
        z_BHA * valid
    }

    /// Takes one Euler step of `1 / steps` from flow time `t`.
    ///
    /// # Shapes
    /// `[B, H, A] -> [B, H, A]`
    pub(crate) fn euler_step(
        &self,
        context: &Context,
        z_BHA: Tensor<3>,
        t: f32,
        steps: usize,
    ) -> Tensor<3> {
        let batch = z_BHA.dims()[0];
        let t = Tensor::full([batch], t, &z_BHA.device());
        let velocity = self.velocity(context, z_BHA.clone(), t, None);
        z_BHA - velocity / steps as f64
    }

    /// Denoises `noise` in `steps` steps and clamps the result to [-1, 1].
    ///
    /// # Shapes
    /// `[B, H, A] -> [B, H, A]`
    pub(crate) fn sample(&self, context: &Context, noise: Tensor<3>, steps: usize) -> Tensor<3> {
        let mut z_BHA = self.zero_padding(context, noise);
        for t in times(steps) {
            z_BHA = self.euler_step(context, z_BHA, t, steps);
        }
        z_BHA.clamp(-1.0, 1.0)
    }
}

/// Returns the flow times of the steps: 1, 1 - 1 / steps, ..., 1 / steps.
pub(crate) fn times(steps: usize) -> impl Iterator<Item = f32> {
    (1..=steps)
        .rev()
        .map(move |i| (i as f64 / steps as f64) as f32)
}
