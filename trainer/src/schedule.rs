//! Learning-rate schedules and the EMA decay, as functions of the number of optimizer updates.

use serde::{Deserialize, Serialize};

/// How a learning rate changes over the updates. The length is its own key: raising the number of
/// training steps changes no learning rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// Always the peak.
    Constant,
    /// Linear warm-up, hold, cosine to a final value.
    TriStage {
        /// Updates over which the phases are laid out.
        total: u64,
        /// Shares of warm-up, hold and decay.
        phases: [f64; 3],
        /// First learning rate as a share of the peak.
        init_scale: f64,
        /// Last learning rate as a share of the peak.
        final_scale: f64,
        /// Update 0 runs at the peak and update n at the schedule's n - 1, as the reference's
        /// finetuning does.
        #[serde(default)]
        first_update_at_peak: bool,
    },
    /// Linear warm-up, then the inverse square root.
    InverseSqrt {
        /// Updates of warm-up.
        warmup: u64,
        /// Updates after which the rate has fallen to the root of one half.
        timescale: u64,
    },
}

impl Schedule {
    /// Returns the learning rate of optimizer update `update`, counted from 0.
    pub fn learning_rate(&self, peak: f64, update: u64) -> f64 {
        match *self {
            Self::Constant => peak,
            Self::TriStage {
                total,
                phases,
                init_scale,
                final_scale,
                first_update_at_peak,
            } => {
                if first_update_at_peak && update == 0 {
                    return peak;
                }
                let k = (update - u64::from(first_update_at_peak)) as f64;
                let stage = |ratio: f64| (ratio * total as f64).floor();
                let (warmup, hold, decay) = (stage(phases[0]), stage(phases[1]), stage(phases[2]));
                let (initial, last) = (init_scale * peak, final_scale * peak);
                if k < warmup {
                    initial + (peak - initial) * k / warmup
                } else if k < warmup + hold {
                    peak
                } else if k < warmup + hold + decay {
                    let angle = std::f64::consts::PI * (k - warmup - hold) / decay;
                    last + (peak - last) * f64::midpoint(1.0, angle.cos())
                } else {
                    last
                }
            }
            Self::InverseSqrt { warmup, timescale } => {
                if update < warmup {
                    peak * update as f64 / warmup as f64
                } else {
                    let shifted = (update + timescale - warmup) as f64;
                    peak / (shifted / timescale as f64).sqrt()
                }
            }
        }
    }

    /// Returns every fault of the schedule's numbers; `key` is its place in the recipe.
    pub fn faults(&self, key: &str) -> Vec<String> {
        let mut faults = Vec::new();
        match *self {
            Self::Constant => {}
            Self::TriStage {
                total,
                phases,
                init_scale,
                final_scale,
                ..
            } => {
                if total == 0 {
                    faults.push(format!("{key}.total must be at least 1"));
                }
                if phases.iter().any(|phase| !(0.0..=1.0).contains(phase))
                    || phases.iter().sum::<f64>() > 1.0 + 1e-9
                {
                    faults.push(format!(
                        "{key}.phases must be shares that add up to at most 1"
                    ));
                }
                if init_scale < 0.0 || final_scale < 0.0 {
                    faults.push(format!("{key}: scales must not be negative"));
                }
            }
            Self::InverseSqrt { warmup, timescale } => {
                if timescale == 0 || warmup > timescale {
                    faults.push(format!(
                        "{key}.timescale must be at least {key}.warmup and 1"
                    ));
                }
            }
        }
        faults
    }
}

/// Exponential moving average of the weights, decayed as the reference's finetuning does:
/// 1 - (1 + n / inv_gamma)^-power after n + 1 updates, kept in [min, max]. The defaults are the
/// reference's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EmaConfig {
    /// Time scale of the warm-up of the decay, in updates; 1.
    pub inv_gamma: f64,
    /// Exponent of the warm-up; 2/3.
    pub power: f64,
    /// Smallest decay; 0.
    pub min: f64,
    /// Largest decay; 0.9999.
    pub max: f64,
}

impl Default for EmaConfig {
    fn default() -> Self {
        Self {
            inv_gamma: 1.0,
            power: 2.0 / 3.0,
            min: 0.0,
            max: 0.9999,
        }
    }
}

impl EmaConfig {
    /// Returns the decay after update number `step`, counted from 1; the first one copies.
    pub fn decay(&self, step: u64) -> f64 {
        let n = step.saturating_sub(1) as f64;
        (1.0 - (1.0 + n / self.inv_gamma).powf(-self.power)).clamp(self.min, self.max)
    }

    /// Returns every fault of the numbers.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let is_positive = |x: f64| x.is_finite() && x > 0.0;
        if !is_positive(self.inv_gamma) || !is_positive(self.power) {
            faults.push("train.ema.inv_gamma and train.ema.power must be positive".into());
        }
        if !(0.0 <= self.min && self.min <= self.max && self.max < 1.0) {
            faults.push(format!(
                "train.ema needs 0 <= min <= max < 1, not min = {} and max = {}",
                self.min, self.max
            ));
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::Golden;

    fn tri_stage(config: &serde_json::Value, first_update_at_peak: bool) -> (f64, Schedule) {
        let number = |key: &str| config[key].as_f64().expect("a number");
        let phases: Vec<f64> =
            serde_json::from_value(config["phase_ratio"].clone()).expect("three");
        let schedule = Schedule::TriStage {
            total: config["total_steps"].as_u64().expect("a count"),
            phases: phases.try_into().expect("three"),
            init_scale: number("init_lr_scale"),
            final_scale: number("final_lr_scale"),
            first_update_at_peak,
        };
        (number("lr"), schedule)
    }

    #[test]
    fn golden_lr_schedules() {
        let golden = Golden::open("lr_schedules");
        let rtol = golden.tolerance["rtol"].as_f64().expect("rtol");
        let config = &golden.config;
        for name in golden.names("output.") {
            let (steps, curve): (_, Box<dyn Fn(u64) -> f64>) = match name.as_str() {
                "finetune_tri_stage" | "finetune_tri_stage_small" => {
                    let (peak, schedule) = tri_stage(&config[&name], true);
                    let steps = format!("{name}_steps");
                    (steps, Box::new(move |n| schedule.learning_rate(peak, n)))
                }
                "pretrain_vlm_tri_stage" => {
                    let (peak, schedule) = tri_stage(&config[&name], false);
                    let curve = move |n| schedule.learning_rate(peak, n);
                    ("pretrain_steps".to_owned(), Box::new(curve))
                }
                "pretrain_head_inverse_sqrt" => {
                    let entry = &config[&name];
                    let schedule = Schedule::InverseSqrt {
                        warmup: entry["warmup"].as_u64().expect("warmup"),
                        timescale: entry["timescale"].as_u64().expect("timescale"),
                    };
                    let peak = entry["lr"].as_f64().expect("lr");
                    let curve = move |n| schedule.learning_rate(peak, n);
                    ("pretrain_steps".to_owned(), Box::new(curve))
                }
                "ema_decay" => {
                    let entry = &config["ema"];
                    let number = |key: &str| entry[key].as_f64().expect("a number");
                    let ema = EmaConfig {
                        inv_gamma: number("inv_gamma"),
                        power: number("power"),
                        min: number("min"),
                        max: number("max"),
                    };
                    ("ema_steps".to_owned(), Box::new(move |n| ema.decay(n)))
                }
                other => panic!("no schedule for output.{other}"),
            };
            let wanted = golden.f64s(&format!("output.{name}"));
            // A curve without its own list of steps starts at 0 and has one value a step.
            let steps = if golden.names("input.").contains(&steps) {
                golden.i64s(&format!("input.{steps}"))
            } else {
                (0..wanted.len() as i64).collect()
            };
            assert_eq!(steps.len(), wanted.len(), "{name}");
            for (&step, &want) in steps.iter().zip(&wanted) {
                let got = curve(step as u64);
                assert!(
                    (got - want).abs() <= rtol * want.abs(),
                    "{name} at {step}: {got} {want}"
                );
            }
        }
    }

    #[test]
    fn averages_that_cannot_be_are_refused() {
        assert!(EmaConfig::default().faults().is_empty());
        let broken = EmaConfig {
            inv_gamma: f64::NAN,
            max: 1.0,
            ..EmaConfig::default()
        };
        assert_eq!(broken.faults().len(), 2, "{:?}", broken.faults());
    }

    #[test]
    fn faults_name_the_key() {
        let schedule = Schedule::TriStage {
            total: 0,
            phases: [0.5, 0.6, 0.2],
            init_scale: 0.1,
            final_scale: 0.5,
            first_update_at_peak: false,
        };
        let faults = schedule.faults("train.optimizer.head.schedule");
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(
            faults
                .iter()
                .all(|fault| fault.contains("train.optimizer.head.schedule"))
        );
    }
}
