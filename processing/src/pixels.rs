//! Images as bytes, and the way from bytes to the numbers that the vision tower sees.

use pollen_core::Draws;

use crate::error::Error;

/// Mean of each colour channel, for pixels in [0, 1] (CLIP's constants).
pub const PIXEL_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Standard deviation of each colour channel, for pixels in [0, 1].
pub const PIXEL_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// An RGB image of bytes, one plane after the other.
///
/// # Shapes
/// `data` is [3, height, width], row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    height: usize,
    width: usize,
    data: Vec<u8>,
}

fn check(height: usize, width: usize, bytes: usize) -> Result<(), Error> {
    let expected = 3 * height * width;
    if expected == bytes && bytes > 0 {
        return Ok(());
    }
    Err(Error::ImageBytes {
        height,
        width,
        expected,
        bytes,
    })
}

/// [`check`] of pixels of four bytes.
pub(crate) fn check_padded(height: usize, width: usize, bytes: usize) -> Result<(), Error> {
    let whole = bytes.is_multiple_of(4);
    check(height, width, if whole { bytes / 4 * 3 } else { 0 })
}

impl Image {
    /// Wraps planes that are already [3, height, width].
    pub fn from_planes(height: usize, width: usize, data: Vec<u8>) -> Result<Self, Error> {
        check(height, width, data.len())?;
        Ok(Self {
            height,
            width,
            data,
        })
    }

    /// Takes interleaved pixels [height, width, 3] apart, as image decoders give them.
    pub fn from_interleaved(height: usize, width: usize, pixels: &[u8]) -> Result<Self, Error> {
        check(height, width, pixels.len())?;
        let area = height * width;
        let mut data = vec![0; 3 * area];
        let (red, rest) = data.split_at_mut(area);
        let (green, blue) = rest.split_at_mut(area);
        for (i, pixel) in pixels.as_chunks::<3>().0.iter().enumerate() {
            [red[i], green[i], blue[i]] = *pixel;
        }
        Ok(Self {
            height,
            width,
            data,
        })
    }

    /// Takes pixels [height, width, 4] apart, red, green, blue and a byte that is ignored: faster than
    /// three bytes each, because every pixel is a word.
    pub fn from_padded(height: usize, width: usize, pixels: &[u8]) -> Result<Self, Error> {
        check_padded(height, width, pixels.len())?;
        let mut data = vec![0; pixels.len() / 4 * 3];
        planes_of(pixels, &mut data);
        Ok(Self {
            height,
            width,
            data,
        })
    }

    /// Returns the all-zero image that stands for a missing camera.
    pub fn black(side: usize) -> Self {
        Self {
            height: side,
            width: side,
            data: vec![0; 3 * side * side],
        }
    }

    /// Returns the number of rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Returns the number of columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Returns the planes [3, height, width].
    pub fn planes(&self) -> &[u8] {
        &self.data
    }

    pub(crate) fn planes_mut(&mut self) -> &mut [u8] {
        &mut self.data
    }

    /// Returns the pixels [height, width, 4], of which the fourth byte is 0.
    pub(crate) fn to_padded(&self) -> Vec<u8> {
        let area = self.height * self.width;
        let (red, rest) = self.data.split_at(area);
        let (green, blue) = rest.split_at(area);
        let mut pixels = vec![0; 4 * area];
        let colours = red.iter().zip(green).zip(blue);
        for (pixel, ((&r, &g), &b)) in pixels.as_chunks_mut::<4>().0.iter_mut().zip(colours) {
            *pixel = [r, g, b, 0];
        }
        pixels
    }

    /// Returns the planes [3, height, width] without a copy.
    pub fn into_planes(self) -> Vec<u8> {
        self.data
    }

    /// Shifts the image by `dx` columns and `dy` rows, repeating the border: the crop at
    /// (`pad` + `dx`, `pad` + `dy`) of the image padded by `pad` on all sides.
    #[must_use]
    pub fn shifted(&self, dx: isize, dy: isize) -> Self {
        let clamped = |index: usize, by: isize, len: usize| {
            index.saturating_add_signed(by).min(len - 1) // in [0, len)
        };
        // Of every row what stays in sight, and how often its first and last pixels are repeated.
        let (before, after) = ((-dx).max(0) as usize, dx.max(0) as usize);
        let (before, after) = (before.min(self.width), after.min(self.width));
        let mut data = Vec::with_capacity(self.data.len());
        for plane in self.data.chunks_exact(self.height * self.width) {
            for y in 0..self.height {
                let start = clamped(y, dy, self.height) * self.width;
                let row = &plane[start..start + self.width];
                data.extend(std::iter::repeat_n(row[0], before));
                data.extend_from_slice(&row[after..self.width - before]);
                data.extend(std::iter::repeat_n(row[self.width - 1], after));
            }
        }
        Self { data, ..*self }
    }

    /// Shifts the image at random by up to `pad` pixels in each direction.
    #[must_use]
    pub fn random_shift(&self, pad: u32, draws: &mut Draws) -> Self {
        let mut offset = || draws.below(u64::from(2 * pad) + 1) as isize - pad as isize;
        let (dx, dy) = (offset(), offset());
        self.shifted(dx, dy)
    }
}

/// Takes pixels [height, width, 4] apart into planes [3, height, width]; the fourth byte is ignored.
///
/// # Panics
/// When the planes' length is not three for every four of the pixels'.
pub(crate) fn planes_of(pixels: &[u8], planes: &mut [u8]) {
    let (words, rest) = pixels.as_chunks::<4>();
    assert!(
        rest.is_empty() && planes.len() == 3 * words.len(),
        "three planes of four bytes a pixel"
    );
    let (red, others) = planes.split_at_mut(words.len());
    let (green, blue) = others.split_at_mut(words.len());
    take_apart(pixels, red, green, blue);
}

/// Takes pixels of four bytes apart.
pub(crate) fn take_apart(pixels: &[u8], red: &mut [u8], green: &mut [u8], blue: &mut [u8]) {
    let words = pixels.as_chunks::<4>().0;
    // Sixteen at once, which every compiler turns into vector instructions: half the time of one
    // plane after the other, an eighth of that of one pixel after the other.
    let (blocks, last) = words.as_chunks::<16>();
    let (red, last_red) = red.as_chunks_mut::<16>();
    let (green, last_green) = green.as_chunks_mut::<16>();
    let (blue, last_blue) = blue.as_chunks_mut::<16>();
    for (((block, red), green), blue) in blocks.iter().zip(red).zip(green).zip(blue) {
        let values = block.map(u32::from_le_bytes);
        *red = values.map(|value| value as u8);
        *green = values.map(|value| (value >> 8) as u8);
        *blue = values.map(|value| (value >> 16) as u8);
    }
    let pixels = last.iter().zip(last_red).zip(last_green).zip(last_blue);
    for (((pixel, red), green), blue) in pixels {
        [*red, *green, *blue, _] = *pixel;
    }
}

/// Turns bytes into the model's pixel values, (byte / 255 - mean) / standard deviation.
///
/// The trainer does the same on the device, from [`PIXEL_MEAN`] and [`PIXEL_STD`].
///
/// # Shapes
/// [3, ...] to [3, ...].
pub fn normalize_pixels(planes: &[u8]) -> Vec<f32> {
    debug_assert!(planes.len().is_multiple_of(3), "three planes");
    let mut values = Vec::with_capacity(planes.len());
    for (c, plane) in planes.chunks_exact((planes.len() / 3).max(1)).enumerate() {
        let table: [f32; 256] =
            std::array::from_fn(|byte| (byte as f32 / 255.0 - PIXEL_MEAN[c]) / PIXEL_STD[c]);
        values.extend(plane.iter().map(|&byte| table[usize::from(byte)]));
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollen_core::Seed;
    use proptest::prelude::*;

    fn numbered(height: usize, width: usize) -> Image {
        let data = (0..3 * height * width).map(|i| (i * 7 % 251) as u8);
        Image::from_planes(height, width, data.collect()).expect("sizes fit")
    }

    proptest! {
        #[test]
        fn any_number_of_pixels_is_taken_apart(pixels in proptest::collection::vec(any::<[u8; 4]>(), 0..70)) {
            let mut planes = vec![0; 3 * pixels.len()];
            planes_of(pixels.as_flattened(), &mut planes);
            let expected = (0..3).flat_map(|channel| pixels.iter().map(move |pixel| pixel[channel]));
            prop_assert_eq!(planes, expected.collect::<Vec<u8>>());
        }
    }

    #[test]
    fn interleaved_pixels_become_planes() {
        let image = Image::from_interleaved(1, 2, &[1, 2, 3, 4, 5, 6]).expect("sizes fit");
        assert_eq!(image.planes(), [1, 4, 2, 5, 3, 6]);
        let padded = Image::from_padded(1, 2, &[1, 2, 3, 9, 4, 5, 6, 9]).expect("sizes fit");
        assert_eq!(padded, image);
        for len in [7, 9, 12] {
            assert!(Image::from_padded(1, 2, &vec![0; len]).is_err(), "{len}");
        }
        let error = Image::from_interleaved(2, 2, &[0; 6]).expect_err("too short");
        assert_eq!(error.to_string(), "an image of 2 x 2 has 12 bytes, not 6");
        assert!(Image::from_planes(0, 4, Vec::new()).is_err(), "no pixels");
    }

    /// Pads by `pad` on all sides and cuts, literally as defined.
    fn pad_and_crop(image: &Image, pad: usize, sx: usize, sy: usize) -> Vec<u8> {
        let (h, w) = (image.height(), image.width());
        let mut out = Vec::new();
        for plane in image.planes().chunks_exact(h * w) {
            let padded: Vec<Vec<u8>> = (0..h + 2 * pad)
                .map(|y| {
                    let row = &plane[y.saturating_sub(pad).min(h - 1) * w..][..w];
                    let mut wide = vec![row[0]; pad];
                    wide.extend_from_slice(row);
                    wide.extend(std::iter::repeat_n(row[w - 1], pad));
                    wide
                })
                .collect();
            for row in &padded[sy..sy + h] {
                out.extend_from_slice(&row[sx..sx + w]);
            }
        }
        out
    }

    #[test]
    fn a_shift_is_a_crop_of_the_padded_image() {
        let image = numbered(5, 6);
        for (sx, sy) in [(0, 0), (4, 4), (2, 2), (1, 3), (4, 0)] {
            let shifted = image.shifted(sx as isize - 2, sy as isize - 2);
            assert_eq!(shifted.planes(), pad_and_crop(&image, 2, sx, sy));
        }
        assert_eq!(image.shifted(0, 0), image);
    }

    #[test]
    fn random_shifts_reach_every_offset_and_repeat() {
        let image = numbered(7, 7);
        let all: Vec<Image> = (-1..=1)
            .flat_map(|dx| (-1..=1).map(move |dy| (dx, dy)))
            .map(|(dx, dy)| image.shifted(dx, dy))
            .collect();
        let mut seen = [0; 9];
        for i in 0..300 {
            let shifted = image.random_shift(1, &mut Seed::new(i).draws());
            assert_eq!(shifted, image.random_shift(1, &mut Seed::new(i).draws()));
            let which = all.iter().position(|other| *other == shifted);
            seen[which.expect("a shift by at most one pixel")] += 1;
        }
        assert!(seen.iter().all(|&count| count > 10), "{seen:?}");
    }

    #[test]
    fn pixels_are_scaled_by_channel() {
        let values = normalize_pixels(&[0, 255, 128, 128, 0, 255]);
        let expected = |byte: f32, c: usize| (byte / 255.0 - PIXEL_MEAN[c]) / PIXEL_STD[c];
        assert_eq!(values[0], expected(0.0, 0));
        assert_eq!(values[2], expected(128.0, 1));
        assert_eq!(values[5], expected(255.0, 2));
        assert!(normalize_pixels(&[]).is_empty());
    }
}
