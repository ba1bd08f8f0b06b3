//! What a stage leaves: `OUT/<stage>.json`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pollen_trainer::device_check::Findings;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::args::{CheckedDevice, GpuCheckArgs};

/// How a stage ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    /// Everything holds.
    Pass,
    /// Something does not, or the stage did not come to its end.
    Fail,
    /// It cannot be run here.
    Skip,
}

impl Status {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "FAIL",
            Self::Skip => "skipped",
        }
    }
}

/// The file of a stage.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) stage: String,
    pub(super) status: Status,
    /// Why it failed before its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    failure: Option<String>,
    /// cpu or cuda.
    device: String,
    /// Models of the machine's NVIDIA GPUs.
    gpus: Vec<String>,
    /// Version of the NVIDIA driver, if there is one.
    driver: Option<String>,
    /// SHA-256 of the program.
    binary: String,
    version: String,
    /// Whether steps were left out.
    quick: bool,
    pub(super) seconds: f64,
    #[serde(flatten)]
    findings: Findings,
}

impl Record {
    pub(super) fn new(args: &GpuCheckArgs, binary: &str, stage: &str, findings: Findings) -> Self {
        let status = if findings.skipped.is_some() {
            Status::Skip
        } else if findings.pass() {
            Status::Pass
        } else {
            Status::Fail
        };
        Self {
            stage: stage.into(),
            status,
            failure: None,
            device: device(args).into(),
            gpus: gpus(),
            driver: driver(),
            binary: binary.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            quick: args.quick,
            seconds: 0.0,
            findings,
        }
    }

    /// Returns the record of a stage that did not come to its end.
    pub(super) fn failed(args: &GpuCheckArgs, binary: &str, stage: &str, failure: String) -> Self {
        Self {
            status: Status::Fail,
            failure: Some(failure),
            ..Self::new(args, binary, stage, Findings::default())
        }
    }

    /// Returns whether the stage passed with this program on this device and need not run again.
    pub(super) fn still_counts(&self, args: &GpuCheckArgs, binary: &str) -> bool {
        self.status == Status::Pass
            && self.binary == binary
            && self.device == device(args)
            && (!self.quick || args.quick)
    }

    /// Returns one line for people.
    pub(super) fn line(&self) -> String {
        let why = match (&self.findings.skipped, &self.failure, self.findings.worst()) {
            (Some(reason), ..) | (None, Some(reason), _) => reason.clone(),
            (None, None, None) => "nothing was measured".into(),
            (None, None, Some(worst)) => {
                let value = match worst.value {
                    Some(value) => format!("{value:.3e} of {:.3e}", worst.bound),
                    None => "wrong".into(),
                };
                let count = self.findings.findings.len();
                format!("{value}, {} (nearest to its bound of {count})", worst.what)
            }
        };
        let (stage, status) = (&self.stage, self.status.name());
        format!("{stage:16} {status:8} {:6.1} s  {why}\n", self.seconds)
    }

    fn path(out: &Path, stage: &str) -> PathBuf {
        out.join(format!("{stage}.json"))
    }

    pub(super) fn read(out: &Path, stage: &str) -> Result<Option<Self>> {
        let path = Self::path(out, stage);
        match std::fs::read(&path) {
            // A file that was cut, or of another version: the stage runs again.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    pub(super) fn remove(out: &Path, stage: &str) -> Result<()> {
        let path = Self::path(out, stage);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Writes the file, whole or not at all.
    pub(super) fn write(&self, out: &Path) -> Result<()> {
        let path = Self::path(out, &self.stage);
        let draft = path.with_extension("json.new");
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(&draft, text)
            .and_then(|()| std::fs::rename(&draft, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

fn device(args: &GpuCheckArgs) -> &'static str {
    match args.device {
        CheckedDevice::Cuda => "cuda",
        CheckedDevice::Cpu => "cpu",
    }
}

fn driver() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    text.lines().next().map(|line| line.trim().to_owned())
}

/// Asks the driver which GPUs there are.
fn gpus() -> Vec<String> {
    let folders = std::fs::read_dir("/proc/driver/nvidia/gpus")
        .into_iter()
        .flatten()
        .flatten();
    let texts =
        folders.filter_map(|gpu| std::fs::read_to_string(gpu.path().join("information")).ok());
    let model = |text: String| {
        let line = text.lines().find_map(|line| line.strip_prefix("Model:"));
        line.map(|model| model.trim().to_owned())
    };
    texts.filter_map(model).collect()
}

/// Returns the SHA-256 of this program.
pub(super) fn binary_hash() -> Result<String> {
    let path = std::env::current_exe().context("cannot tell where this program lies")?;
    let mut file =
        std::fs::File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut digest = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        match std::io::Read::read(&mut file, &mut piece)? {
            0 => break,
            length => digest.update(&piece[..length]),
        }
    }
    Ok(digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}
