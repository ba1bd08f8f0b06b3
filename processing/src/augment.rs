//! Training-time augmentation as deterministic functions of the draws they are given.
//!
//! Nothing here is used in serving.

use pollen_core::Draws;
use serde::{Deserialize, Serialize};

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
            Self::CropAndColor(ranges) => ranges.apply(&image, draws),
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
    pub fn apply(&self, image: &Image, draws: &mut Draws) -> Image {
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

    fn apply_drawn(&self, image: &Image, drawn: Drawn) -> Image {
        let (height, width) = (image.height(), image.width());
        let scaled = image.planes().iter().map(|&byte| f32::from(byte) / 255.0);
        let mut pixels: Vec<f32> = scaled.collect();
        if self.crop {
            pixels = crop_and_resize(&pixels, height, width, crop_box(drawn));
            clip(&mut pixels);
        }
        for value in &mut pixels {
            *value = (*value + drawn.brightness).clamp(0.0, 1.0);
        }
        adjust_contrast(&mut pixels, drawn.contrast);
        clip(&mut pixels);
        adjust_hsv(&mut pixels, |[h, s, v]| {
            [h, (s * drawn.saturation).clamp(0.0, 1.0), v]
        });
        clip(&mut pixels);
        adjust_hsv(&mut pixels, |[h, s, v]| {
            [(h + drawn.hue).rem_euclid(1.0), s, v]
        });
        clip(&mut pixels);
        let bytes = pixels.iter().map(|value| (value * 255.0) as u8);
        Image::from_planes(height, width, bytes.collect()).expect("the size did not change")
    }
}

fn clip(pixels: &mut [f32]) {
    for value in pixels {
        *value = value.clamp(0.0, 1.0);
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

/// Cuts a box out and stretches it to the whole image: bilinear without antialiasing, corner pixels
/// of the box on corner pixels of the result (TensorFlow's `crop_and_resize`).
fn crop_and_resize(pixels: &[f32], height: usize, width: usize, crop: [f32; 4]) -> Vec<f32> {
    /// For each output position the two input positions and the share of the second.
    fn positions(len: usize, from: f32, to: f32) -> Vec<(usize, usize, f32)> {
        let last = (len - 1) as f32;
        let step = if len > 1 { to - from } else { 0.0 };
        let start = if len > 1 { from * last } else { 0.0 };
        (0..len)
            .map(|i| {
                let at = (start + i as f32 * step).clamp(0.0, last);
                (at.floor() as usize, at.ceil() as usize, at - at.floor())
            })
            .collect()
    }
    let [top, left, bottom, right] = crop;
    let rows = positions(height, top, bottom);
    let columns = positions(width, left, right);
    let mut out = Vec::with_capacity(pixels.len());
    for plane in pixels.chunks_exact(height * width) {
        for &(y0, y1, down) in &rows {
            let (upper, lower) = (&plane[y0 * width..], &plane[y1 * width..]);
            out.extend(columns.iter().map(|&(x0, x1, across)| {
                let top = upper[x0] + (upper[x1] - upper[x0]) * across;
                let bottom = lower[x0] + (lower[x1] - lower[x0]) * across;
                top + (bottom - top) * down
            }));
        }
    }
    out
}

fn adjust_contrast(pixels: &mut [f32], factor: f32) {
    let area = pixels.len() / 3;
    for plane in pixels.chunks_exact_mut(area) {
        let sum: f64 = plane.iter().map(|&value| f64::from(value)).sum();
        let mean = (sum / area as f64) as f32;
        for value in plane {
            *value = (*value - mean) * factor + mean;
        }
    }
}

fn adjust_hsv(pixels: &mut [f32], change: impl Fn([f32; 3]) -> [f32; 3]) {
    let area = pixels.len() / 3;
    let (red, rest) = pixels.split_at_mut(area);
    let (green, blue) = rest.split_at_mut(area);
    for ((r, g), b) in red.iter_mut().zip(green).zip(blue) {
        [*r, *g, *b] = hsv_to_rgb(change(rgb_to_hsv([*r, *g, *b])));
    }
}

/// Returns hue, saturation and value, all in [0, 1].
fn rgb_to_hsv([r, g, b]: [f32; 3]) -> [f32; 3] {
    let value = r.max(g).max(b);
    let range = value - r.min(g).min(b);
    let saturation = if value > 0.0 { range / value } else { 0.0 };
    if range <= 0.0 {
        return [0.0, saturation, value];
    }
    let sixth = 1.0 / (6.0 * range);
    let hue = if r == value {
        sixth * (g - b)
    } else if g == value {
        sixth * (b - r) + 2.0 / 6.0
    } else {
        sixth * (r - g) + 4.0 / 6.0
    };
    [if hue < 0.0 { hue + 1.0 } else { hue }, saturation, value]
}

fn hsv_to_rgb([hue, saturation, value]: [f32; 3]) -> [f32; 3] {
    let angle = hue * 6.0;
    let pure = [
        (angle - 3.0).abs() - 1.0,
        2.0 - (angle - 2.0).abs(),
        2.0 - (angle - 4.0).abs(),
    ];
    pure.map(|p| ((1.0 - saturation) + saturation * p.clamp(0.0, 1.0)) * value)
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
        let same = CropAndColor::default().apply_drawn(&image, NOTHING);
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
    fn a_crop_is_the_bilinear_stretch_of_its_box() {
        // A ramp along x and y is reproduced exactly by bilinear interpolation.
        let side = 8;
        let ramp: Vec<f32> = (0..3 * side * side)
            .map(|i| ((i % side) as f32 + 3.0 * (i / side % side) as f32) / 40.0)
            .collect();
        let [top, left, bottom, right] = [0.1, 0.2, 0.9, 1.0];
        let out = crop_and_resize(&ramp, side, side, [top, left, bottom, right]);
        for (i, value) in out.iter().enumerate() {
            let (y, x) = ((i / side % side) as f32 / 7.0, (i % side) as f32 / 7.0);
            let (y, x) = (top + y * (bottom - top), left + x * (right - left));
            let expected = (7.0 * x + 21.0 * y) / 40.0;
            assert!((value - expected).abs() < 1e-5, "{i}: {value} {expected}");
        }
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
        let brighter = ranges.apply_drawn(&image, drawn);
        for (before, after) in image.planes().iter().zip(brighter.planes()) {
            let expected = (f32::from(*before) + 25.5).min(255.0);
            assert!(
                (f32::from(*after) - expected).abs() <= 1.0,
                "{before} {after}"
            );
        }
    }

    #[test]
    fn contrast_scales_about_each_channels_mean() {
        let mut pixels = vec![0.2, 0.4, 0.5, 0.5, 0.0, 1.0];
        adjust_contrast(&mut pixels, 0.5);
        let expected = [0.25, 0.35, 0.5, 0.5, 0.25, 0.75];
        let mut pairs = pixels.iter().zip(expected);
        assert!(pairs.all(|(a, b)| (a - b).abs() < 1e-6), "{pixels:?}");
    }

    #[test]
    fn known_colours_have_known_hues() {
        for (rgb, hsv) in [
            ([1.0, 0.0, 0.0], [0.0, 1.0, 1.0]),
            ([1.0, 1.0, 0.0], [1.0 / 6.0, 1.0, 1.0]),
            ([0.0, 0.5, 0.0], [1.0 / 3.0, 1.0, 0.5]),
            ([0.0, 1.0, 1.0], [0.5, 1.0, 1.0]),
            ([0.5, 0.5, 1.0], [2.0 / 3.0, 0.5, 1.0]),
            ([1.0, 0.0, 1.0], [5.0 / 6.0, 1.0, 1.0]),
            ([0.3, 0.3, 0.3], [0.0, 0.0, 0.3]),
            ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ] {
            let ours = rgb_to_hsv(rgb);
            let back = hsv_to_rgb(ours);
            let near = |a: [f32; 3], b: [f32; 3]| (0..3).all(|c| (a[c] - b[c]).abs() < 1e-6);
            assert!(
                near(ours, hsv) && near(back, rgb),
                "{rgb:?} {ours:?} {back:?}"
            );
        }
    }

    #[test]
    fn hue_turns_colours_and_leaves_greys() {
        let mut pixels = vec![1.0, 0.4, 0.0, 0.4, 0.0, 0.4];
        adjust_hsv(&mut pixels, |[h, s, v]| {
            [(h + 1.0 / 3.0).rem_euclid(1.0), s, v]
        });
        let expected = [0.0, 0.4, 1.0, 0.4, 0.0, 0.4];
        let mut pairs = pixels.iter().zip(expected);
        assert!(pairs.all(|(a, b)| (a - b).abs() < 1e-6), "{pixels:?}");
    }

    #[test]
    fn saturation_zero_leaves_the_value() {
        let ranges = CropAndColor {
            crop: false,
            ..CropAndColor::default()
        };
        let image = Image::from_planes(1, 1, vec![200, 100, 50]).expect("sizes");
        let grey = ranges.apply_drawn(
            &image,
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
