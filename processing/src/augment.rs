//! Training-time augmentation as deterministic functions of the draws they are given.
//!
//! Nothing here is used in serving.

use pollen_core::Draws;
use serde::{Deserialize, Serialize};

use crate::photometric::{Change, Photometric};
use crate::pixels::Image;

/// What training does to an image after the resize.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Augmentation {
    /// Nothing.
    None,
    /// A shift by up to `pad` pixels in each direction (finetuning).
    RandomShift {
        /// Largest shift in pixels.
        pad: u32,
    },
    /// A crop and changes of colour (pretraining).
    CropAndColor(CropAndColor),
}

impl Augmentation {
    /// Augments one image.
    #[must_use]
    pub fn apply(&self, image: Image, draws: &mut Draws) -> Image {
        match self {
            Self::None => image,
            Self::RandomShift { pad } => image.random_shift(*pad, draws),
            Self::CropAndColor(ranges) => ranges.apply(image, draws),
        }
    }
}

/// Ranges of pretraining's augmentation, in the order of application.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CropAndColor {
    /// Whether to crop; off for wrist cameras.
    pub crop: bool,
    /// Share of the area that a crop keeps.
    pub area: [f32; 2],
    /// Width over height of a crop, drawn uniformly in its logarithm.
    pub aspect: [f32; 2],
    /// Largest brightness added or taken, for pixels in [0, 1].
    pub brightness: f32,
    /// Factor of the distance from each channel's mean.
    pub contrast: [f32; 2],
    /// Factor of the saturation.
    pub saturation: [f32; 2],
    /// Largest turn of the hue, as a share of the circle.
    pub hue: f32,
}

impl Default for CropAndColor {
    fn default() -> Self {
        Self {
            crop: true,
            area: [0.8, 1.0],
            aspect: [0.9, 1.1],
            brightness: 0.1,
            contrast: [0.9, 1.1],
            saturation: [0.9, 1.1],
            hue: 0.05,
        }
    }
}

/// One draw of everything that is random about an image.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Drawn {
    area: f32,
    aspect: f32,
    /// Top and left of the crop as shares of the room there is.
    offset: [f32; 2],
    brightness: f32,
    contrast: f32,
    saturation: f32,
    hue: f32,
}

impl CropAndColor {
    /// Crops and changes the colours of one image of the same size.
    ///
    /// Pixels are clipped to [0, 1] after every operation and truncated, not rounded, at the end.
    #[must_use]
    pub fn apply(&self, image: Image, draws: &mut Draws) -> Image {
        self.apply_drawn(image, self.draw(draws))
    }

    /// Draws the same number of values whatever is switched on.
    fn draw(&self, draws: &mut Draws) -> Drawn {
        let mut between = |[low, high]: [f32; 2]| low + (high - low) * draws.uniform_f32();
        Drawn {
            area: between(self.area),
            aspect: between(self.aspect.map(f32::ln)).exp(),
            offset: [between([0.0, 1.0]), between([0.0, 1.0])],
            brightness: between([-self.brightness, self.brightness]),
            contrast: between(self.contrast),
            saturation: between(self.saturation),
            hue: between([-self.hue, self.hue]),
        }
    }

    fn apply_drawn(&self, mut image: Image, drawn: Drawn) -> Image {
        let (width, planes) = (image.width(), image.planes_mut());
        let change = Change {
            crop: self.crop.then(|| crop_box(drawn)),
            brightness: drawn.brightness,
            contrast: drawn.contrast,
            saturation: drawn.saturation,
            hue: drawn.hue,
        };
        Photometric {
            planes,
            width,
            change,
        }
        .run();
        image
    }
}

/// Returns top, left, bottom, right as shares of the sides.
fn crop_box(drawn: Drawn) -> [f32; 4] {
    let height = (drawn.area / drawn.aspect).sqrt().clamp(0.0, 1.0);
    let width = (drawn.area * drawn.aspect).sqrt().clamp(0.0, 1.0);
    let (top, left) = (
        drawn.offset[0] * (1.0 - height),
        drawn.offset[1] * (1.0 - width),
    );
    [top, left, top + height, left + width]
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollen_core::Seed;

    const NOTHING: Drawn = Drawn {
        area: 1.0,
        aspect: 1.0,
        offset: [0.0; 2],
        brightness: 0.0,
        contrast: 1.0,
        saturation: 1.0,
        hue: 0.0,
    };

    fn photo(side: usize) -> Image {
        let mut draws = Seed::new(5).draws();
        let data = (0..3 * side * side).map(|_| draws.below(256) as u8);
        Image::from_planes(side, side, data.collect()).expect("sizes fit")
    }

    fn worst(a: &Image, b: &Image) -> u8 {
        let pairs = a.planes().iter().zip(b.planes());
        pairs.map(|(a, b)| a.abs_diff(*b)).max().expect("not empty")
    }

    #[test]
    fn drawing_nothing_changes_at_most_the_truncated_bit() {
        let image = photo(9);
        let same = CropAndColor::default().apply_drawn(image.clone(), NOTHING);
        assert!(worst(&image, &same) <= 1);
    }

    #[test]
    fn draws_stay_in_their_ranges_and_are_independent() {
        let ranges = CropAndColor::default();
        let mut areas = Vec::new();
        let mut contrasts = Vec::new();
        for i in 0..2000 {
            let drawn = ranges.draw(&mut Seed::new(i).draws());
            assert!((0.8..=1.0).contains(&drawn.area));
            assert!((0.9 - 1e-6..=1.1 + 1e-6).contains(&drawn.aspect));
            assert!(drawn.brightness.abs() <= 0.1 && drawn.hue.abs() <= 0.05);
            assert!((0.9..=1.1).contains(&drawn.contrast));
            assert!((0.9..=1.1).contains(&drawn.saturation));
            let [top, left, bottom, right] = crop_box(drawn);
            assert!(top >= 0.0 && left >= 0.0 && bottom < 1.0 + 1e-6 && right < 1.0 + 1e-6);
            areas.push(f64::from(drawn.area) - 0.9);
            contrasts.push(f64::from(drawn.contrast) - 1.0);
        }
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let variance = dot(&areas, &areas) / 2000.0;
        assert!(
            (variance - 0.2_f64.powi(2) / 12.0).abs() < 3e-4,
            "{variance}"
        );
        let correlation =
            dot(&areas, &contrasts) / (dot(&areas, &areas) * dot(&contrasts, &contrasts)).sqrt();
        assert!(correlation.abs() < 0.08, "{correlation}");
    }

    #[test]
    fn a_box_has_the_drawn_area_and_aspect() {
        let drawn = Drawn {
            area: 0.81,
            aspect: 1.1,
            offset: [1.0, 0.5],
            ..NOTHING
        };
        let [top, left, bottom, right] = crop_box(drawn);
        let (height, width) = (bottom - top, right - left);
        assert!((height * width - 0.81).abs() < 1e-5 && (width / height - 1.1).abs() < 1e-5);
        assert!((bottom - 1.0).abs() < 1e-6 && (left - (1.0 - right)).abs() < 1e-6);
    }

    #[test]
    fn brightness_is_added_and_clipped() {
        let image = Image::from_planes(1, 2, vec![10, 250, 0, 100, 128, 255]).expect("sizes");
        let ranges = CropAndColor {
            crop: false,
            ..CropAndColor::default()
        };
        let drawn = Drawn {
            brightness: 0.1,
            saturation: 1.0,
            ..NOTHING
        };
        let brighter = ranges.apply_drawn(image.clone(), drawn);
        for (before, after) in image.planes().iter().zip(brighter.planes()) {
            let expected = (f32::from(*before) + 25.5).min(255.0);
            assert!(
                (f32::from(*after) - expected).abs() <= 1.0,
                "{before} {after}"
            );
        }
    }

    #[test]
    fn saturation_zero_leaves_the_value() {
        let ranges = CropAndColor {
            crop: false,
            ..CropAndColor::default()
        };
        let image = Image::from_planes(1, 1, vec![200, 100, 50]).expect("sizes");
        let grey = ranges.apply_drawn(
            image,
            Drawn {
                saturation: 0.0,
                ..NOTHING
            },
        );
        assert!(grey.planes().iter().all(|byte| (199..=200).contains(byte)));
    }

    #[test]
    fn the_same_draws_give_the_same_image() {
        let image = photo(16);
        let augmentation = Augmentation::CropAndColor(CropAndColor::default());
        let once = augmentation.apply(image.clone(), &mut Seed::new(1).draws());
        let again = augmentation.apply(image.clone(), &mut Seed::new(1).draws());
        let other = augmentation.apply(image.clone(), &mut Seed::new(2).draws());
        assert_eq!(once, again);
        assert_ne!(once, other);
        assert_eq!(
            Augmentation::None.apply(image.clone(), &mut Seed::new(1).draws()),
            image
        );
    }

    #[test]
    fn configuration_uses_plain_words() {
        let shift: Augmentation =
            serde_json::from_str(r#"{"kind": "random_shift", "pad": 4}"#).expect("parses");
        assert_eq!(shift, Augmentation::RandomShift { pad: 4 });
        let color: Augmentation =
            serde_json::from_str(r#"{"kind": "crop_and_color", "crop": false}"#).expect("parses");
        let ranges = CropAndColor {
            crop: false,
            ..CropAndColor::default()
        };
        assert_eq!(color, Augmentation::CropAndColor(ranges));
    }
}
