//! A picture to draw on: rectangles, lines, text and other pictures.

use anyhow::{Context, Result};
use font8x8::UnicodeFonts;
use pollen_processing::Image;

/// Red, green and blue.
pub(super) type Color = [u8; 3];

/// Width and height of a letter.
pub(super) const LETTER: usize = 8;

/// Pixels, row by row.
#[derive(Debug)]
pub(super) struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    pub(super) fn new(width: usize, height: usize, color: Color) -> Self {
        Self {
            width,
            height,
            pixels: color.repeat(width * height),
        }
    }

    fn put(&mut self, x: usize, y: usize, color: Color) {
        if x < self.width && y < self.height {
            let at = 3 * (y * self.width + x);
            self.pixels[at..at + 3].copy_from_slice(&color);
        }
    }

    pub(super) fn fill(&mut self, [x, y, width, height]: [usize; 4], color: Color) {
        for row in y..y + height {
            for column in x..x + width {
                self.put(column, row, color);
            }
        }
    }

    /// Writes on one line; what does not fit into `width` ends in two dots.
    pub(super) fn text(&mut self, [x, y, width]: [usize; 3], text: &str, color: Color) {
        let fits = width / LETTER;
        let long = text.chars().count() > fits;
        let shown = text
            .chars()
            .take(if long { fits.saturating_sub(2) } else { fits });
        let end = if long { ".." } else { "" };
        for (number, letter) in shown.chain(end.chars()).enumerate() {
            let basic = font8x8::BASIC_FONTS.get(letter);
            let glyph = basic.or_else(|| font8x8::LATIN_FONTS.get(letter));
            let glyph = glyph
                .or_else(|| font8x8::BASIC_FONTS.get('?'))
                .unwrap_or_default();
            for (row, bits) in glyph.iter().enumerate() {
                for bit in 0..LETTER {
                    if bits >> bit & 1 == 1 {
                        self.put(x + number * LETTER + bit, y + row, color);
                    }
                }
            }
        }
    }

    /// Draws a picture scaled to a rectangle, to the nearest pixel.
    pub(super) fn image(&mut self, [x, y, width, height]: [usize; 4], image: &Image) {
        let planes = image.planes();
        let plane = image.height() * image.width();
        for row in 0..height {
            for column in 0..width {
                let from = (row * image.height() / height) * image.width()
                    + column * image.width() / width;
                let color = [0, 1, 2].map(|channel| planes[channel * plane + from]);
                self.put(x + column, y + row, color);
            }
        }
    }

    /// Draws a curve through `values` over a rectangle; `low` is its lower edge, `high` its upper.
    pub(super) fn curve(
        &mut self,
        [x, y, width, height]: [usize; 4],
        values: &[f32],
        [low, high]: [f32; 2],
        color: Color,
    ) {
        let line_of = |value: f32| {
            let share = ((value - low) / (high - low)).clamp(0.0, 1.0);
            y + ((1.0 - share) * (height - 1) as f32).round() as usize
        };
        let mut before = None;
        for column in 0..width {
            let value = values[column * values.len() / width];
            if !value.is_finite() {
                before = None;
                continue;
            }
            let line = line_of(value);
            let from = before.unwrap_or(line);
            for row in from.min(line)..=from.max(line) {
                self.put(x + column, row, color);
            }
            before = Some(line);
        }
    }

    pub(super) fn png(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().context("cannot begin a PNG")?;
        writer
            .write_image_data(&self.pixels)
            .context("cannot write a PNG")?;
        writer.finish().context("cannot end a PNG")?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_drawn_stays_inside_and_shows() {
        let mut canvas = Canvas::new(40, 20, [9; 3]);
        canvas.curve(
            [0, 0, 40, 20],
            &[0.0, 1.0, f32::NAN, 0.5],
            [0.0, 1.0],
            [255, 0, 0],
        );
        canvas.text([0, 6, 40], "too long for it", [0, 255, 0]);
        canvas.fill([35, 15, 50, 50], [0, 0, 255]);
        let at = |x: usize, y: usize| &canvas.pixels[3 * (40 * y + x)..][..3];
        assert_eq!((at(0, 19), at(10, 0)), (&[255, 0, 0][..], &[255, 0, 0][..]));
        // Nothing where the value is no number.
        assert!((0..6).all(|y| at(25, y) == [9; 3]));
        assert_eq!(at(39, 19), [0, 0, 255]);
        assert!(canvas.pixels.chunks(3).any(|pixel| pixel == [0, 255, 0]));
        let png = canvas.png().expect("memory takes all");
        let read = png::Decoder::new(std::io::Cursor::new(png))
            .read_info()
            .expect("a PNG");
        assert_eq!((read.info().width, read.info().height), (40, 20));
    }
}
