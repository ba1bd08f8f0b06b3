//! `pollen bench --operations`: single operations at the shapes that a run in PyTorch had.

use std::path::Path;

use anyhow::{Context, Result};
use pollen_core::{ConfigError, ExitCode};
use pollen_model::{Operation, OperationKind, Precision};
use pollen_trainer::device::Seat;
use serde::Deserialize;
use serde_json::json;

use super::bench::{emit, median, times, usage, wait};
use crate::args::BenchArgs;

/// A line of `benches/pytorch/micro.py`; lines without a shape tell of other things.
#[derive(Debug, PartialEq, Deserialize)]
struct Case {
    kind: OperationKind,
    shape: Vec<usize>,
    dtype: Precision,
}

/// Measures each operation once, however many ways PyTorch had for it.
pub(super) fn run(args: &BenchArgs, file: &Path) -> Result<ExitCode> {
    let path = file.display().to_string();
    let text = std::fs::read_to_string(file).map_err(|source| ConfigError::Read {
        path: path.clone(),
        source,
    })?;
    let cases = cases(&text).map_err(|fault| usage(&path, &format!("{fault:#}")))?;
    let device = Seat::of(args.device, 0)?.open()?;
    for case in cases {
        let mut line = json!({
            "kind": case.kind,
            "shape": case.shape,
            "dtype": case.dtype,
        });
        for (name, device) in [
            ("forward_ms", device.clone()),
            ("training_ms", device.clone().autodiff()),
        ] {
            let operation = Operation::new(case.kind, &case.shape, case.dtype, &device);
            let operation = operation.map_err(|fault| usage(&path, &fault))?;
            wait(&device)?;
            let spent = times(args, || {
                let results = operation.run();
                wait(&device)?;
                drop(results);
                Ok(())
            })?;
            line[name] = json!(median(&spent));
        }
        emit(&line)?;
    }
    Ok(ExitCode::Done)
}

/// Returns the different operations of a file of JSON lines.
fn cases(text: &str) -> Result<Vec<Case>> {
    let mut cases: Vec<Case> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let place = || format!("line {}", number + 1);
        let value: serde_json::Value = serde_json::from_str(line).with_context(place)?;
        if value.get("shape").is_none() {
            continue;
        }
        let case = serde_json::from_value(value).with_context(place)?;
        if !cases.contains(&case) {
            cases.push(case);
        }
    }
    anyhow::ensure!(!cases.is_empty(), "no line has a shape");
    Ok(cases)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_operation_is_measured_once_and_other_lines_are_left_out() {
        let text = r#"{"torch": "2.9"}
            {"kind": "depthwise", "name": "stage 0, conv", "shape": [2, 8, 8, 4], "dtype": "f32"}
            {"kind": "depthwise", "name": "stage 0, shifts", "shape": [2, 8, 8, 4], "dtype": "f32"}
            {"kind": "softmax", "name": "text", "error": "out of memory"}
            {"kind": "softmax", "name": "text", "shape": [9, 5], "dtype": "bf16"}"#;
        let cases = cases(text).expect("two cases");
        let kinds: Vec<_> = cases.iter().map(|case| case.kind).collect();
        assert_eq!(kinds, [OperationKind::Depthwise, OperationKind::Softmax]);
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        for (text, word) in [
            ("{\"a\": 1}\nnope", "line 2"),
            (
                r#"{"kind": "sort", "shape": [1], "dtype": "f32"}"#,
                "line 1",
            ),
            ("{}", "no line has a shape"),
        ] {
            let error = format!("{:#}", cases(text).expect_err(word));
            assert!(error.contains(word), "{error}");
        }
    }
}
