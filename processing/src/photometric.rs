//! Crops and changes of colour: the inner loops of pretraining's augmentation.
//!
//! Every loop runs over lines or planes of numbers without a branch in it, so that the compiler
//! makes vector instructions of it; results do not depend on which.
#![allow(
    clippy::inline_always,
    reason = "only what is inlined is compiled for the instructions that `dispatch` chose"
)]

use pulp::{Simd, WithSimd};

use crate::filter::TO_WHOLE;

/// Changes of one image, in their order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Change {
    /// Top, left, bottom and right of the crop as shares of the sides.
    pub(crate) crop: Option<[f32; 4]>,
    /// What is added to every value.
    pub(crate) brightness: f32,
    /// Factor of the distance from each channel's mean.
    pub(crate) contrast: f32,
    /// Factor of the saturation.
    pub(crate) saturation: f32,
    /// Turn of the hue as a share of the circle.
    pub(crate) hue: f32,
}

/// An image to be changed. Values are clipped to [0, 1] after every operation and truncated, not
/// rounded, at the end.
///
/// # Shapes
/// `planes` is [3, height, `width`] and is overwritten.
pub(crate) struct Photometric<'a> {
    pub(crate) planes: &'a mut [u8],
    pub(crate) width: usize,
    pub(crate) change: Change,
}

impl Photometric<'_> {
    /// Changes `planes`, with the processor's vector instructions.
    pub(crate) fn run(self) {
        pulp::Arch::new().dispatch(self);
    }
}

impl WithSimd for Photometric<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let area = self.planes.len() / 3;
        let mut pixels = vec![0.0; 3 * area];
        match self.change.crop {
            Some(crop) => {
                let height = area / self.width;
                crop_and_resize(self.planes, (height, self.width), crop, &mut pixels);
            }
            None => scale(self.planes, &mut pixels),
        }
        for value in &mut pixels {
            *value = unit(unit(*value) + self.change.brightness);
        }
        let (red, rest) = pixels.split_at_mut(area);
        let (green, blue) = rest.split_at_mut(area);
        adjust_contrast(red, self.change.contrast);
        adjust_contrast(green, self.change.contrast);
        adjust_contrast(blue, self.change.contrast);

        let (saturation, hue) = (self.change.saturation, self.change.hue);
        let (red_out, rest) = self.planes.split_at_mut(area);
        let (green_out, blue_out) = rest.split_at_mut(area);
        let from = red.iter().zip(&*green).zip(&*blue);
        let to = red_out.iter_mut().zip(green_out).zip(blue_out);
        for (((&r, &g), &b), ((red, green), blue)) in from.zip(to) {
            let [h, s, v] = rgb_to_hsv([unit(r), unit(g), unit(b)]);
            let [r, g, b] = hsv_to_rgb([h, unit(s * saturation), v]);
            let [h, s, v] = rgb_to_hsv([unit(r), unit(g), unit(b)]);
            let turned = h + hue;
            let [r, g, b] = hsv_to_rgb([turned - turned.floor(), s, v]);
            (*red, *green, *blue) = (to_byte(r), to_byte(g), to_byte(b));
        }
    }
}

#[inline(always)]
fn unit(value: f32) -> f32 {
    value.clamp(0.0, 1.0)
}

#[inline(always)]
fn to_byte(value: f32) -> u8 {
    ((unit(value) * 255.0).floor() + TO_WHOLE).to_bits() as u8
}

#[inline(always)]
fn scale(bytes: &[u8], values: &mut [f32]) {
    for (value, &byte) in values.iter_mut().zip(bytes) {
        *value = f32::from(byte) / 255.0;
    }
}

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

/// Cuts a box out and stretches it to the whole image: bilinear without antialiasing, corner pixels
/// of the box on corner pixels of the result (TensorFlow's `crop_and_resize`).
#[inline(always)]
fn crop_and_resize(
    planes: &[u8],
    (height, width): (usize, usize),
    [top, left, bottom, right]: [f32; 4],
    out: &mut [f32],
) {
    let rows = positions(height, top, bottom);
    let columns = positions(width, left, right);
    let mut line = vec![0.0; width];
    // An input line is stretched once, though two output lines or more are made of it: one place for
    // even lines and one for odd ones, with the number of the line that is there.
    let mut stretched = vec![0.0; 2 * width];
    let (even, odd) = stretched.split_at_mut(width);
    let planes = planes.chunks_exact(height * width);
    for (plane, out) in planes.zip(out.chunks_exact_mut(height * width)) {
        let mut there = [usize::MAX; 2];
        for (&(y0, y1, down), out) in rows.iter().zip(out.chunks_exact_mut(width)) {
            for y in [y0, y1] {
                if there[y % 2] != y {
                    there[y % 2] = y;
                    scale(&plane[y * width..][..width], &mut line);
                    stretch(
                        &line,
                        &columns,
                        if y % 2 == 0 { &mut *even } else { &mut *odd },
                    );
                }
            }
            let upper = if y0 % 2 == 0 { &*even } else { &*odd };
            let lower = if y1 % 2 == 0 { &*even } else { &*odd };
            for ((value, &top), &bottom) in out.iter_mut().zip(upper).zip(lower) {
                *value = top + (bottom - top) * down;
            }
        }
    }
}

#[inline(always)]
fn stretch(line: &[f32], columns: &[(usize, usize, f32)], out: &mut [f32]) {
    for (value, &(x0, x1, across)) in out.iter_mut().zip(columns) {
        *value = line[x0] + (line[x1] - line[x0]) * across;
    }
}

#[inline(always)]
fn adjust_contrast(plane: &mut [f32], factor: f32) {
    const SUMS: usize = 8;
    let mut sums = [0.0; SUMS];
    let (blocks, rest) = plane.as_chunks::<SUMS>();
    for block in blocks {
        for (sum, &value) in sums.iter_mut().zip(block) {
            *sum += f64::from(value);
        }
    }
    let sum = sums.iter().sum::<f64>() + rest.iter().map(|&value| f64::from(value)).sum::<f64>();
    let mean = (sum / plane.len() as f64) as f32;
    for value in plane {
        *value = (*value - mean) * factor + mean;
    }
}

/// Returns hue, saturation and value, all in [0, 1].
#[inline(always)]
fn rgb_to_hsv([r, g, b]: [f32; 3]) -> [f32; 3] {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let smaller = |a: f32, b: f32| if a < b { a } else { b };
    let value = larger(larger(r, g), b);
    let range = value - smaller(smaller(r, g), b);
    let saturation = if value > 0.0 { range / value } else { 0.0 };
    let sixth = 1.0 / (6.0 * range);
    let of_red = sixth * (g - b);
    let of_green = sixth * (b - r) + 2.0 / 6.0;
    let of_blue = sixth * (r - g) + 4.0 / 6.0;
    let hue = if g == value { of_green } else { of_blue };
    let hue = if r == value { of_red } else { hue };
    let hue = if hue < 0.0 { hue + 1.0 } else { hue };
    [if range > 0.0 { hue } else { 0.0 }, saturation, value]
}

#[inline(always)]
fn hsv_to_rgb([hue, saturation, value]: [f32; 3]) -> [f32; 3] {
    let angle = hue * 6.0;
    let colour = |pure: f32| ((1.0 - saturation) + saturation * unit(pure)) * value;
    [
        colour((angle - 3.0).abs() - 1.0),
        colour(2.0 - (angle - 2.0).abs()),
        colour(2.0 - (angle - 4.0).abs()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Crops and stretches as the definition says, one value after the other.
    fn plain_crop(pixels: &[f32], (height, width): (usize, usize), crop: [f32; 4]) -> Vec<f32> {
        let [top, left, bottom, right] = crop;
        let rows = positions(height, top, bottom);
        let columns = positions(width, left, right);
        let mut out = Vec::new();
        for plane in pixels.chunks_exact(height * width) {
            for &(y0, y1, down) in &rows {
                for &(x0, x1, across) in &columns {
                    let along = |y: usize| {
                        let (left, right) = (plane[y * width + x0], plane[y * width + x1]);
                        left + (right - left) * across
                    };
                    out.push(along(y0) + (along(y1) - along(y0)) * down);
                }
            }
        }
        out
    }

    fn plain_hsv([r, g, b]: [f32; 3]) -> [f32; 3] {
        let value = r.max(g).max(b);
        let range = value - r.min(g).min(b);
        let saturation = if value > 0.0 { range / value } else { 0.0 };
        let sixth = 1.0 / (6.0 * range);
        let hue = if range <= 0.0 {
            0.0
        } else if r == value {
            sixth * (g - b)
        } else if g == value {
            sixth * (b - r) + 2.0 / 6.0
        } else {
            sixth * (r - g) + 4.0 / 6.0
        };
        [if hue < 0.0 { hue + 1.0 } else { hue }, saturation, value]
    }

    /// The operations one after the other, each over the whole image.
    fn plainly(planes: &[u8], width: usize, change: Change) -> Vec<u8> {
        let area = planes.len() / 3;
        let mut pixels: Vec<f32> = planes.iter().map(|&b| f32::from(b) / 255.0).collect();
        let clip = |pixels: &mut [f32]| {
            for value in pixels {
                *value = value.clamp(0.0, 1.0);
            }
        };
        if let Some(crop) = change.crop {
            pixels = plain_crop(&pixels, (area / width, width), crop);
            clip(&mut pixels);
        }
        for value in &mut pixels {
            *value += change.brightness;
        }
        clip(&mut pixels);
        for plane in pixels.chunks_exact_mut(area) {
            let mean = plane.iter().map(|&value| f64::from(value)).sum::<f64>() / area as f64;
            let mean = mean as f32;
            for value in plane {
                *value = (*value - mean) * change.contrast + mean;
            }
        }
        clip(&mut pixels);
        let mut adjust = |change: &dyn Fn([f32; 3]) -> [f32; 3]| {
            for i in 0..area {
                let at = [i, area + i, 2 * area + i];
                let [h, s, v] = change(plain_hsv(at.map(|i| pixels[i])));
                for (i, value) in at.iter().zip(hsv_to_rgb([h, s, v])) {
                    pixels[*i] = value.clamp(0.0, 1.0);
                }
            }
        };
        adjust(&|[h, s, v]| [h, (s * change.saturation).clamp(0.0, 1.0), v]);
        adjust(&|[h, s, v]| [(h + change.hue).rem_euclid(1.0), s, v]);
        pixels.iter().map(|value| (value * 255.0) as u8).collect()
    }

    proptest! {
        #[test]
        fn many_at_once_are_what_one_by_one_are(
            (width, mut planes) in (1..12_usize, 1..12_usize).prop_flat_map(|(height, width)| {
                let bytes = prop_oneof![any::<u8>(), Just(0), Just(255), Just(128)];
                (Just(width), proptest::collection::vec(bytes, 3 * height * width))
            }),
            crop in proptest::option::of([0.0..0.3_f32, 0.0..0.3_f32, 0.4..1.0_f32, 0.4..1.0_f32]),
            brightness in -0.3..0.3_f32,
            [contrast, saturation] in [0.0..2.0_f32, 0.0..2.0_f32],
            hue in -1.0..1.0_f32,
        ) {
            let change = Change { crop, brightness, contrast, saturation, hue };
            let expected = plainly(&planes, width, change);
            Photometric { planes: &mut planes, width, change }.run();
            prop_assert_eq!(planes, expected);
        }
    }

    #[test]
    fn a_crop_is_the_bilinear_stretch_of_its_box() {
        // A ramp along x and y is reproduced exactly by bilinear interpolation.
        let side = 8;
        let ramp: Vec<f32> = (0..3 * side * side)
            .map(|i| ((i % side) as f32 + 3.0 * (i / side % side) as f32) / 40.0)
            .collect();
        let [top, left, bottom, right] = [0.1, 0.2, 0.9, 1.0];
        let out = plain_crop(&ramp, (side, side), [top, left, bottom, right]);
        for (i, value) in out.iter().enumerate() {
            let (y, x) = ((i / side % side) as f32 / 7.0, (i % side) as f32 / 7.0);
            let (y, x) = (top + y * (bottom - top), left + x * (right - left));
            let expected = (7.0 * x + 21.0 * y) / 40.0;
            assert!((value - expected).abs() < 1e-5, "{i}: {value} {expected}");
        }
    }

    #[test]
    fn contrast_scales_about_each_channels_mean() {
        let mut pixels = vec![0.2, 0.4, 0.5, 0.5, 0.0, 1.0];
        for plane in pixels.chunks_exact_mut(2) {
            adjust_contrast(plane, 0.5);
        }
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
        let mut planes = [255, 102, 0, 102, 0, 102];
        let change = Change {
            crop: None,
            brightness: 0.0,
            contrast: 1.0,
            saturation: 1.0,
            hue: 1.0 / 3.0,
        };
        Photometric {
            planes: &mut planes,
            width: 2,
            change,
        }
        .run();
        let expected: [u8; 6] = [0, 102, 255, 102, 0, 102];
        let mut pairs = planes.iter().zip(expected);
        assert!(pairs.all(|(a, b)| a.abs_diff(b) <= 1), "{planes:?}");
    }
}
