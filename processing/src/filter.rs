//! Weighted sums along the rows and then the columns of an image: the inner loops of resizing.
//!
//! The order of each sum is that of the references, so results are the same to the last bit however
//! many are computed at once. A pixel's colours lie side by side and four lines are filtered at a
//! time, so that one weight meets sixteen values; what is filtered stays in the fastest cache until
//! the columns' sums are done with it.
#![allow(
    clippy::inline_always,
    reason = "only what is inlined is compiled for the instructions that `dispatch` chose"
)]

use pulp::{Simd, WithSimd};

use crate::pixels::take_apart;

/// Bytes of a pixel: red, green, blue, and one that is ignored.
const PIXEL: usize = 4;
/// Lines that are filtered along rows at once.
const LINES: usize = 4;
/// Values that are summed along columns at once.
const VALUES: usize = 16;
/// 3 * 2^22: a small number added to it is rounded half to even, and stands in its lowest bits.
/// Vector instructions do that; they have none for `as u8`.
pub(crate) const TO_WHOLE: f32 = 12_582_912.0;

/// The input pixels and weights of every output pixel along one axis.
#[derive(Debug)]
pub(crate) struct Taps {
    /// First input pixel, and where its weights start; one more entry closes the last.
    spans: Vec<(usize, usize)>,
    weights: Vec<f32>,
}

impl Taps {
    /// Collects the first input pixel and the weights of each output pixel; neither the first ones
    /// nor the last ones go back.
    pub(crate) fn new(pixels: impl Iterator<Item = (usize, Vec<f32>)>) -> Self {
        let (mut spans, mut weights) = (Vec::new(), Vec::new());
        for (first, own) in pixels {
            spans.push((first, weights.len()));
            weights.extend(own);
        }
        spans.push((0, weights.len()));
        Self { spans, weights }
    }

    /// Returns the number of output pixels.
    pub(crate) fn len(&self) -> usize {
        self.spans.len() - 1
    }

    /// Returns the largest number of input pixels of one output pixel.
    fn longest(&self) -> usize {
        let lengths = self.spans.windows(2).map(|ends| ends[1].1 - ends[0].1);
        lengths.max().unwrap_or(0)
    }

    #[inline]
    fn at(&self, i: usize) -> (usize, &[f32]) {
        let (first, start) = self.spans[i];
        (first, &self.weights[start..self.spans[i + 1].1])
    }
}

/// An image to be filtered along rows, then along columns. `FUSED` rounds each product and sum
/// once, as torchvision's kernels do, which decides ties; else twice.
///
/// # Shapes
/// `pixels` is [any, `width`, 4], of which the fourth byte means nothing; `planes` is
/// [3, rows, columns].
pub(crate) struct Filter<'a, const FUSED: bool> {
    pub(crate) pixels: &'a [u8],
    pub(crate) width: usize,
    pub(crate) rows: &'a Taps,
    pub(crate) columns: &'a Taps,
    pub(crate) planes: &'a mut [u8],
}

impl<const FUSED: bool> Filter<'_, FUSED> {
    /// Fills `planes`, with the processor's vector instructions.
    pub(crate) fn run(self) {
        pulp::Arch::new().dispatch(self);
    }
}

impl<const FUSED: bool> WithSimd for Filter<'_, FUSED> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = PIXEL * self.columns.len();
        let (red, others) = self.planes.split_at_mut(self.planes.len() / 3);
        let (green, blue) = others.split_at_mut(red.len());
        let red = red.chunks_exact_mut(self.columns.len());
        let green = green.chunks_exact_mut(self.columns.len());
        let blue = blue.chunks_exact_mut(self.columns.len());
        let mut out = vec![0; width];

        let mut lines = self.pixels.chunks_exact(PIXEL * self.width);
        let mut values = vec![0.0; LINES * PIXEL * self.width];
        // A ring of filtered lines: those of one sum, and those that came with its last one.
        let ring = (self.rows.longest() + LINES).next_power_of_two();
        let place = |line: usize| (line & (ring - 1)) * width;
        let mut narrow = vec![0.0; ring * width];
        let mut filtered = 0;
        for (y, ((red, green), blue)) in red.zip(green).zip(blue).enumerate() {
            let (first, weights) = self.rows.at(y);
            while filtered < first + weights.len() {
                for values in values.chunks_exact_mut(PIXEL * self.width) {
                    if let Some(pixels) = lines.next() {
                        for (value, &byte) in values.iter_mut().zip(pixels) {
                            *value = f32::from(byte);
                        }
                    }
                }
                let into = [0, 1, 2, 3].map(|line| place(filtered + line));
                filter_lines::<FUSED>(&values, self.columns, into, &mut narrow);
                filtered += LINES;
            }
            let of = (first..).map(|line| &narrow[place(line)..][..width]);
            filter_columns::<FUSED>(&of.zip(weights), &mut out);
            take_apart(&out, red, green, blue);
        }
    }
}

#[inline(always)]
fn add<const FUSED: bool>(a: f32, b: f32, sum: f32) -> f32 {
    if FUSED {
        a.mul_add(b, sum)
    } else {
        a * b + sum
    }
}

/// Filters four lines; `into` says where in `narrow` each of them goes.
#[inline(always)]
fn filter_lines<const FUSED: bool>(
    values: &[f32],
    columns: &Taps,
    into: [usize; LINES],
    narrow: &mut [f32],
) {
    let pixels = values.as_chunks::<PIXEL>().0;
    let (a, rest) = pixels.split_at(pixels.len() / LINES);
    let (b, rest) = rest.split_at(a.len());
    let (c, d) = rest.split_at(a.len());
    for x in 0..columns.len() {
        let (first, weights) = columns.at(x);
        let range = first..first + weights.len();
        let a_and_b = a[range.clone()].iter().zip(&b[range.clone()]);
        let c_and_d = c[range.clone()].iter().zip(&d[range]);
        let mut sums = [[0.0; PIXEL]; LINES];
        for (((a, b), (c, d)), &weight) in a_and_b.zip(c_and_d).zip(weights) {
            add_all::<FUSED, PIXEL>(a, weight, &mut sums[0]);
            add_all::<FUSED, PIXEL>(b, weight, &mut sums[1]);
            add_all::<FUSED, PIXEL>(c, weight, &mut sums[2]);
            add_all::<FUSED, PIXEL>(d, weight, &mut sums[3]);
        }
        for (into, sums) in into.iter().zip(&sums) {
            narrow[into + PIXEL * x..][..PIXEL].copy_from_slice(sums);
        }
    }
}

/// Sums weighted lines into one of bytes.
#[inline(always)]
fn filter_columns<'a, const FUSED: bool>(
    lines: &(impl Iterator<Item = (&'a [f32], &'a f32)> + Clone),
    out: &mut [u8],
) {
    let (blocks, rest) = out.as_chunks_mut::<VALUES>();
    let left = VALUES * blocks.len();
    for (i, bytes) in blocks.iter_mut().enumerate() {
        let mut sums = [0.0; VALUES];
        for (line, &weight) in lines.clone() {
            add_all::<FUSED, VALUES>(&line.as_chunks().0[i], weight, &mut sums);
        }
        to_bytes(&sums, bytes);
    }
    for (i, bytes) in rest.as_chunks_mut::<PIXEL>().0.iter_mut().enumerate() {
        let mut sums = [0.0; PIXEL];
        for (line, &weight) in lines.clone() {
            add_all::<FUSED, PIXEL>(&line[left..].as_chunks().0[i], weight, &mut sums);
        }
        to_bytes(&sums, bytes);
    }
}

#[inline(always)]
fn add_all<const FUSED: bool, const N: usize>(values: &[f32; N], weight: f32, sums: &mut [f32; N]) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum = add::<FUSED>(value, weight, *sum);
    }
}

#[inline(always)]
fn to_bytes<const N: usize>(sums: &[f32; N], bytes: &mut [u8; N]) {
    for (byte, sum) in bytes.iter_mut().zip(sums) {
        *byte = (sum.clamp(0.0, 255.0) + TO_WHOLE).to_bits() as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The sums as the references write them, one value after the other.
    fn plainly<const FUSED: bool>(
        (pixels, width): (&[u8], usize),
        (rows, columns): (&Taps, &Taps),
    ) -> Vec<u8> {
        let dot = |(first, weights): (usize, &[f32]), value: &dyn Fn(usize) -> f32| {
            let pairs = (first..).zip(weights);
            pairs.fold(0.0, |sum, (i, &weight)| add::<FUSED>(value(i), weight, sum))
        };
        let narrow = |y: usize, x: usize, c: usize| {
            let pixel = |i| f32::from(pixels[PIXEL * (y * width + i) + c]);
            dot(columns.at(x), &pixel)
        };
        let mut planes = Vec::new();
        for c in 0..3 {
            for y in 0..rows.len() {
                for x in 0..columns.len() {
                    let sum: f32 = dot(rows.at(y), &|line| narrow(line, x, c));
                    planes.push(sum.round_ties_even().clamp(0.0, 255.0) as u8);
                }
            }
        }
        planes
    }

    fn vectors_agree<const FUSED: bool>(
        (pixels, width): (&[u8], usize),
        (rows, columns): (&Taps, &Taps),
    ) {
        let mut planes = vec![0; 3 * rows.len() * columns.len()];
        Filter::<FUSED> {
            pixels,
            width,
            rows,
            columns,
            planes: &mut planes,
        }
        .run();
        assert_eq!(planes, plainly::<FUSED>((pixels, width), (rows, columns)));
    }

    /// Weights for `to` pixels out of `from`, some below zero, some sums out of range.
    fn taps(from: usize, to: usize) -> impl Strategy<Value = Taps> {
        let span = (0..from, 1..8_usize);
        let spans = proptest::collection::vec(span, to);
        let weights = proptest::collection::vec(-0.5..1.0_f32, 8 * to);
        (spans, weights).prop_map(move |(spans, weights)| {
            let (mut firsts, mut lasts): (Vec<usize>, Vec<usize>) = spans
                .into_iter()
                .map(|(first, count)| (first, from.min(first + count)))
                .unzip();
            firsts.sort_unstable();
            lasts.sort_unstable();
            let spans = firsts.into_iter().zip(lasts);
            let own = |((first, last), weights): ((usize, usize), &[f32])| {
                (first, weights[..last - first].to_vec())
            };
            Taps::new(spans.zip(weights.chunks(8)).map(own))
        })
    }

    proptest! {
        #[test]
        fn many_at_once_are_what_one_by_one_are(
            (pixels, width, rows, columns) in (1..24_usize, 1..24_usize, 1..24_usize, 1..24_usize)
                .prop_flat_map(|(height, width, out_height, out_width)| (
                    proptest::collection::vec(any::<u8>(), PIXEL * height * width),
                    Just(width),
                    taps(height, out_height),
                    taps(width, out_width),
                )),
        ) {
            vectors_agree::<true>((&pixels, width), (&rows, &columns));
            vectors_agree::<false>((&pixels, width), (&rows, &columns));
        }
    }
}
