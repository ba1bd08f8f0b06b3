//! Resizing with antialiasing, as the references do it.
//!
//! Both rules are separable: each output pixel is a weighted sum of the input pixels below a filter
//! that widens with the scale, first along rows, then along columns, in f32; the result is rounded
//! half to even. Bilinear is torchvision's `Resize(antialias=True)`, lanczos3 is TensorFlow's
//! `resize(method="lanczos3", antialias=True)`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::filter::{Filter, Taps};
use crate::pixels::{Image, check_padded, planes_of};

/// How an image is brought to the model's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResizeKind {
    /// The short side becomes the size, the aspect is kept; bilinear.
    BilinearShortSide,
    /// Both sides become the size, the aspect is not kept; lanczos3.
    Lanczos3Square,
}

impl ResizeKind {
    /// Half the width of the filter at scale 1.
    fn radius(self) -> f32 {
        match self {
            Self::BilinearShortSide => 1.0,
            Self::Lanczos3Square => 3.0,
        }
    }

    fn filter(self, x: f32) -> f32 {
        let x = x.abs();
        match self {
            Self::BilinearShortSide => (1.0 - x).max(0.0),
            Self::Lanczos3Square if x > 3.0 => 0.0,
            Self::Lanczos3Square if x <= 1e-3 => 1.0,
            Self::Lanczos3Square => {
                let angle = std::f64::consts::PI * f64::from(x);
                (3.0 * angle.sin() * (angle / 3.0).sin() / (angle * angle)) as f32
            }
        }
    }
}

/// Returns the weights of `from` input pixels for `to` output pixels.
fn taps(kind: ResizeKind, from: usize, to: usize) -> Taps {
    let scale = from as f32 / to as f32;
    let widening = scale.max(1.0);
    let support = kind.radius() * widening;
    let narrowing = 1.0 / widening;
    Taps::new((0..to).map(|i| {
        let center = scale * (i as f32 + 0.5);
        let first = (center - support + 0.5).max(0.0) as usize;
        let last = ((center + support + 0.5) as usize).min(from);
        let weight = |j: usize| kind.filter((j as f32 - center + 0.5) * narrowing);
        let mut weights: Vec<f32> = (first..last).map(weight).collect();
        let sum: f32 = weights.iter().sum();
        for weight in &mut weights {
            *weight /= sum;
        }
        (first, weights)
    }))
}

/// Resizes images to one size; keeps the filter weights of the sizes it has met.
#[derive(Debug)]
pub struct Resizer {
    kind: ResizeKind,
    side: usize,
    taps: Mutex<HashMap<(usize, usize), Arc<Taps>>>,
}

impl Resizer {
    /// Makes a resizer to `side` pixels.
    ///
    /// # Panics
    /// When `side` is zero.
    pub fn new(kind: ResizeKind, side: usize) -> Self {
        assert!(side > 0, "an image has at least one pixel");
        Self {
            kind,
            side,
            taps: Mutex::default(),
        }
    }

    /// Returns the size in pixels.
    pub fn side(&self) -> usize {
        self.side
    }

    /// Resizes; a short-side resize keeps the aspect, so the result may not be square.
    #[must_use]
    pub fn resize(&self, image: &Image) -> Image {
        let from = (image.height(), image.width());
        let to = self.size_of(from);
        let mut planes = vec![0; 3 * to.0 * to.1];
        self.fill((from, &image.to_padded()), to, &mut planes);
        Image::from_planes(to.0, to.1, planes).expect("the planes have the size just computed")
    }

    /// Resizes to [3, side, side], which is what a batch is made of; an image of that size is
    /// returned as it is.
    ///
    /// # Errors
    /// When the result would not be square.
    pub fn resize_square(&self, image: Image) -> Result<Image, Error> {
        let from = (image.height(), image.width());
        self.check_square(from)?;
        if from == (self.side, self.side) {
            return Ok(image);
        }
        Ok(self.resize(&image))
    }

    /// Resizes pixels as a decoder gives them, with no image in between, into their place in a batch.
    ///
    /// # Shapes
    /// `pixels` is [height, width, 4], of which the fourth byte is ignored; `planes` is
    /// [3, side, side].
    ///
    /// # Errors
    /// When the result would not be square, or the pixels are more or fewer.
    ///
    /// # Panics
    /// When the planes are longer or shorter.
    pub fn resize_square_into(
        &self,
        (height, width): (usize, usize),
        pixels: &[u8],
        planes: &mut [u8],
    ) -> Result<(), Error> {
        let side = self.side;
        assert_eq!(planes.len(), 3 * side * side, "bytes of the planes");
        check_padded(height, width, pixels.len())?;
        self.check_square((height, width))?;
        self.fill(((height, width), pixels), (side, side), planes);
        Ok(())
    }

    fn fill(&self, (from, pixels): ((usize, usize), &[u8]), to: (usize, usize), planes: &mut [u8]) {
        if from == to {
            return planes_of(pixels, planes);
        }
        let (rows, columns) = (self.taps(from.0, to.0), self.taps(from.1, to.1));
        let (rows, columns, width) = (&*rows, &*columns, from.1);
        match self.kind {
            ResizeKind::BilinearShortSide => Filter::<true> {
                pixels,
                width,
                rows,
                columns,
                planes,
            }
            .run(),
            ResizeKind::Lanczos3Square => Filter::<false> {
                pixels,
                width,
                rows,
                columns,
                planes,
            }
            .run(),
        }
    }

    fn check_square(&self, (height, width): (usize, usize)) -> Result<(), Error> {
        if self.size_of((height, width)) == (self.side, self.side) {
            Ok(())
        } else {
            Err(Error::NotSquare { height, width })
        }
    }

    fn size_of(&self, (height, width): (usize, usize)) -> (usize, usize) {
        match self.kind {
            ResizeKind::Lanczos3Square => (self.side, self.side),
            ResizeKind::BilinearShortSide if height <= width => {
                (self.side, self.side * width / height)
            }
            ResizeKind::BilinearShortSide => (self.side * height / width, self.side),
        }
    }

    fn taps(&self, from: usize, to: usize) -> Arc<Taps> {
        // A panic elsewhere leaves the map whole: entries are only ever added.
        let mut known = self.taps.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = known.entry((from, to));
        Arc::clone(entry.or_insert_with(|| Arc::new(taps(self.kind, from, to))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use crate::pixels::{PIXEL_MEAN, PIXEL_STD, normalize_pixels};
    use proptest::prelude::*;

    #[test]
    fn golden_preprocess() {
        let bytes = golden::read("augment_free_preprocess.safetensors");
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("metadata");
        let metadata = header.metadata().as_ref().expect("metadata");
        let tolerance: serde_json::Value =
            serde_json::from_str(&metadata["tolerance"]).expect("tolerance");
        let config: serde_json::Value = serde_json::from_str(&metadata["config"]).expect("config");
        for c in 0..3 {
            let theirs = |key: &str| config[key][c].as_f64().expect("a number") as f32;
            assert_eq!(
                [theirs("mean"), theirs("std")],
                [PIXEL_MEAN[c], PIXEL_STD[c]]
            );
        }
        let tolerated = |key: &str| tolerance[key].as_f64().expect("a number");
        let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("tensors");
        let image = |name: &str| {
            let view = tensors.tensor(name).expect("tensor");
            Image::from_planes(view.shape()[1], view.shape()[2], view.data().to_vec())
                .expect("sizes fit")
        };
        let mut outputs = 0;
        for from in [64, 200, 256] {
            let input = image(&format!("input.image_u8_{from}"));
            for side in [112, 224] {
                let resizer = Resizer::new(ResizeKind::BilinearShortSide, side);
                let ours = resizer.resize_square(input.clone()).expect("square");
                let theirs = image(&format!("output.resized_u8_{from}_to_{side}"));
                // The file allows 1 level in 2 % of the values; the same arithmetic gives none.
                assert!(ours == theirs, "{from} to {side} differs");

                let values = normalize_pixels(theirs.planes());
                let name = format!("output.model_input_{from}_to_{side}_every7");
                let view = tensors.tensor(&name).expect("tensor");
                let mut expected = view.data().as_chunks::<4>().0.iter();
                let every7 = (0..3 * side * side)
                    .filter(|i| (i / side) % side % 7 == 0 && i % side % 7 == 0);
                for i in every7 {
                    let expected = f32::from_le_bytes(*expected.next().expect("as many"));
                    let off = f64::from((values[i] - expected).abs());
                    assert!(off <= tolerated("atol_given_the_same_u8"), "{name}: {off}");
                }
                assert!(expected.next().is_none(), "{name} has more values");
                outputs += 2;
            }
        }
        let stored = tensors
            .names()
            .iter()
            .filter(|n| n.starts_with("output."))
            .count();
        assert_eq!(outputs, stored, "every stored output is compared");
    }

    /// A 5 x 7 image, and what Pillow 13 makes of it in 32-bit float mode with its LANCZOS filter
    /// (the same kernel, written independently).
    const SMALL: [u8; 35] = [
        217, 163, 130, 69, 78, 10, 19, 4, 44, 208, 166, 233, 128, 155, 248, 186, 161, 139, 143,
        239, 71, 208, 171, 0, 100, 219, 141, 8, 195, 186, 216, 44, 22, 220, 5,
    ];
    const LANCZOS_4: [f32; 16] = [
        145.2956, 127.2297, 88.625, 37.2568, 91.8994, 177.6617, 191.4391, 161.3196, 225.146,
        75.6103, 179.2348, 99.1621, 192.4307, 124.6394, 89.5842, 94.0569,
    ];
    const LANCZOS_10_FIRST_ROW: [f32; 10] = [
        258.2881, 223.8702, 163.9277, 121.2215, 69.17, 54.4211, 53.058, 11.3799, -7.3768, -0.5833,
    ];

    #[test]
    fn lanczos_matches_an_independent_implementation() {
        let image = Image::from_planes(5, 7, SMALL.repeat(3)).expect("sizes fit");
        let rounded = |values: &[f32]| values.iter().map(|v| v.round() as u8).collect::<Vec<u8>>();
        let smaller = Resizer::new(ResizeKind::Lanczos3Square, 4).resize(&image);
        assert_eq!(smaller.planes(), rounded(&LANCZOS_4).repeat(3));
        let larger = Resizer::new(ResizeKind::Lanczos3Square, 10).resize(&image);
        assert_eq!(larger.planes()[..10], rounded(&LANCZOS_10_FIRST_ROW));
    }

    #[test]
    fn the_short_side_decides_and_the_aspect_stays() {
        let image = Image::from_planes(48, 64, vec![9; 3 * 48 * 64]).expect("sizes fit");
        let resizer = Resizer::new(ResizeKind::BilinearShortSide, 25);
        let resized = resizer.resize(&image);
        assert_eq!((resized.height(), resized.width()), (25, 33));
        let error = resizer.resize_square(image).expect_err("not square");
        assert!(error.to_string().contains("lanczos3_square"), "{error}");
        let upright = Image::from_planes(64, 48, vec![9; 3 * 48 * 64]).expect("sizes fit");
        let resized = resizer.resize(&upright);
        assert_eq!((resized.height(), resized.width()), (33, 25));
    }

    proptest! {
        #[test]
        fn constants_stay_and_equal_sizes_are_copies(
            height in 1_usize..40, width in 1_usize..40, side in 1_usize..40, grey: u8
        ) {
            for kind in [ResizeKind::BilinearShortSide, ResizeKind::Lanczos3Square] {
                let grey = vec![grey; 3 * height * width];
                let image = Image::from_planes(height, width, grey).expect("sizes fit");
                let resized = Resizer::new(kind, side).resize(&image);
                prop_assert!(resized.planes().iter().all(|p| p == &image.planes()[0]));
                prop_assert_eq!(resized.height().min(resized.width()), side);
            }
            let data = (0..3 * side * side).map(|i| (i * 89 % 256) as u8).collect();
            let image = Image::from_planes(side, side, data).expect("sizes fit");
            let resized = Resizer::new(ResizeKind::Lanczos3Square, side).resize(&image);
            prop_assert_eq!(resized, image);
        }

        #[test]
        fn bilinear_matches_the_definition_in_f64(
            side in 1_usize..24, from in 1_usize..24, seed: u32
        ) {
            let byte = |i: usize| (i as u32).wrapping_mul(seed | 1).wrapping_mul(0x9e37_79b1) >> 24;
            let data: Vec<u8> = (0..3 * from * from).map(|i| byte(i) as u8).collect();
            let image = Image::from_planes(from, from, data.clone()).expect("sizes fit");
            let ours = Resizer::new(ResizeKind::BilinearShortSide, side).resize(&image);
            let scale = from as f64 / side as f64;
            let weights = |i: usize| {
                let tent = |j: usize| {
                    let x = (j as f64 + 0.5 - scale * (i as f64 + 0.5)) / scale.max(1.0);
                    (1.0 - x.abs()).max(0.0)
                };
                let all: Vec<f64> = (0..from).map(tent).collect();
                let sum: f64 = all.iter().sum();
                all.into_iter().map(|w| w / sum).collect::<Vec<f64>>()
            };
            for (y, x) in [(0, 0), (side - 1, side / 2), (side / 2, side - 1)] {
                let (rows, columns) = (weights(y), weights(x));
                let mut value = 0.0;
                for (j, row) in rows.iter().enumerate() {
                    for (i, column) in columns.iter().enumerate() {
                        value += row * column * f64::from(data[j * from + i]);
                    }
                }
                let ours = f64::from(ours.planes()[y * side + x]);
                prop_assert!((ours - value).abs() < 0.501, "{} {}", ours, value);
            }
        }
    }
}
