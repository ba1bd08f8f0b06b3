//! AdamW on flat buckets (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019),
//! with the element order of [`Layout`] and the arithmetic of the reference implementation.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};

use crate::config::{GroupConfig, OptimizerConfig};
use crate::layout::{Entry, Layout};

/// First and second moments of every trained value, by bucket.
#[derive(Debug)]
pub struct AdamW {
    exp_avg: Vec<Tensor<1>>,
    exp_avg_sq: Vec<Tensor<1>>,
    /// Updates done so far; the bias correction's exponent. A skipped step is not counted.
    updates: u64,
}

impl AdamW {
    /// Returns moments of zero.
    pub fn new(layout: &Layout, device: &Device) -> Self {
        let zeros = || {
            layout
                .buckets()
                .iter()
                .map(|bucket| Tensor::zeros([bucket.range.len()], device))
                .collect()
        };
        Self {
            exp_avg: zeros(),
            exp_avg_sq: zeros(),
            updates: 0,
        }
    }

    /// Restores moments from flat values; `read(name, range)` returns one range of a flat array.
    pub fn restore<E>(
        layout: &Layout,
        device: &Device,
        updates: u64,
        mut read: impl FnMut(&str, Range<u64>) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        let mut load = |name: &str| {
            let buckets = layout.buckets().iter();
            buckets
                .map(|bucket| {
                    let values = read(name, bucket.range.start as u64..bucket.range.end as u64)?;
                    let shape = [bucket.range.len()];
                    Ok(Tensor::from_data(TensorData::new(values, shape), device))
                })
                .collect::<Result<Vec<Tensor<1>>, E>>()
        };
        Ok(Self {
            exp_avg: load("exp_avg")?,
            exp_avg_sq: load("exp_avg_sq")?,
            updates,
        })
    }

    /// Returns the number of updates done.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Returns the values of `range` of a moment as host memory.
    pub fn moments(&self, layout: &Layout, range: Range<usize>) -> [(&'static str, Vec<f32>); 2] {
        let slice = |buckets: &[Tensor<1>]| {
            let mut out = Vec::with_capacity(range.len());
            for (bucket, tensor) in layout.buckets().iter().zip(buckets) {
                let start = range.start.max(bucket.range.start);
                let end = range.end.min(bucket.range.end);
                if start < end {
                    let local = start - bucket.range.start..end - bucket.range.start;
                    out.extend(host(tensor.clone().slice([local])));
                }
            }
            out
        };
        [
            ("exp_avg", slice(&self.exp_avg)),
            ("exp_avg_sq", slice(&self.exp_avg_sq)),
        ]
    }

    /// Counts one update; call before the first [`Self::update_bucket`] of a step.
    pub fn begin_update(&mut self) {
        self.updates += 1;
    }

    /// Updates the parameters of bucket `index` in place of `parameters`.
    ///
    /// `active(entry)` says whether an entry takes part: parameters of action spaces that are
    /// absent from the whole global batch are left alone, moments and decay included.
    ///
    /// # Shapes
    /// `parameters` and `gradients`: one value per element of the bucket.
    pub fn update_bucket(
        &mut self,
        layout: &Layout,
        index: usize,
        parameters: Tensor<1>,
        gradients: Tensor<1>,
        (learning_rate, config): (f64, &OptimizerConfig),
        active: impl Fn(&Entry) -> bool,
    ) -> Tensor<1> {
        let bucket = &layout.buckets()[index];
        let entries = &layout.entries()[bucket.entries.clone()];
        let decay = entries[0].decay;
        let rule = Rule::new(
            config.group(entries[0].group),
            decay,
            learning_rate,
            self.updates,
        );
        let spans = active_spans(entries, bucket.range.start, active);
        if let [span] = spans.as_slice()
            && *span == (0..bucket.range.len())
        {
            let moments = (self.exp_avg[index].clone(), self.exp_avg_sq[index].clone());
            let (parameters, m, v) = rule.apply(parameters, gradients, moments);
            self.exp_avg[index] = m;
            self.exp_avg_sq[index] = v;
            return parameters;
        }
        let mut updated = parameters;
        for span in spans {
            let part = |tensor: &Tensor<1>| tensor.clone().slice([span.clone()]);
            let moments = (part(&self.exp_avg[index]), part(&self.exp_avg_sq[index]));
            let (p, m, v) = rule.apply(part(&updated), part(&gradients), moments);
            let place =
                |tensor: &Tensor<1>, values| tensor.clone().slice_assign([span.clone()], values);
            updated = place(&updated, p);
            self.exp_avg[index] = place(&self.exp_avg[index], m);
            self.exp_avg_sq[index] = place(&self.exp_avg_sq[index], v);
        }
        updated
    }
}

/// Merges active neighbours, relative to the bucket's start.
fn active_spans(
    entries: &[Entry],
    start: usize,
    active: impl Fn(&Entry) -> bool,
) -> Vec<Range<usize>> {
    let mut spans: Vec<Range<usize>> = Vec::new();
    for entry in entries.iter().filter(|entry| active(entry)) {
        let range = entry.range().start - start..entry.range().end - start;
        match spans.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => spans.push(range),
        }
    }
    spans
}

/// The numbers of one update.
struct Rule {
    shrink: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    step_size: f64,
    root_correction2: f64,
}

impl Rule {
    fn new(config: &GroupConfig, decay: bool, learning_rate: f64, updates: u64) -> Self {
        let weight_decay = if decay { config.weight_decay } else { 0.0 };
        let correction = |beta: f64| 1.0 - beta.powf(updates as f64);
        Self {
            shrink: 1.0 - learning_rate * weight_decay,
            beta1: config.betas[0],
            beta2: config.betas[1],
            eps: config.eps,
            step_size: learning_rate / correction(config.betas[0]),
            root_correction2: correction(config.betas[1]).sqrt(),
        }
    }

    fn apply(
        &self,
        p: Tensor<1>,
        g: Tensor<1>,
        (m, v): (Tensor<1>, Tensor<1>),
    ) -> (Tensor<1>, Tensor<1>, Tensor<1>) {
        let m = m.clone() + (g.clone() - m) * (1.0 - self.beta1);
        let v = v * self.beta2 + g.clone() * g * (1.0 - self.beta2);
        let denominator = v.clone().sqrt() / self.root_correction2 + self.eps;
        let p = p * self.shrink - m.clone() / denominator * self.step_size;
        (p, m, v)
    }
}

/// Copies a tensor to host memory.
pub fn host(tensor: Tensor<1>) -> Vec<f32> {
    tensor
        .into_data()
        .try_into_vec()
        .expect("parameters and gradients are f32")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clip;
    use crate::ema::Ema;
    use crate::golden::Golden;
    use crate::schedule::EmaConfig;

    fn relative_l2(got: &[f32], want: &[f32]) -> f64 {
        let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
        let mut pairs = got.iter().zip(want);
        let difference =
            squares(&mut pairs.by_ref().map(|(&a, &b)| f64::from(a) - f64::from(b))).sqrt();
        let norm = squares(&mut want.iter().map(|&x| f64::from(x))).sqrt();
        if norm == 0.0 {
            difference
        } else {
            difference / norm
        }
    }

    #[test]
    fn golden_adamw() {
        let golden = Golden::open("adamw");
        let config = &golden.config;
        let bound = golden.tolerance["rel_l2"].as_f64().expect("rel_l2");
        let number = |key: &str| config[key].as_f64().expect("a number");
        let betas: Vec<f64> = serde_json::from_value(config["betas"].clone()).expect("betas");
        let list = |key: &str| -> Vec<String> {
            serde_json::from_value(config[key].clone()).expect("names")
        };
        let group = GroupConfig {
            learning_rate: number("lr"),
            betas: betas.try_into().expect("two"),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
            exempt_norms: true,
            schedule: crate::schedule::Schedule::Constant,
        };
        let optimizer = OptimizerConfig {
            head: group.clone(),
            vlm: group,
        };
        let device = Device::flex();
        let names = golden.names("input.param.");
        let sizes = names.iter().map(|name| {
            (
                name.clone(),
                vec![golden.f32s(&format!("input.param.{name}")).len()],
            )
        });
        let layout = Layout::new(sizes, &optimizer, 64);
        for entry in layout.entries() {
            assert_eq!(
                entry.decay,
                list("decay").contains(&entry.name),
                "{}",
                entry.name
            );
        }
        let flat = |prefix: &str| -> Vec<Tensor<1>> {
            let bucket = |b: &crate::layout::Bucket| {
                let values: Vec<f32> = layout.entries()[b.entries.clone()]
                    .iter()
                    .flat_map(|entry| golden.f32s(&format!("{prefix}{}", entry.name)))
                    .collect();
                Tensor::from_data(TensorData::new(values, [b.range.len()]), &device)
            };
            layout.buckets().iter().map(bucket).collect()
        };
        let check = |what: &str, buckets: &[Tensor<1>], seen: &mut Vec<String>| {
            let all: Vec<f32> = buckets.iter().flat_map(|b| host(b.clone())).collect();
            for entry in layout.entries() {
                let key = format!("output.{what}{}", entry.name);
                let error = relative_l2(&all[entry.range()], &golden.f32s(&key));
                assert!(error <= bound, "{key}: {error:e} > {bound:e}");
                seen.push(key);
            }
        };
        let rates = golden.f64s("input.lr");
        let mut adam = AdamW::new(&layout, &device);
        let mut parameters = flat("input.param.");
        let mut ema = Ema {
            config: EmaConfig::default(),
            buckets: parameters.clone(),
        };
        let mut seen = Vec::new();
        for (k, &rate) in rates.iter().enumerate() {
            let gradients = flat(&format!("input.grad.{k}."));
            adam.begin_update();
            for (index, gradient) in gradients.into_iter().enumerate() {
                let old = parameters[index].clone();
                parameters[index] =
                    adam.update_bucket(&layout, index, old, gradient, (rate, &optimizer), |_| true);
                ema.update(index, parameters[index].clone(), adam.updates());
            }
            check(&format!("param.{}.", k + 1), &parameters, &mut seen);
        }
        check("exp_avg.", &adam.exp_avg, &mut seen);
        check("exp_avg_sq.", &adam.exp_avg_sq, &mut seen);
        check("ema.", &ema.buckets, &mut seen);
        let last = flat(&format!("input.grad.{}.", rates.len() - 1));
        let norm = clip::norm(last.iter().map(|bucket| host(bucket.clone())));
        let want = f64::from(golden.f32s("output.clip_total_norm")[0]);
        assert!((norm - want).abs() <= bound * want, "norm {norm} {want}");
        seen.push("output.clip_total_norm".into());
        let factor = clip::factor(norm, Some(1.0));
        let clipped: Vec<Tensor<1>> = last.into_iter().map(|bucket| bucket * factor).collect();
        check("clipped_grad.", &clipped, &mut seen);
        seen.sort();
        let all: Vec<String> = golden
            .names("output.")
            .into_iter()
            .map(|name| format!("output.{name}"))
            .collect();
        assert_eq!(seen, all, "every output of the file is compared");
    }

    #[test]
    fn absent_action_spaces_do_not_move() {
        let optimizer = OptimizerConfig::default();
        let device = Device::flex();
        let parameters = [
            "action_decoders.a.weight",
            "action_decoders.b.weight",
            "cond_linear.weight",
        ];
        let layout = Layout::new(
            parameters.map(|name| (name.to_owned(), vec![2])),
            &optimizer,
            1 << 20,
        );
        let mut adam = AdamW::new(&layout, &device);
        adam.begin_update();
        let ones = || Tensor::<1>::ones([6], &device);
        let active = |entry: &Entry| entry.action_space() != Some("a");
        let updated =
            host(adam.update_bucket(&layout, 0, ones(), ones(), (0.1, &optimizer), active));
        assert_eq!(updated[..2], [1.0, 1.0]);
        assert!(updated[2..].iter().all(|&x| x < 0.95), "{updated:?}");
        let [(_, m), (_, v)] = adam.moments(&layout, 1..4);
        assert_eq!((m[0], v[0]), (0.0, 0.0));
        assert!(m[1] > 0.0 && v[2] > 0.0);
    }
}
