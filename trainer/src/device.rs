//! Where a worker computes: the recipe's choice, what this build and this machine offer, and what to
//! do when they do not meet.

pub use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Recipe key `train.device`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceChoice {
    /// A GPU where the build and the machine have one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU; without one the run does not start.
    Cuda,
}

/// What a worker computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl DeviceKind {
    /// Returns the kind of an open device, with or without autodiff.
    pub fn of(device: &Device) -> Self {
        if device.clone().inner() == Device::flex() {
            Self::Cpu
        } else {
            Self::Cuda
        }
    }

    /// Returns the name used in events and plans.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// What a build and a machine offer.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Whether the build has CUDA.
    pub cuda_build: bool,
    /// GPUs that this process may use.
    pub gpus: usize,
    /// Whether a driver for NVIDIA GPUs is loaded, whatever the build can do with it.
    pub driver: bool,
    /// Whether somebody chose the GPUs of this process (`CUDA_VISIBLE_DEVICES`).
    pub assigned: bool,
}

impl Offer {
    /// Asks this build and this machine.
    pub fn here() -> Self {
        Self {
            cuda_build: cfg!(feature = "cuda"),
            gpus: gpus(),
            driver: std::path::Path::new("/proc/driver/nvidia/version").exists(),
            assigned: std::env::var_os("CUDA_VISIBLE_DEVICES").is_some(),
        }
    }

    /// Says in one line why there is no GPU; none if there is one.
    pub fn lacks(&self) -> Option<&'static str> {
        match (self.cuda_build, self.driver, self.gpus) {
            (true, _, 1..) => None,
            (true, true, 0) if self.assigned => {
                Some("CUDA_VISIBLE_DEVICES hides every GPU from this process")
            }
            (true, true, 0) => Some("the NVIDIA driver shows no GPU to this process"),
            (true, false, 0) => Some("this machine has no NVIDIA driver"),
            (false, ..) => Some("this build has no CUDA (make build-cuda makes one that has)"),
        }
    }
}

#[cfg(feature = "cuda")]
fn gpus() -> usize {
    use burn::tensor::DeviceType;
    crate::kernel_cache::open();
    // Without the driver's library the list is empty.
    caught(|| Device::enumerate(DeviceType::Cuda).len()).unwrap_or(0)
}

/// Runs what panics where the driver or the toolkit is broken; the panic becomes its words.
pub(crate) fn caught<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).map_err(|payload| {
        let said = payload.downcast_ref::<String>().cloned();
        let said = said.or_else(|| {
            payload
                .downcast_ref::<&str>()
                .map(|&words| words.to_owned())
        });
        said.unwrap_or_else(|| "no reason given".into())
    })
}

#[cfg(not(feature = "cuda"))]
fn gpus() -> usize {
    0
}

impl DeviceChoice {
    /// Returns what is computed on, and a line for the user where that may surprise.
    ///
    /// # Errors
    /// When a GPU is wanted and there is none.
    pub fn resolve(self, offer: &Offer) -> Result<(DeviceKind, Option<String>), Error> {
        match (self, offer.lacks()) {
            (Self::Cpu, _) => Ok((DeviceKind::Cpu, None)),
            (Self::Auto | Self::Cuda, None) => Ok((DeviceKind::Cuda, None)),
            (Self::Cuda, Some(reason)) => Err(Error::Recipe(vec![format!(
                "train.device = \"cuda\" finds no GPU: {reason}; set train.device=cpu to use the CPU"
            )])),
            (Self::Auto, Some(reason)) => {
                let note = (offer.cuda_build || offer.driver)
                    .then(|| format!("no GPU is used: {reason}; going on with the CPU"));
                Ok((DeviceKind::Cpu, note))
            }
        }
    }

    /// Returns what a plan assumes: a GPU that is asked for counts as there, since plans are made
    /// on other machines than runs.
    pub fn planned(self, offer: &Offer) -> DeviceKind {
        match self {
            Self::Cuda => DeviceKind::Cuda,
            other => other
                .resolve(offer)
                .map_or(DeviceKind::Cpu, |(kind, _)| kind),
        }
    }
}

/// Where a worker computes, before anything is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seat {
    /// On the CPU.
    Cpu,
    /// On the GPU of this number.
    Gpu(usize),
}

impl Seat {
    /// Returns the seat of the worker that is number `local_rank` on its machine.
    ///
    /// # Errors
    /// When there is no GPU for it.
    pub fn of(choice: DeviceChoice, local_rank: u32) -> Result<Self, Error> {
        let offer = Offer::here();
        let (kind, note) = choice.resolve(&offer)?;
        if let Some(note) = note {
            tracing::warn!("{note}");
        }
        Ok(match kind {
            DeviceKind::Cpu => Self::Cpu,
            DeviceKind::Cuda => Self::Gpu(gpu_of(local_rank, &offer)?),
        })
    }

    /// Returns the kind of device.
    pub fn kind(self) -> DeviceKind {
        match self {
            Self::Cpu => DeviceKind::Cpu,
            Self::Gpu(_) => DeviceKind::Cuda,
        }
    }

    /// Returns the number of the GPU, if it is one.
    pub fn gpu(self) -> Option<usize> {
        match self {
            Self::Cpu => None,
            Self::Gpu(index) => Some(index),
        }
    }

    /// Opens the device.
    ///
    /// # Errors
    /// When the GPU cannot run a first kernel.
    pub fn open(self) -> Result<Device, Error> {
        match self {
            Self::Cpu => Ok(Device::flex()),
            Self::Gpu(index) => cuda(index),
        }
    }
}

/// Returns the GPU of a worker: its own, or the only one that it was given.
fn gpu_of(local_rank: u32, offer: &Offer) -> Result<usize, Error> {
    let index = local_rank as usize;
    match offer.gpus {
        1 if offer.assigned => Ok(0),
        gpus if index < gpus => Ok(index),
        gpus => Err(Error::Recipe(vec![format!(
            "worker {local_rank} of this machine has no GPU of its own: {gpus} are visible; start \
             at most {gpus} workers a machine (launch.workers, --ntasks-per-node), or give each its \
             GPU in CUDA_VISIBLE_DEVICES"
        )])),
    }
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> Result<Device, Error> {
    use burn::tensor::Tensor;
    let fault = |reason: String| {
        Error::Recipe(vec![format!(
            "GPU {index} cannot run a first kernel: {reason}; the driver and the CUDA toolkit's \
             NVRTC with its headers must be installed (CUDA_PATH names the toolkit)"
        )])
    };
    crate::kernel_cache::open();
    let device = Device::cuda(index);
    let first = || Tensor::<1>::ones([256], &device).sum().into_scalar::<f32>();
    match caught(first) {
        Ok(256.0) => Ok(device),
        Ok(sum) => Err(fault(format!("256 ones sum up to {sum}"))),
        Err(said) => Err(fault(said)),
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda(_index: usize) -> Result<Device, Error> {
    Err(Error::internal("a build without CUDA chose CUDA"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(cuda_build: bool, driver: bool, gpus: usize, assigned: bool) -> Offer {
        Offer {
            cuda_build,
            gpus,
            driver,
            assigned,
        }
    }

    #[test]
    fn auto_takes_a_gpu_where_there_is_one_and_says_why_not() {
        let (kind, note) = DeviceChoice::Auto
            .resolve(&offer(true, true, 2, false))
            .expect("a GPU");
        assert_eq!((kind, note), (DeviceKind::Cuda, None));
        for (offer, words) in [
            (offer(true, false, 0, false), Some("no NVIDIA driver")),
            (offer(true, true, 0, false), Some("shows no GPU")),
            (
                offer(true, true, 0, true),
                Some("CUDA_VISIBLE_DEVICES hides"),
            ),
            (offer(false, true, 0, false), Some("make build-cuda")),
            (offer(false, false, 0, false), None),
        ] {
            let (kind, note) = DeviceChoice::Auto.resolve(&offer).expect("the CPU");
            assert_eq!(kind, DeviceKind::Cpu);
            assert_eq!(note.is_some(), words.is_some(), "{offer:?}");
            if let (Some(note), Some(words)) = (note, words) {
                assert!(note.contains(words) && !note.contains('\n'), "{note}");
                assert!(note.contains("CPU"), "{note}");
            }
            let error = DeviceChoice::Cuda.resolve(&offer).expect_err("no GPU");
            assert!(error.to_string().contains("train.device=cpu"), "{error}");
            assert_eq!(DeviceChoice::Cuda.planned(&offer), DeviceKind::Cuda);
        }
        let (kind, note) = DeviceChoice::Cpu
            .resolve(&offer(true, true, 2, false))
            .expect("the CPU");
        assert_eq!((kind, note), (DeviceKind::Cpu, None));
    }

    #[test]
    fn every_worker_has_a_gpu_of_its_own() {
        assert_eq!(gpu_of(3, &offer(true, true, 4, false)).expect("own"), 3);
        assert_eq!(gpu_of(3, &offer(true, true, 1, true)).expect("given"), 0);
        for shared in [offer(true, true, 1, false), offer(true, true, 2, true)] {
            let error = gpu_of(2, &shared).expect_err("none left").to_string();
            assert!(error.contains("CUDA_VISIBLE_DEVICES"), "{error}");
        }
    }

    #[test]
    fn the_cpu_is_always_there() {
        let seat = Seat::of(DeviceChoice::Cpu, 7).expect("the CPU");
        assert_eq!((seat.kind(), seat.gpu()), (DeviceKind::Cpu, None));
        assert_eq!(seat.open().expect("the CPU"), Device::flex());
    }
}
