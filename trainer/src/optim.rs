//! AdamW on flat buckets (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019),
//! with the element order of [`Layout`] and the arithmetic of the reference implementation.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};

use crate::config::{GroupConfig, OptimizerConfig};
use crate::data_parallel::to_device;
use crate::device::DeviceKind;
use crate::layout::{Entry, Layout, Shard};

/// First and second moments of a shard of every bucket: with all of it replicated, or with a part
/// on each rank (ZeRO-1: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion
/// parameter models", 2020).
#[derive(Debug)]
pub struct AdamW {
    shard: Shard,
    exp_avg: Vec<Tensor<1>>,
    exp_avg_sq: Vec<Tensor<1>>,
    /// Updates done so far; the bias correction's exponent. A skipped step is not counted.
    updates: u64,
}

impl AdamW {
    /// Returns moments of zero.
    pub fn new(layout: &Layout, shard: Shard, device: &Device) -> Self {
        let zeros = || {
            layout
                .buckets()
                .iter()
                .map(|bucket| Tensor::zeros([bucket.share(shard).len()], device))
                .collect()
        };
        Self {
            shard,
            exp_avg: zeros(),
            exp_avg_sq: zeros(),
            updates: 0,
        }
    }

    /// Restores moments from flat values; `read(name, range)` returns one range of a flat array.
    pub fn restore<E>(
        layout: &Layout,
        shard: Shard,
        device: &Device,
        updates: u64,
        mut read: impl FnMut(&str, Range<u64>) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        let mut load = |name: &str| {
            let buckets = layout.buckets().iter();
            buckets
                .map(|bucket| {
                    let share = bucket.share(shard);
                    let start = bucket.range.start as u64;
                    let range = start + share.start as u64..start + share.end as u64;
                    let values = read(name, range)?;
                    let shape = [share.len()];
                    Ok(Tensor::from_data(TensorData::new(values, shape), device))
                })
                .collect::<Result<Vec<Tensor<1>>, E>>()
        };
        Ok(Self {
            shard,
            exp_avg: load("exp_avg")?,
            exp_avg_sq: load("exp_avg_sq")?,
            updates,
        })
    }

    /// Returns the number of updates done.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Returns which shard of the moments is here.
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// Returns what is here of the flat `range` of each moment, a piece a bucket: name, first flat
    /// index, values.
    pub fn moments(
        &self,
        layout: &Layout,
        range: &Range<usize>,
    ) -> Vec<(&'static str, usize, Tensor<1>)> {
        let mut pieces = Vec::new();
        for (name, moment) in [("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)] {
            for (bucket, tensor) in layout.buckets().iter().zip(moment) {
                let first = bucket.range.start + bucket.share(self.shard).start;
                let last = bucket.range.start + bucket.share(self.shard).end;
                let (start, end) = (range.start.max(first), range.end.min(last));
                if start >= end {
                    continue;
                }
                let values = tensor.clone().slice([start - first..end - first]);
                pieces.push((name, start, values));
            }
        }
        pieces
    }

    /// Counts one update; call before the first [`Self::update_bucket`] of a step.
    pub fn begin_update(&mut self) {
        self.updates += 1;
    }

    /// Returns what the shard of bucket `index` becomes from `parameters`, its values now.
    ///
    /// `active(entry)` says whether an entry takes part: parameters of action spaces that are
    /// absent from the whole global batch are left alone, moments and decay included.
    ///
    /// # Shapes
    /// `parameters` and `gradients`: one value per element of the bucket's share.
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
        let share = bucket.share(self.shard);
        let here = bucket.range.start + share.start..bucket.range.start + share.end;
        let spans = active_spans(entries, here, active);
        if let [span] = spans.as_slice()
            && *span == (0..share.len())
        {
            let m = taken(&mut self.exp_avg[index]);
            let v = taken(&mut self.exp_avg_sq[index]);
            let (parameters, m, v) = rule.apply(parameters, gradients, (m, v));
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

/// Returns the active entries inside the flat range `here`, relative to its start, neighbours merged.
fn active_spans(
    entries: &[Entry],
    here: Range<usize>,
    active: impl Fn(&Entry) -> bool,
) -> Vec<Range<usize>> {
    let mut spans: Vec<Range<usize>> = Vec::new();
    for entry in entries.iter().filter(|entry| active(entry)) {
        let start = entry.range().start.max(here.start);
        let end = entry.range().end.min(here.end);
        if start >= end {
            continue;
        }
        let range = start - here.start..end - here.start;
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
        moments: (Tensor<1>, Tensor<1>),
    ) -> (Tensor<1>, Tensor<1>, Tensor<1>) {
        match DeviceKind::of(&p.device()) {
            DeviceKind::Cpu => self.apply_in_host_memory(p, g, moments),
            DeviceKind::Cuda => self.apply_by_tensors(p, g, moments),
        }
    }

    /// One pass over the values, where [`Self::apply_by_tensors`] makes a dozen; the same operations
    /// in the same order and the same bits.
    fn apply_in_host_memory(
        &self,
        p: Tensor<1>,
        g: Tensor<1>,
        (m, v): (Tensor<1>, Tensor<1>),
    ) -> (Tensor<1>, Tensor<1>, Tensor<1>) {
        let device = p.device();
        let (mut p, g, mut m, mut v) = (host(p), host(g), host(m), host(v));
        let numbers = [
            self.shrink,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            self.root_correction2,
            self.eps,
            self.step_size,
        ];
        let [
            shrink,
            rest1,
            beta2,
            rest2,
            root_correction2,
            eps,
            step_size,
        ] = numbers.map(|number| number as f32);
        let moments = m.iter_mut().zip(&mut v);
        for ((p, g), (m, v)) in p.iter_mut().zip(&g).zip(moments) {
            *m += (*g - *m) * rest1;
            *v = *v * beta2 + *g * *g * rest2;
            let denominator = v.sqrt() / root_correction2 + eps;
            *p = *p * shrink - *m / denominator * step_size;
        }
        let back = |values| to_device(values, &device);
        (back(p), back(m), back(v))
    }

    fn apply_by_tensors(
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

/// Takes a moment to be replaced; out of its place in host memory, so that it has one owner and is
/// changed where it lies.
fn taken(moment: &mut Tensor<1>) -> Tensor<1> {
    let device = moment.device();
    match DeviceKind::of(&device) {
        DeviceKind::Cpu => std::mem::replace(moment, Tensor::zeros([0], &device)),
        DeviceKind::Cuda => moment.clone(),
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
        let mut adam = AdamW::new(&layout, Shard::WHOLE, &device);
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
        let sums = last
            .iter()
            .flat_map(|bucket| clip::square_sums(&host(bucket.clone())));
        let norm = clip::norm(&sums.collect::<Vec<f64>>());
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
    fn one_pass_gives_the_bits_of_tensor_operations() {
        let device = Device::flex();
        let config = OptimizerConfig::default();
        // Every exponent from subnormal to large, both signs, and zeros.
        let values = |salt: u32| -> Vec<f32> {
            let value = |i: u32| {
                let bits = (i * 7 + salt).wrapping_mul(0x9e37_79b9);
                let magnitude = f32::from_bits(bits % 0x6000_0000);
                if bits >> 31 == 1 {
                    -magnitude
                } else {
                    magnitude
                }
            };
            (0..10_007)
                .map(|i| if i % 101 == 0 { 0.0 } else { value(i) })
                .collect()
        };
        let bits = |tensor: &Tensor<1>| -> Vec<u32> {
            host(tensor.clone()).into_iter().map(f32::to_bits).collect()
        };
        let tensor = |values: Vec<f32>| to_device(values, &device);
        let squares = values(3).into_iter().map(f32::abs).collect();
        let mut one = (tensor(values(1)), tensor(values(2)), tensor(squares));
        let mut many = one.clone();
        for updates in 1..5 {
            let rule = Rule::new(&config.head, true, 3e-4, updates);
            let gradient = tensor(values(10 + updates as u32));
            let (p, m, v) = one;
            one = rule.apply_in_host_memory(p, gradient.clone(), (m, v));
            let (p, m, v) = many;
            many = rule.apply_by_tensors(p, gradient, (m, v));
            assert!(
                bits(&one.0) == bits(&many.0),
                "weights after update {updates}"
            );
            assert!(bits(&one.1) == bits(&many.1), "m after update {updates}");
            assert!(bits(&one.2) == bits(&many.2), "v after update {updates}");
        }
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
        let mut adam = AdamW::new(&layout, Shard::WHOLE, &device);
        adam.begin_update();
        let ones = || Tensor::<1>::ones([6], &device);
        let active = |entry: &Entry| entry.action_space() != Some("a");
        let updated =
            host(adam.update_bucket(&layout, 0, ones(), ones(), (0.1, &optimizer), active));
        assert_eq!(updated[..2], [1.0, 1.0]);
        assert!(updated[2..].iter().all(|&x| x < 0.95), "{updated:?}");
        let moments = adam.moments(&layout, &(1..4));
        let [(_, 1, m), (_, 1, v)] = &moments[..] else {
            panic!("{moments:?}")
        };
        let (m, v) = (host(m.clone()), host(v.clone()));
        assert_eq!((m[0], v[0]), (0.0, 0.0));
        assert!(m[1] > 0.0 && v[2] > 0.0);
    }
}
