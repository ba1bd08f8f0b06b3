//! Compares two checkpoints tensor by tensor, whatever world sizes wrote them.

use std::collections::BTreeMap;

use crate::checkpoints::Checkpoints;
use crate::error::Result;
use crate::manifest::{FileKind, FileRecord};
use crate::restore::Restored;
use crate::tensors::{Dtype, TensorData};

/// Elements of a flat array that are compared at a time.
const RANGE: u64 = 4 << 20;

/// How one tensor or flat array of two checkpoints compares.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorDiff {
    /// Canonical name; `ema:` before that of an averaged weight, `optim:` before a flat array.
    pub name: String,
    /// What was found.
    pub change: Change,
}

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// The same bits.
    None,
    /// Only the first has it.
    OnlyFirst,
    /// Only the second has it.
    OnlySecond,
    /// Another element type or shape: both in words.
    Form(String, String),
    /// Other values.
    Values {
        /// Elements that differ in any bit.
        changed: u64,
        /// Elements in all.
        elements: u64,
        /// Largest absolute difference; NaN if a difference is none. Only for f32.
        max_abs: f64,
        /// L2 norm of the difference over that of the first. Only for f32.
        relative_l2: f64,
    },
}

/// Compares all weights, averaged weights and flat arrays, in the order of their names.
pub fn diff(
    first: (&Checkpoints, &Restored),
    second: (&Checkpoints, &Restored),
) -> Result<Vec<TensorDiff>> {
    let mut diffs = Vec::new();
    for (kind, prefix) in [(FileKind::Model, ""), (FileKind::Ema, "ema:")] {
        let (mut a, mut b) = (Tensors::of(first, kind), Tensors::of(second, kind));
        for name in union(a.files.keys(), b.files.keys()) {
            let change = match (a.read(&name)?, b.read(&name)?) {
                (Some(a), Some(b)) => compare(&a, &b),
                (Some(_), None) => Change::OnlyFirst,
                (None, _) => Change::OnlySecond,
            };
            let name = format!("{prefix}{name}");
            diffs.push(TensorDiff { name, change });
        }
    }
    let (a, b) = (flat_lens(first.1), flat_lens(second.1));
    for name in union(a.keys(), b.keys()) {
        let change = match (a.get(&name), b.get(&name)) {
            (Some(&len), Some(other)) if len == *other => {
                let mut sums = Sums::default();
                let mut start = 0;
                while start < len {
                    let range = start..len.min(start + RANGE);
                    let values = first.0.read_flat(first.1, &name, range.clone())?;
                    sums.add(
                        &values,
                        &second.0.read_flat(second.1, &name, range.clone())?,
                    );
                    start = range.end;
                }
                sums.change()
            }
            (Some(len), Some(other)) => Change::Form(format!("[{len}]"), format!("[{other}]")),
            (Some(_), None) => Change::OnlyFirst,
            (None, _) => Change::OnlySecond,
        };
        let name = format!("optim:{name}");
        diffs.push(TensorDiff { name, change });
    }
    Ok(diffs)
}

fn union<'a>(
    a: impl Iterator<Item = &'a String>,
    b: impl Iterator<Item = &'a String>,
) -> std::collections::BTreeSet<String> {
    a.chain(b).cloned().collect()
}

fn flat_lens(restored: &Restored) -> BTreeMap<String, u64> {
    let flat = restored.manifest.files.iter().flat_map(|file| &file.flat);
    flat.map(|flat| (flat.name.clone(), flat.global_len))
        .collect()
}

/// Tensors of one kind by name. Names go through the files in order, so holding the file that was
/// read last is enough.
struct Tensors<'a> {
    checkpoint: (&'a Checkpoints, &'a Restored),
    files: BTreeMap<String, &'a FileRecord>,
    held: Option<(&'a str, BTreeMap<String, TensorData>)>,
}

impl<'a> Tensors<'a> {
    fn of(checkpoint: (&'a Checkpoints, &'a Restored), kind: FileKind) -> Self {
        let files = checkpoint.1.manifest.of_kind(kind);
        let files = files.flat_map(|file| file.tensors.iter().map(move |t| (t.name.clone(), file)));
        Self {
            checkpoint,
            files: files.collect(),
            held: None,
        }
    }

    fn read(&mut self, name: &str) -> Result<Option<TensorData>> {
        let Some(&file) = self.files.get(name) else {
            return Ok(None);
        };
        if self
            .held
            .as_ref()
            .is_none_or(|(held, _)| *held != file.name)
        {
            self.held = None;
            let (checkpoints, restored) = self.checkpoint;
            let tensors = checkpoints.read_tensor_file(restored, file)?;
            self.held = Some((&file.name, tensors));
        }
        let held = self.held.as_ref();
        Ok(held.and_then(|(_, tensors)| tensors.get(name).cloned()))
    }
}

fn compare(a: &TensorData, b: &TensorData) -> Change {
    if (a.dtype, &a.shape) != (b.dtype, &b.shape) {
        let words = |t: &TensorData| format!("{:?} {:?}", t.dtype, t.shape);
        return Change::Form(words(a), words(b));
    }
    if a.bytes == b.bytes {
        return Change::None;
    }
    let mut sums = Sums::default();
    match (a.dtype, a.to_f32(), b.to_f32()) {
        (Dtype::F32, Some(a), Some(b)) => sums.add(&a, &b),
        _ => sums.add_raw(&a.bytes, &b.bytes, (a.dtype.bitsize() / 8).max(1)),
    }
    sums.change()
}

#[derive(Default)]
struct Sums {
    changed: u64,
    elements: u64,
    max_abs: f64,
    difference: f64,
    norm: f64,
}

impl Sums {
    fn add(&mut self, a: &[f32], b: &[f32]) {
        self.elements += a.len() as u64;
        for (&a, &b) in a.iter().zip(b) {
            self.norm += f64::from(a).powi(2);
            if a.to_bits() != b.to_bits() {
                let difference = (f64::from(a) - f64::from(b)).abs();
                self.changed += 1;
                self.difference += difference.powi(2);
                if self.max_abs.is_nan() || difference.is_nan() {
                    self.max_abs = f64::NAN;
                } else {
                    self.max_abs = self.max_abs.max(difference);
                }
            }
        }
    }

    /// Other element types are compared by their bytes only.
    fn add_raw(&mut self, a: &[u8], b: &[u8], size: usize) {
        self.elements += (a.len() / size) as u64;
        let pairs = a.chunks(size).zip(b.chunks(size));
        self.changed += pairs.filter(|(a, b)| a != b).count() as u64;
        self.max_abs = f64::NAN;
        self.difference = f64::NAN;
    }

    fn change(&self) -> Change {
        if self.changed == 0 {
            return Change::None;
        }
        Change::Values {
            changed: self.changed,
            elements: self.elements,
            max_abs: self.max_abs,
            relative_l2: (self.difference / self.norm).sqrt(),
        }
    }
}
