//! Measures decoding at a fraction of the size against decoding whole, each with the
//! lanczos3 resize to 224 x 224.
//!
//! ```text
//! bench_scaled FRAME.jpg...
//! ```
//!
//! Prints for whole, 1/2, 1/4: microseconds of decoding and of both (means over the frames of the
//! best of 20), and how far the resized pixels are from the whole ones'. Needs the feature `turbo`.
#![allow(clippy::print_stdout, reason = "a program whose result is its output")]
#![allow(clippy::unwrap_used, reason = "a benchmark: a failure ends it")]

use std::hint::black_box;
use std::time::Instant;

use pollen_processing::{ResizeKind, Resizer};
use turbojpeg::{Decompressor, Image, PixelFormat, ScalingFactor};

const SIDE: usize = 224;

fn main() {
    let frames: Vec<Vec<u8>> = std::env::args()
        .skip(1)
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    assert!(!frames.is_empty(), "bench_scaled FRAME.jpg...");
    let resizer = Resizer::new(ResizeKind::Lanczos3Square, SIDE);
    let mut turbo = Decompressor::new().unwrap();
    let mut pixels = Vec::new();
    let mut planes = vec![0; 3 * SIDE * SIDE];
    let mut whole: Vec<Vec<u8>> = Vec::new();
    for part in [1, 2, 4] {
        let (mut decoding, mut both, mut difference, mut most) = (0.0, 0.0, 0.0, 0);
        let factor = ScalingFactor::new(1, part);
        turbo.set_scaling_factor(factor).unwrap();
        for (i, frame) in frames.iter().enumerate() {
            let header = turbo.read_header(frame).unwrap().scaled(factor);
            let (height, width) = (header.height, header.width);
            pixels.resize(4 * height * width, 0);
            let mut best = [f64::MAX; 2];
            for _ in 0..20 {
                let began = Instant::now();
                let image = Image {
                    pixels: &mut pixels[..],
                    width,
                    pitch: 4 * width,
                    height,
                    format: PixelFormat::RGBX,
                };
                turbo.decompress(black_box(frame), image).unwrap();
                best[0] = f64::min(best[0], began.elapsed().as_secs_f64());
                let size = (height, width);
                let resized = resizer.resize_square_into(size, &pixels, black_box(&mut planes));
                resized.unwrap();
                best[1] = f64::min(best[1], began.elapsed().as_secs_f64());
            }
            decoding += best[0];
            both += best[1];
            if part == 1 {
                whole.push(planes.clone());
            }
            for (&a, &b) in whole[i].iter().zip(&planes) {
                difference += f64::from(a.abs_diff(b));
                most = most.max(a.abs_diff(b));
            }
        }
        let count = frames.len() as f64;
        println!(
            "1/{part}: decoding {:.0} us, with resize {:.0} us; differs by {:.2} of 255 on average, {most} at most",
            1e6 * decoding / count,
            1e6 * both / count,
            difference / count / planes.len() as f64
        );
    }
}
