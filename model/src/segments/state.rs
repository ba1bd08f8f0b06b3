//! What crosses a cut between two segments.

use burn::tensor::{Gradients, Tensor};

use crate::bart_decoder::Decoded;
use crate::flow_transformer::FlowState;

/// What crosses a cut.
#[derive(Clone, Debug)]
pub(super) enum State {
    /// `[B * N, H, W, C]`
    Map(Tensor<4>),
    /// `[B, S, D]`, and the words `[B, T, D]` if a decoder reads them behind the encoder.
    Tokens(Tensor<3>, Option<Tensor<3>>),
    Decoded(Decoded),
    Flow(Box<FlowState>),
    /// `[B, H, A]`
    Velocity(Tensor<3>),
}

impl State {
    /// Returns which of the tensors gradients lead back from: of a state of one tensor the first.
    pub(super) fn tracked(&self) -> [bool; 4] {
        let first = |tracked| [tracked, false, false, false];
        match self {
            Self::Map(map) => first(map.is_tracked()),
            Self::Velocity(x) => first(x.is_tracked()),
            Self::Tokens(x, words) => {
                let words = words.as_ref().is_some_and(Tensor::is_tracked);
                [x.is_tracked(), words, false, false]
            }
            Self::Decoded(state) => {
                let memory = state.memory_BSD.is_tracked();
                [state.words_BTD.is_tracked(), memory, false, false]
            }
            Self::Flow(state) => [
                state.x_BTD.is_tracked(),
                state.context_BSD.is_tracked(),
                state.cond_BD.is_tracked(),
                state.global.as_ref().is_some_and(Tensor::is_tracked),
            ],
        }
    }

    /// Returns the values as leaves that keep gradients where `tracked` says so.
    pub(super) fn leaves(&self, tracked: [bool; 4]) -> Self {
        let [x, context, cond, global] = tracked;
        match self {
            Self::Map(map) => Self::Map(leaf(map, x)),
            Self::Tokens(tokens, words) => {
                Self::Tokens(leaf(tokens, x), words.as_ref().map(|w| leaf(w, context)))
            }
            Self::Decoded(state) => Self::Decoded(Decoded {
                words_BTD: leaf(&state.words_BTD, x),
                memory_BSD: leaf(&state.memory_BSD, context),
            }),
            Self::Velocity(velocity) => Self::Velocity(leaf(velocity, x)),
            Self::Flow(state) => Self::Flow(Box::new(FlowState {
                x_BTD: leaf(&state.x_BTD, x),
                context_BSD: leaf(&state.context_BSD, context),
                cond_BD: leaf(&state.cond_BD, cond),
                global: state.global.as_ref().map(|x| leaf(x, global)),
            })),
        }
    }

    /// Returns the scalar whose gradient is that of the loss, from the gradients that the
    /// `leaves` made of this state got; none if no gradient leads back from here.
    pub(super) fn root(self, leaves: &Self, grads: &mut Gradients) -> Option<Tensor<1>> {
        let parts = match (self, leaves) {
            (Self::Map(map), Self::Map(leaf)) => vec![weighted(map, leaf, grads)],
            (Self::Tokens(tokens, words), Self::Tokens(leaf, words_leaf)) => vec![
                weighted(tokens, leaf, grads),
                words
                    .zip(words_leaf.as_ref())
                    .and_then(|(words, leaf)| weighted(words, leaf, grads)),
            ],
            (Self::Decoded(state), Self::Decoded(leaf)) => vec![
                weighted(state.words_BTD, &leaf.words_BTD, grads),
                weighted(state.memory_BSD, &leaf.memory_BSD, grads),
            ],
            (Self::Velocity(velocity), Self::Velocity(leaf)) => {
                vec![weighted(velocity, leaf, grads)]
            }
            (Self::Flow(state), Self::Flow(leaf)) => vec![
                weighted(state.x_BTD, &leaf.x_BTD, grads),
                weighted(state.context_BSD, &leaf.context_BSD, grads),
                weighted(state.cond_BD, &leaf.cond_BD, grads),
                state
                    .global
                    .zip(leaf.global.as_ref())
                    .and_then(|(global, leaf)| weighted(global, leaf, grads)),
            ],
            (state, leaves) => unreachable!("{leaves:?} are not the leaves of {state:?}"),
        };
        parts.into_iter().flatten().reduce(|sum, part| sum + part)
    }
}

fn leaf<const D: usize>(values: &Tensor<D>, tracked: bool) -> Tensor<D> {
    values.clone().detach().set_require_grad(tracked)
}

fn weighted<const D: usize>(
    values: Tensor<D>,
    leaf: &Tensor<D>,
    grads: &mut Gradients,
) -> Option<Tensor<1>> {
    let grad = leaf.grad_remove(grads)?;
    Some((values * grad).sum())
}
