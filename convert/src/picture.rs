//! Images: headers of JPEG and PNG files, pixels, and what is done to them on the way.
//!
//! JPEG and PNG files pass through byte for byte unless a resize, a rotation or another encoding is
//! asked for.

use std::io::Cursor;

use bytes::Bytes;
use pollen_processing::{Image, ResizeKind, Resizer};
use serde::{Deserialize, Serialize};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

/// Longest side of an image; a larger one is taken for a broken header.
const MAX_SIDE: u32 = 8192;
/// Quality of JPEG files made from pixels when none is asked for.
pub(crate) const DEFAULT_QUALITY: u8 = 95;

/// How an image is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PictureKind {
    /// JPEG.
    Jpeg,
    /// PNG.
    Png,
}

/// What the first bytes of an image say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// How it is encoded.
    pub kind: PictureKind,
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
    /// Colour components.
    pub channels: u8,
}

/// One encoded image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The file.
    pub bytes: Bytes,
    /// What it says of itself.
    pub header: Header,
}

impl Frame {
    /// Takes a complete JPEG or PNG file with three colour channels; the error says what is wrong
    /// with it.
    pub fn new(bytes: Bytes) -> Result<Self, String> {
        let header = read_header(&bytes)?;
        if header.channels != 3 {
            return Err(format!(
                "it has {} colour channels in place of 3",
                header.channels
            ));
        }
        check_end(&bytes, header.kind)?;
        Ok(Self { bytes, header })
    }

    /// Returns the pixels [height, width, 3].
    pub(crate) fn decode(&self) -> Result<Vec<u8>, String> {
        decode(&self.bytes, self.header)
    }
}

/// What is done to every image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PictureRule {
    /// Encode PNG files and arrays as JPEG of this quality; none: PNG stays PNG, byte for byte, and
    /// arrays become PNG.
    pub(crate) jpeg_quality: Option<u8>,
    /// Resize the short side to this many pixels; the aspect is kept, the filter is bilinear with
    /// antialiasing.
    pub(crate) resize: Option<u32>,
    /// Turn by 180 degrees.
    pub(crate) rotate: bool,
}

impl PictureRule {
    /// Applies the rule to a JPEG or PNG file.
    pub(crate) fn file(&self, bytes: Bytes) -> Result<Frame, String> {
        let header = read_header(&bytes)?;
        check_end(&bytes, header.kind)?;
        let resizes = self
            .resize
            .is_some_and(|side| side != header.height.min(header.width));
        let to_jpeg = self.jpeg_quality.is_some() && header.kind == PictureKind::Png;
        if !(resizes || to_jpeg || self.rotate) {
            return Frame::new(bytes);
        }
        let pixels = decode(&bytes, header)?;
        let quality = match header.kind {
            PictureKind::Jpeg => Some(self.jpeg_quality.unwrap_or(DEFAULT_QUALITY)),
            PictureKind::Png => self.jpeg_quality,
        };
        self.encode(header.height, header.width, pixels, quality)
    }

    /// Applies the rule to pixels [height, width, 3].
    pub(crate) fn pixels(&self, height: u32, width: u32, rgb: Vec<u8>) -> Result<Frame, String> {
        self.encode(height, width, rgb, self.jpeg_quality)
    }

    /// Applies the rule to a decoded video frame, which becomes JPEG: PNG would be many times the
    /// size of the video without being nearer to the camera.
    pub(crate) fn video(&self, height: u32, width: u32, rgb: Vec<u8>) -> Result<Frame, String> {
        let quality = self.jpeg_quality.unwrap_or(DEFAULT_QUALITY);
        self.encode(height, width, rgb, Some(quality))
    }

    fn encode(
        &self,
        mut height: u32,
        mut width: u32,
        mut rgb: Vec<u8>,
        jpeg_quality: Option<u8>,
    ) -> Result<Frame, String> {
        let expected = u64::from(height) * u64::from(width) * 3;
        if rgb.len() as u64 != expected || height.max(width) > MAX_SIDE || rgb.is_empty() {
            return Err(format!(
                "{} bytes are not an image of {height} x {width} x 3",
                rgb.len()
            ));
        }
        if self.rotate {
            let (pixels, _) = rgb.as_chunks_mut::<3>();
            pixels.reverse();
        }
        if let Some(side) = self.resize.filter(|side| *side != height.min(width)) {
            let resizer = Resizer::new(ResizeKind::BilinearShortSide, side.max(1) as usize);
            let image = Image::from_interleaved(height as usize, width as usize, &rgb)
                .map_err(|e| e.to_string())?;
            let image = resizer.resize(&image);
            (height, width) = (image.height() as u32, image.width() as u32);
            rgb = interleave(&image);
        }
        let (kind, bytes) = match jpeg_quality {
            Some(quality) => (
                PictureKind::Jpeg,
                encode_jpeg(height, width, &rgb, quality)?,
            ),
            None => (PictureKind::Png, encode_png(height, width, &rgb)?),
        };
        let header = Header {
            kind,
            height,
            width,
            channels: 3,
        };
        Ok(Frame {
            bytes: bytes.into(),
            header,
        })
    }
}

/// Reads the header of a JPEG or PNG file; the error says what is wrong with it.
pub(crate) fn read_header(bytes: &[u8]) -> Result<Header, String> {
    let header = match bytes {
        [] => return Err("the image is empty".into()),
        [0xff, 0xd8, rest @ ..] => jpeg_header(rest).ok_or("the JPEG has no frame header")?,
        [0x89, b'P', b'N', b'G', 0x0d, 0x0a, 0x1a, 0x0a, rest @ ..] => png_header(rest)?,
        _ => return Err("the image is neither JPEG nor PNG".into()),
    };
    let sides = [header.height, header.width];
    if sides.iter().any(|side| !(1..=MAX_SIDE).contains(side)) {
        return Err(format!(
            "the image says it has {} x {} pixels",
            sides[0], sides[1]
        ));
    }
    Ok(header)
}

/// Walks the segments after the start marker to the frame header.
fn jpeg_header(mut rest: &[u8]) -> Option<Header> {
    loop {
        // Any number of fill bytes may precede a marker.
        let start = rest.iter().position(|byte| *byte != 0xff)?;
        if start == 0 {
            return None;
        }
        let marker = rest[start];
        rest = &rest[start + 1..];
        if marker == 0x01 || (0xd0..=0xd8).contains(&marker) {
            continue; // markers without a segment
        }
        let length = usize::from(u16::from_be_bytes(*rest.first_chunk()?));
        let segment = rest.get(2..length)?;
        match marker {
            0xc4 | 0xc8 | 0xcc => {}
            0xc0..=0xcf => {
                let [_, h1, h2, w1, w2, channels] = *segment.first_chunk()?;
                return Some(Header {
                    kind: PictureKind::Jpeg,
                    height: u32::from(u16::from_be_bytes([h1, h2])),
                    width: u32::from(u16::from_be_bytes([w1, w2])),
                    channels,
                });
            }
            0xd9 | 0xda => return None,
            _ => {}
        }
        rest = &rest[length..];
    }
}

fn png_header(rest: &[u8]) -> Result<Header, String> {
    let header = rest
        .first_chunk::<25>()
        .ok_or("the PNG ends in its header")?;
    let [
        _,
        _,
        _,
        _,
        b'I',
        b'H',
        b'D',
        b'R',
        w1,
        w2,
        w3,
        w4,
        h1,
        h2,
        h3,
        h4,
        depth,
        color,
        ..,
    ] = *header
    else {
        return Err("the PNG has no header".into());
    };
    if depth == 16 {
        return Err(
            "the PNG has 16 bits a channel, as depth images do; leave this camera out".into(),
        );
    }
    let channels = match color {
        0 => 1,
        2 | 3 => 3,
        4 => 2,
        6 => 4,
        other => return Err(format!("the PNG has the unknown colour type {other}")),
    };
    Ok(Header {
        kind: PictureKind::Png,
        height: u32::from_be_bytes([h1, h2, h3, h4]),
        width: u32::from_be_bytes([w1, w2, w3, w4]),
        channels,
    })
}

/// Finds files that were cut off.
fn check_end(bytes: &[u8], kind: PictureKind) -> Result<(), String> {
    let complete = match kind {
        PictureKind::Jpeg => {
            let padding = bytes.iter().rev().take_while(|byte| **byte == 0).count();
            bytes[..bytes.len() - padding].ends_with(&[0xff, 0xd9])
        }
        PictureKind::Png => bytes.ends_with(&[b'I', b'E', b'N', b'D', 0xae, 0x42, 0x60, 0x82]),
    };
    complete
        .then_some(())
        .ok_or_else(|| "the image ends early".into())
}

fn decode(bytes: &[u8], header: Header) -> Result<Vec<u8>, String> {
    match header.kind {
        PictureKind::Jpeg => {
            let options = DecoderOptions::default()
                .set_strict_mode(true)
                .jpeg_set_out_colorspace(ColorSpace::RGB);
            let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
            let pixels = decoder.decode();
            pixels.map_err(|e| format!("the JPEG cannot be decoded: {e:?}"))
        }
        PictureKind::Png => {
            let failed = |e| format!("the PNG cannot be decoded: {e}");
            let mut decoder = png::Decoder::new(Cursor::new(bytes));
            decoder.set_transformations(png::Transformations::normalize_to_color8());
            let mut reader = decoder.read_info().map_err(failed)?;
            let size = reader.output_buffer_size().ok_or("the PNG is too large")?;
            let mut pixels = vec![0; size];
            let info = reader.next_frame(&mut pixels).map_err(failed)?;
            pixels.truncate(info.buffer_size());
            Ok(to_rgb(pixels, info.color_type.samples()))
        }
    }
}

/// Expands grey pixels and drops opacity.
fn to_rgb(pixels: Vec<u8>, channels: usize) -> Vec<u8> {
    match channels {
        3 => pixels,
        4 => pixels
            .chunks_exact(4)
            .flat_map(|p| [p[0], p[1], p[2]])
            .collect(),
        n => pixels
            .chunks_exact(n.max(1))
            .flat_map(|p| [p[0]; 3])
            .collect(),
    }
}

fn interleave(image: &Image) -> Vec<u8> {
    let area = image.height() * image.width();
    let (red, rest) = image.planes().split_at(area);
    let (green, blue) = rest.split_at(area);
    let pixels = red.iter().zip(green).zip(blue);
    pixels.flat_map(|((r, g), b)| [*r, *g, *b]).collect()
}

fn encode_jpeg(height: u32, width: u32, rgb: &[u8], quality: u8) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, quality);
    encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::F_1_1);
    let (width, height) = (width as u16, height as u16); // at most MAX_SIDE
    encoder
        .encode(rgb, width, height, jpeg_encoder::ColorType::Rgb)
        .map_err(|e| format!("the image cannot be encoded: {e}"))?;
    Ok(bytes)
}

fn encode_png(height: u32, width: u32, rgb: &[u8]) -> Result<Vec<u8>, String> {
    let failed = |e| format!("the image cannot be encoded: {e}");
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(rgb).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(bytes)
}

/// How often each grey level occurs in each colour channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColorHistogram {
    /// Frames counted.
    pub num_frames: u64,
    /// 256 counts for red, then green, then blue.
    pub counts: Vec<u64>,
}

impl Default for ColorHistogram {
    fn default() -> Self {
        Self {
            num_frames: 0,
            counts: vec![0; 3 * 256],
        }
    }
}

impl ColorHistogram {
    /// Counts the pixels [.., 3] of a frame.
    pub(crate) fn count(&mut self, rgb: &[u8]) {
        self.num_frames += 1;
        for pixel in rgb.as_chunks::<3>().0 {
            for (channel, level) in pixel.iter().enumerate() {
                self.counts[256 * channel + usize::from(*level)] += 1;
            }
        }
    }

    /// Adds the counts of another one.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.num_frames += other.num_frames;
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn gradient(height: u32, width: u32) -> Vec<u8> {
        let pixels = (0..height).flat_map(|y| (0..width).map(move |x| [x as u8, y as u8, 7]));
        pixels.flatten().collect()
    }

    #[test]
    fn png_keeps_every_pixel_and_jpeg_is_near() {
        let rgb = gradient(20, 30);
        let png = PictureRule::default().pixels(20, 30, rgb.clone()).unwrap();
        assert_eq!(png.header.kind, PictureKind::Png);
        assert_eq!(png.decode().unwrap(), rgb);
        let rule = PictureRule {
            jpeg_quality: Some(95),
            ..PictureRule::default()
        };
        let jpeg = rule.file(png.bytes.clone()).unwrap();
        assert_eq!(jpeg.header, read_header(&jpeg.bytes).unwrap());
        assert_eq!((jpeg.header.height, jpeg.header.width), (20, 30));
        let near = jpeg.decode().unwrap();
        assert!(near.iter().zip(&rgb).all(|(a, b)| a.abs_diff(*b) < 12));
        // A JPEG stays as it is, whatever the quality asked for.
        assert_eq!(rule.file(jpeg.bytes.clone()).unwrap().bytes, jpeg.bytes);
    }

    #[test]
    fn resize_and_rotation() {
        let rule = PictureRule {
            resize: Some(10),
            rotate: true,
            ..PictureRule::default()
        };
        let small = rule.pixels(20, 30, gradient(20, 30)).unwrap();
        assert_eq!((small.header.height, small.header.width), (10, 15));
        let turned = small.decode().unwrap();
        assert!(turned[0] > 25 && turned[1] > 15, "{:?}", &turned[..3]);
        let rule = PictureRule {
            resize: Some(20),
            ..PictureRule::default()
        };
        let same = PictureRule::default()
            .pixels(20, 30, gradient(20, 30))
            .unwrap();
        assert_eq!(rule.file(same.bytes.clone()).unwrap().bytes, same.bytes);
    }

    #[test]
    fn broken_images_are_refused() {
        let rgb = gradient(8, 8);
        let png = encode_png(8, 8, &rgb).unwrap();
        let jpeg = encode_jpeg(8, 8, &rgb, 90).unwrap();
        for file in [&png, &jpeg] {
            assert!(Frame::new(file.clone().into()).is_ok());
            for end in 0..file.len() {
                assert!(Frame::new(file[..end].to_vec().into()).is_err(), "{end}");
            }
        }
        assert!(read_header(b"GIF89a").unwrap_err().contains("neither"));
        let mut deep = png;
        deep[24] = 16;
        assert!(read_header(&deep).unwrap_err().contains("depth"));
    }

    #[test]
    fn grey_png_becomes_rgb_when_encoded_again() {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 2, 1);
        encoder.set_color(png::ColorType::Grayscale);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(&[9, 200]).unwrap();
        writer.finish().unwrap();
        assert!(PictureRule::default().file(bytes.clone().into()).is_err());
        let rule = PictureRule {
            rotate: true,
            ..PictureRule::default()
        };
        let frame = rule.file(bytes.into()).unwrap();
        assert_eq!(frame.decode().unwrap(), [200, 200, 200, 9, 9, 9]);
    }

    proptest::proptest! {
        #[test]
        fn headers_of_any_bytes(start in 0..3_u8, bytes: Vec<u8>) {
            let mut file = match start {
                0 => vec![0xff, 0xd8, 0xff],
                1 => vec![0x89, b'P', b'N', b'G', 13, 10, 26, 10],
                _ => vec![],
            };
            file.extend(bytes);
            let _ = Frame::new(file.into());
        }
    }
}
