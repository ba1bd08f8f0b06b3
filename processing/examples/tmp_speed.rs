#![allow(missing_docs, clippy::print_stdout, reason = "scratch")]
use pollen_processing::*;
use std::time::Instant;
fn main() {
    for (kind, from, to) in [(ResizeKind::BilinearShortSide,200,224),(ResizeKind::BilinearShortSide,256,224),(ResizeKind::BilinearShortSide,256,112),(ResizeKind::Lanczos3Square,256,224),(ResizeKind::Lanczos3Square,480,224),(ResizeKind::BilinearShortSide,96,64)] {
        let data: Vec<u8> = (0..3*from*from).map(|i| (i*31%256) as u8).collect();
        let image = Image::from_interleaved(from, from, &data).expect("x");
        let r = Resizer::new(kind, to);
        let _ = r.resize(&image);
        let mut best = f64::MAX;
        for _ in 0..20 { let t = Instant::now(); for _ in 0..5 { std::hint::black_box(r.resize(&image)); } best = best.min(t.elapsed().as_secs_f64()/5.0); }
        println!("{kind:?} {from}->{to}: {:.3} ms", best*1e3);
    }
}
