//! The contact sheet: frames and curves as one PNG, for where no browser is.

use anyhow::Result;
use pollen_dataloader::decode::decode_jpeg;

use super::canvas::{Canvas, Color, LETTER};
use super::{Look, Shown, bounds};

const PAPER: Color = [250, 250, 250];
const INK: Color = [30, 30, 30];
const GREY: Color = [205, 205, 205];
const RAW: Color = [20, 90, 170];
const NORMALISED: Color = [190, 80, 20];
const MARGIN: usize = 8;
const LINE: usize = LETTER + 4;
/// Height of a frame.
const TILE: usize = 112;
/// Height of a curve.
const CURVE: usize = 44;
/// Width of a curve's name and range.
const LABEL: usize = 22 * LETTER;

pub(super) fn png(look: &Look) -> Result<Vec<u8>> {
    let tiles = look.shown.iter().map(|shown| shown.pictures.len()).max();
    let tile_width = tile_width(look);
    let inner = (tiles.unwrap_or(1).max(1) * (tile_width + 4)).max(720);
    let width = inner + 2 * MARGIN;
    let height_of = |shown: &Shown| {
        2 * LINE
            + look.cameras.len() * (TILE + 4)
            + LINE
            + look.dimensions.len() * (CURVE + 6)
            + shown.faults(look).len() * LINE
            + 2 * MARGIN
    };
    let height = MARGIN + look.shown.iter().map(height_of).sum::<usize>();
    let mut canvas = Canvas::new(width, height.max(2 * MARGIN), PAPER);
    let mut y = MARGIN;
    for shown in &look.shown {
        episode(&mut canvas, look, shown, [MARGIN, y, inner], tile_width);
        y += height_of(shown);
    }
    canvas.png()
}

/// Width of a tile by the first picture that can be decoded.
fn tile_width(look: &Look) -> usize {
    let pictures = look.shown.iter().flat_map(|shown| &shown.pictures);
    let mut images = pictures.flat_map(|picture| picture.images.iter().flatten());
    let decoded = images.find_map(|bytes| decode_jpeg(bytes, None).ok());
    decoded.map_or(TILE, |image| TILE * image.width() / image.height().max(1))
}

fn episode(
    canvas: &mut Canvas,
    look: &Look,
    shown: &Shown,
    [x, mut y, width]: [usize; 3],
    tile_width: usize,
) {
    canvas.text([x, y, width], &shown.title(look), INK);
    canvas.text([x, y + LINE, width], &shown.instruction, RAW);
    y += 2 * LINE;
    for camera in 0..look.cameras.len() {
        for (number, picture) in shown.pictures.iter().enumerate() {
            let at = [x + number * (tile_width + 4), y, tile_width, TILE];
            let decoded = picture.images[camera].as_ref();
            match decoded.and_then(|bytes| decode_jpeg(bytes, None).ok()) {
                Some(image) => canvas.image(at, &image),
                None => canvas.fill(at, GREY),
            }
        }
        y += TILE + 4;
    }
    for (number, picture) in shown.pictures.iter().enumerate() {
        let at = x + number * (tile_width + 4);
        canvas.text([at, y, tile_width], &look.time(picture.frame), INK);
    }
    y += LINE;
    let curve = (width - LABEL) / 2 - MARGIN;
    for (dim, dimension) in look.dimensions.iter().enumerate() {
        let (raw, normalised) = (shown.raw(dim), shown.normalised(dim));
        let [low, high] = bounds(&raw);
        canvas.text([x, y, LABEL], &look.label(dimension), INK);
        canvas.text([x, y + LINE, LABEL], &format!("max {high:.4}"), RAW);
        canvas.text([x, y + 2 * LINE, LABEL], &format!("min {low:.4}"), RAW);
        for (number, (values, range, color)) in [
            (&raw, [low, high], RAW),
            (&normalised, [-1.0, 1.0], NORMALISED),
        ]
        .into_iter()
        .enumerate()
        {
            let at = [x + LABEL + number * (curve + MARGIN), y, curve, CURVE];
            canvas.fill(at, [255; 3]);
            canvas.fill([at[0], y + CURVE / 2, curve, 1], GREY);
            canvas.curve(at, values, range, color);
        }
        y += CURVE + 6;
    }
    for fault in shown.faults(look) {
        canvas.text([x, y, width], &fault, [200, 0, 0]);
        y += LINE;
    }
}
