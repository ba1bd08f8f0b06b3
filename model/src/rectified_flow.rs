//! Rectified flow: noisy actions on the straight line to the noise, and the loss of a velocity.

use burn::tensor::Tensor;

/// Returns `(1 - t) actions + t noise`.
///
/// # Shapes
/// `actions`, `noise`: `[B, H, A]`; `t: [B]` -> `[B, H, A]`
pub fn noisy_actions(actions: Tensor<3>, noise: Tensor<3>, t: Tensor<1>) -> Tensor<3> {
    let t = t.unsqueeze_dims::<3>(&[1, 2]);
    (t.clone().neg() + 1.0) * actions + t * noise
}

/// Returns the sum of `(noise - actions - velocity)^2` over the valid entries. The caller divides
/// by their number in the global batch.
///
/// # Shapes
/// all `[B, H, A]`, `valid` with 1 where an entry counts and 0 elsewhere -> `[1]`
pub fn velocity_loss(
    velocity: Tensor<3>,
    noise: Tensor<3>,
    actions: Tensor<3>,
    valid: Tensor<3>,
) -> Tensor<1> {
    ((noise - actions - velocity).square() * valid).sum()
}
