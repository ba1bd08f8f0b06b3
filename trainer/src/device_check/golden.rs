//! The published code's results: all golden files of the model.

use std::cmp::Ordering;

use pollen_model::golden::{Comparison, compare, names};
use serde_json::json;

use super::{Findings, Site};
use crate::device::caught;
use crate::error::Error;

pub(super) fn run(site: &Site, findings: &mut Findings) -> Result<(), Error> {
    let allowance = site.allowance();
    for name in names() {
        // A kernel that cannot be built panics; the other files may still be right.
        let compared = match caught(|| compare(&site.golden, name, &site.device)) {
            Ok(compared) => compared?,
            Err(said) => {
                findings.wrong(format!("{name}: {said}"));
                continue;
            }
        };
        let coarse: Vec<_> = compared.iter().filter(|one| !one.holds(0.0)).collect();
        findings.measured(
            name,
            json!({ "compared": compared.len(), "beyond_f32_bounds": coarse }),
        );
        let rank = |one: &Comparison| (!one.holds(allowance), one.relative);
        let worst = compared
            .iter()
            .max_by(|a, b| rank(a).partial_cmp(&rank(b)).unwrap_or(Ordering::Equal));
        match worst {
            None => findings.wrong(format!("{name}: nothing was compared")),
            // Right as a whole and wrong in one value.
            Some(Comparison {
                relative,
                limit,
                outside: Some(value),
                ..
            }) if relative > &allowance && relative <= limit => {
                findings.wrong(format!("{name}: {value}"));
            }
            Some(one) => findings.at_most(
                format!("{name} {}", one.name),
                one.relative,
                one.limit.max(allowance),
            ),
        }
    }
    Ok(())
}
