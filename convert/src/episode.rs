//! One episode between its source and the writer.

use std::collections::BTreeMap;

use crate::picture::{ColorHistogram, Frame};

/// Numbers of every frame.
///
/// # Shapes
/// `values` is [frames, width], row-major.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Matrix {
    /// Numbers a frame.
    pub width: usize,
    /// All of them.
    pub values: Vec<f32>,
}

impl Matrix {
    /// Returns the number of frames.
    pub fn rows(&self) -> usize {
        self.values.len().checked_div(self.width).unwrap_or(0)
    }

    /// Returns the matrices side by side; the error says why they do not fit.
    pub(crate) fn beside(parts: &[Self], num_frames: usize) -> Result<Self, String> {
        let width = parts.iter().map(|part| part.width).sum();
        let mut values = Vec::with_capacity(width * num_frames);
        for row in 0..num_frames {
            for part in parts {
                let start = row * part.width;
                let row = part.values.get(start..start + part.width);
                values.extend_from_slice(row.ok_or("has fewer rows than frames")?);
            }
        }
        Ok(Self { width, values })
    }
}

/// What a source gives for the fields it was asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recording {
    /// The source's name of the episode.
    pub(crate) name: String,
    pub(crate) num_frames: usize,
    pub(crate) instruction: Option<String>,
    pub(crate) numbers: BTreeMap<String, Matrix>,
    pub(crate) cameras: BTreeMap<String, Vec<Frame>>,
}

/// An episode as the writer takes it.
#[derive(Clone, Debug)]
pub struct Episode {
    /// The source's name of the episode, for messages.
    pub name: String,
    /// The instruction; empty when the source has none.
    pub task: String,
    /// Number of frames.
    pub num_frames: usize,
    /// One matrix for each of the dataset's number features, in their order.
    pub numbers: Vec<Matrix>,
    /// The frames of each camera, in the order of the dataset's cameras.
    pub cameras: Vec<Vec<Frame>>,
    /// Grey levels of a sample of the frames of each camera.
    pub histograms: Vec<ColorHistogram>,
}

impl Episode {
    /// Returns the bytes of its images and numbers, which is about what it takes in a file.
    pub fn bytes(&self) -> u64 {
        let images = self.cameras.iter().flatten();
        let numbers: usize = self.numbers.iter().map(|matrix| matrix.values.len()).sum();
        images.map(|frame| frame.bytes.len() as u64).sum::<u64>() + 4 * numbers as u64
    }

    /// Returns the bytes of the images of one frame.
    pub(crate) fn frame_bytes(&self, frame: usize) -> u64 {
        let sizes = self.cameras.iter().map(|camera| camera[frame].bytes.len());
        sizes.sum::<usize>() as u64
    }
}
