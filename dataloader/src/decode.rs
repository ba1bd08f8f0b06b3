//! JPEG frames to pixels, and the threads that do it.

use std::cell::RefCell;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use pollen_core::no_panic;
use pollen_processing::{Image, Resizer};

/// Longest side of a frame; a larger one is taken for a broken header.
const MAX_SIDE: usize = 8192;

/// Decodes a frame; the error says what is wrong with it.
///
/// `size` is the height and width that `info.json` promises.
pub fn decode_jpeg(bytes: &[u8], size: Option<(usize, usize)>) -> Result<Image, String> {
    decode_with(bytes, size, |height, width, pixels| {
        Image::from_padded(height, width, pixels).map_err(|e| e.to_string())
    })
}

/// Decodes a frame and resizes it into its place in a batch.
///
/// # Shapes
/// `planes` is [3, side, side].
pub(crate) fn decode_jpeg_into(
    bytes: &[u8],
    size: Option<(usize, usize)>,
    resizer: &Resizer,
    planes: &mut [u8],
) -> Result<(), String> {
    decode_with(bytes, size, |height, width, pixels| {
        let resized = resizer.resize_square_into((height, width), pixels, planes);
        resized.map_err(|e| e.to_string())
    })
}

/// Decodes a frame and gives height, width and pixels [height, width, 4] to `take`.
fn decode_with<T>(
    bytes: &[u8],
    size: Option<(usize, usize)>,
    take: impl FnOnce(usize, usize, &[u8]) -> Result<T, String>,
) -> Result<T, String> {
    if !bytes.starts_with(&[0xff, 0xd8]) {
        let what = match bytes {
            [] => "is empty",
            [0x89, b'P', b'N', b'G', ..] => "is a PNG; convert it with `pollen data convert`",
            _ => "is not a JPEG",
        };
        return Err(format!("the image {what}"));
    }
    thread_local! {
        static OWN: RefCell<Decoder> = RefCell::default();
    }
    OWN.with_borrow_mut(|own| {
        let (height, width) = no_panic(|| own.decode(bytes, size), |said| said)?;
        take(height, width, &own.pixels[..4 * height * width])
    })
}

/// What a thread keeps from one frame to the next: the pixels' memory, and libjpeg-turbo's
/// decompressor, which costs as much to make as a small image to decode.
#[derive(Default)]
struct Decoder {
    pixels: Vec<u8>,
    #[cfg(feature = "turbo")]
    turbo: Option<turbojpeg::Decompressor>,
}

/// Refuses what does not fit what `info.json` promises, before any pixel is decoded.
fn check_header(
    (height, width): (usize, usize),
    components: u8,
    size: Option<(usize, usize)>,
) -> Result<(), String> {
    if components != 3 {
        return Err(format!(
            "the JPEG has {components} colour components in place of 3"
        ));
    }
    if height > MAX_SIDE || width > MAX_SIDE {
        return Err(format!(
            "the JPEG is {height} x {width}; the limit is {MAX_SIDE}"
        ));
    }
    match size {
        Some((h, w)) if (h, w) != (height, width) => Err(format!(
            "the JPEG is {height} x {width}, info.json says {h} x {w}"
        )),
        _ => Ok(()),
    }
}

impl Decoder {
    /// Decodes to [height, width, 4] at the start of `pixels` and returns height and width.
    #[cfg(not(feature = "turbo"))]
    fn decode(
        &mut self,
        bytes: &[u8],
        size: Option<(usize, usize)>,
    ) -> Result<(usize, usize), String> {
        use zune_core::bytestream::ZCursor;
        use zune_core::colorspace::ColorSpace;
        use zune_core::options::DecoderOptions;
        let failed = |error| format!("the JPEG cannot be decoded: {error:?}");
        // Strict: a file that ends early is an error and not a grey area.
        let options = DecoderOptions::default()
            .set_strict_mode(true)
            .set_max_width(MAX_SIDE)
            .set_max_height(MAX_SIDE)
            .jpeg_set_out_colorspace(ColorSpace::RGBA);
        let mut decoder = zune_jpeg::JpegDecoder::new_with_options(ZCursor::new(bytes), options);
        decoder.decode_headers().map_err(failed)?;
        let info = decoder.info().ok_or("the JPEG has no frame header")?;
        let (height, width) = (usize::from(info.height), usize::from(info.width));
        check_header((height, width), info.components, size)?;
        let pixels = self.room(height, width);
        decoder.decode_into(pixels).map_err(failed)?;
        Ok((height, width))
    }

    /// Decodes to [height, width, 4] at the start of `pixels` and returns height and width.
    #[cfg(feature = "turbo")]
    fn decode(
        &mut self,
        bytes: &[u8],
        size: Option<(usize, usize)>,
    ) -> Result<(usize, usize), String> {
        use turbojpeg::{Colorspace, Decompressor, PixelFormat};
        let failed = |error: turbojpeg::Error| format!("the JPEG cannot be decoded: {error}");
        let mut turbo = match self.turbo.take() {
            Some(turbo) => turbo,
            None => Decompressor::new().map_err(failed)?,
        };
        let header = turbo.read_header(bytes).map_err(failed)?;
        let (height, width) = (header.height, header.width);
        let components = match header.colorspace {
            Colorspace::YCbCr | Colorspace::RGB => 3,
            Colorspace::Gray => 1,
            Colorspace::CMYK | Colorspace::YCCK => 4,
        };
        check_header((height, width), components, size)?;
        let image = turbojpeg::Image {
            pixels: self.room(height, width),
            width,
            pitch: 4 * width,
            height,
            format: PixelFormat::RGBX,
        };
        // A file that ends early is a warning to the library and an error here.
        turbo.decompress(bytes, image).map_err(failed)?;
        self.turbo = Some(turbo);
        Ok((height, width))
    }

    /// Returns memory for an image, kept for the next one.
    fn room(&mut self, height: usize, width: usize) -> &mut [u8] {
        let bytes = 4 * height * width;
        if self.pixels.len() < bytes {
            self.pixels.resize(bytes, 0);
        }
        &mut self.pixels[..bytes]
    }
}

pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Threads that take jobs from a bounded queue; dropping the pool finishes the queue and joins them.
#[derive(Debug)]
pub(crate) struct DecodePool {
    jobs: Option<SyncSender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl DecodePool {
    pub(crate) fn start(num_threads: usize) -> Self {
        let (jobs, queue) = sync_channel::<Job>(2 * num_threads);
        let queue = Arc::new(Mutex::new(queue));
        let threads = (0..num_threads)
            .map(|i| {
                let queue = Arc::clone(&queue);
                std::thread::Builder::new()
                    .name(format!("pollen-decode-{i}"))
                    .spawn(move || work(&queue))
                    .expect("the process may start a thread")
            })
            .collect();
        Self {
            jobs: Some(jobs),
            threads,
        }
    }

    /// Queues a job; waits while the queue is full.
    pub(crate) fn run(&self, job: Job) {
        let jobs = self.jobs.as_ref().expect("present until the drop");
        // Fails only when every thread has panicked; whoever waits for the job then sees that.
        drop(jobs.send(job));
    }
}

fn work(queue: &Mutex<Receiver<Job>>) {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match next {
            Ok(job) => job(),
            Err(_) => return,
        }
    }
}

impl Drop for DecodePool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A panic was reported by its own thread; the batch it worked on says so, too.
            drop(thread.join());
        }
    }
}

/// Returns the number of decode threads for a setting of 0.
pub(crate) fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn other_formats_are_named() {
        let error = |bytes: &[u8]| decode_jpeg(bytes, None).expect_err("not a JPEG");
        assert!(error(b"").contains("is empty"));
        assert!(error(b"\x89PNG\r\n").contains("pollen data convert"));
        assert!(error(b"GIF89a").contains("not a JPEG"));
        assert!(error(b"\xff\xd8\xff").contains("cannot be decoded"));
    }

    #[test]
    fn the_pool_finishes_its_queue() {
        let done = Arc::new(AtomicUsize::new(0));
        let pool = DecodePool::start(2);
        for _ in 0..50 {
            let done = Arc::clone(&done);
            pool.run(Box::new(move || {
                done.fetch_add(1, Ordering::Relaxed);
            }));
        }
        drop(pool);
        assert_eq!(done.load(Ordering::Relaxed), 50);
    }
}
