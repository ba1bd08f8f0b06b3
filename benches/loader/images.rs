//! Measures what happens to a camera frame between its decoding and its place in a batch.
//!
//! Prints a line for each step: height, width, step, microseconds (the best of 100). `images.py`
//! compares them with PyTorch's.
#![allow(clippy::print_stdout, reason = "a program whose result is its output")]
#![allow(clippy::unwrap_used, reason = "a benchmark: a failure ends it")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use pollen_core::Seed;
use pollen_processing::{CropAndColor, Image, ResizeKind, Resizer};

const SIDE: usize = 224;

fn main() {
    let mut draws = Seed::new(1).draws();
    let mut planes = vec![0; 3 * SIDE * SIDE];
    for (height, width, step, kind) in [
        (256, 256, "bilinear", ResizeKind::BilinearShortSide),
        (480, 480, "bilinear", ResizeKind::BilinearShortSide),
        (180, 320, "lanczos3", ResizeKind::Lanczos3Square),
        (256, 256, "lanczos3", ResizeKind::Lanczos3Square),
        (480, 640, "lanczos3", ResizeKind::Lanczos3Square),
    ] {
        let pixels = (0..4 * height * width).map(|_| draws.next_u32() as u8);
        let pixels: Vec<u8> = pixels.collect();
        let resizer = Resizer::new(kind, SIDE);
        report(height, width, step, || {
            let planes = black_box(&mut planes);
            let resized = resizer.resize_square_into((height, width), black_box(&pixels), planes);
            resized.unwrap();
        });
    }
    let mut image = Image::from_planes(SIDE, SIDE, planes).unwrap();
    report(SIDE, SIDE, "random_shift", || {
        black_box(black_box(&image).random_shift(4, &mut draws));
    });
    let mut draws = Seed::new(2).draws();
    report(SIDE, SIDE, "photometric", || {
        image = CropAndColor::default().apply(black_box(image.clone()), &mut draws);
    });
}

fn report(height: usize, width: usize, step: &str, mut once: impl FnMut()) {
    let mut best = Duration::MAX;
    for _ in 0..100 {
        let began = Instant::now();
        once();
        best = best.min(began.elapsed());
    }
    println!("{height} {width} {step} {:.0}", best.as_secs_f64() * 1e6);
}
