//! What a source's flow transformer was trained with: found in its tables, recorded, or asked for.

use safetensors::Dtype;

use crate::choices::{Choices, text, theta_of};
use crate::error::Result;
use crate::files::converter;
use crate::fitting::Fitting;
use crate::report::Outcome;

/// Rotary bases of the published code.
const KNOWN_THETAS: [f64; 2] = [32.0, 1000.0];

impl Fitting<'_> {
    /// Finds or demands what the flow transformer was trained with, and compares the recipe.
    pub(crate) async fn choose(&mut self) -> Result<()> {
        let theta = self.theta().await?;
        if !self.has_head() {
            return Ok(());
        }
        let recorded: Option<Choices> =
            serde_json::from_value(self.files.notes()["pollen"]["choices"].clone()).ok();
        let mask = self.options.cross_attention_mask;
        let mask = mask.or(recorded.map(|choices| choices.cross_attention_mask));
        let norm = self.options.norm.or(recorded.map(|choices| choices.norm));
        let theta = theta.or(self.options.rope_theta);
        let theta = theta.or(recorded.map(|choices| choices.rope_theta));
        let faults = &mut self.fit.faults;
        if mask.is_none() {
            faults.push(
                "weights do not show which cross-attention mask they were trained with; say \
                 --cross-attention-mask additive, boolean or none (compare their losses)"
                    .into(),
            );
        }
        if norm.is_none() {
            faults.push(
                "weights do not show which norm they were trained with; say --norm rms or \
                 --norm variance (compare their losses)"
                    .into(),
            );
        }
        if theta.is_none() && self.tables.0.is_empty() {
            faults.push(
                "the source has no rotary tables; say --rope-theta, the base it was trained with"
                    .into(),
            );
        }
        if let (Some(rope_theta), Some(cross_attention_mask), Some(norm)) = (theta, mask, norm) {
            let choices = Choices {
                rope_theta,
                cross_attention_mask,
                norm,
            };
            faults.extend(choices.faults(&Choices::of(self.config)));
            self.fit.choices = Some(choices);
        }
        Ok(())
    }

    /// Finds the base of the rotary positions from the stored tables, which must all agree.
    async fn theta(&mut self) -> Result<Option<f64>> {
        let (cosines, sines) = std::mem::take(&mut self.tables);
        let pairs = self.config.flow.width / self.config.flow.heads.max(1) / 2;
        let mut thetas = vec![self.config.flow.rope_theta];
        thetas.extend(self.options.rope_theta);
        thetas.extend(KNOWN_THETAS);
        let mut found: Option<f64> = None;
        for key in &cosines {
            let partner = key.replace(".self_attn.cos", ".self_attn.sin");
            let stored = &self.files.tensors()[key];
            let file = self.files.file_of(stored);
            let fault = |what: &str| format!("tensor `{key}` in {file}: {what}");
            let other = self.files.tensors().get(&partner);
            if stored.shape.last() != Some(&pairs) || converter(stored.dtype).is_none() {
                let what = format!(
                    "a rotary table of heads of {} has {pairs} columns",
                    2 * pairs
                );
                self.fit.faults.push(fault(&what));
                continue;
            }
            if other.is_none_or(|other| other.shape != stored.shape || other.dtype != stored.dtype)
            {
                self.fit
                    .faults
                    .push(fault("its table of sines is missing or another"));
                continue;
            }
            let tolerance = if stored.dtype == Dtype::BF16 {
                4e-3
            } else {
                1e-3
            };
            let tables = (
                self.files.read(key).await?,
                self.files.read(&partner).await?,
            );
            let theta = theta_of((&tables.0, &tables.1), pairs, &thetas, tolerance);
            match (theta, found) {
                (None, _) => self.fit.faults.push(fault(&format!(
                    "this rotary table has none of the bases {}; say --rope-theta",
                    thetas.iter().map(text).collect::<Vec<_>>().join(", ")
                ))),
                (Some(theta), Some(other)) if theta != other => {
                    self.fit.faults.push(fault(&format!(
                        "this rotary table has base {theta}, the ones before have {other}"
                    )));
                }
                (theta, _) => found = theta,
            }
        }
        for key in cosines.iter().chain(&sines) {
            let reason = match found {
                Some(theta) => format!("a rotary table of base {theta}; it is computed again"),
                None => "a rotary table of no known base".into(),
            };
            self.fit.report.add(Outcome::Unused, key, "", &reason);
        }
        self.tables = (cosines, sines);
        Ok(found)
    }
}
