//! Recipe to training run: the step, the optimizer, resume
