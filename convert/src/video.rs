//! Frames of video files, decoded by the `ffmpeg` program.

use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::error::{Error, Result};

/// Environment variable with the path of the program.
pub(crate) const PROGRAM: &str = "POLLEN_FFMPEG";

/// A run of frames in a video file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clip<'a> {
    pub(crate) file: &'a Path,
    /// Number of the first frame in the file.
    pub(crate) first: u64,
    pub(crate) count: usize,
    pub(crate) fps: f64,
    pub(crate) height: u32,
    pub(crate) width: u32,
}

/// Ends the program when the clip is given up.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Clip<'_> {
    /// Decodes the frames in order, as pixels [height, width, 3].
    pub(crate) fn decode(&self, mut each: impl FnMut(Vec<u8>) -> Result<()>) -> Result<()> {
        let name = self.file.display().to_string();
        let failed = |source| Error::Io {
            file: name.clone(),
            source,
        };
        let mut messages = tempfile::tempfile().map_err(failed)?;
        let program = std::env::var_os(PROGRAM).unwrap_or_else(|| "ffmpeg".into());
        // Half a frame early, so that rounding cannot lose the first one.
        let start = ((self.first as f64 - 0.5) / self.fps).max(0.0);
        let child = Command::new(program)
            .args([
                "-nostdin",
                "-v",
                "error",
                "-ss",
                &format!("{start:.6}"),
                "-i",
            ])
            .arg(self.file)
            .args([
                "-frames:v",
                &self.count.to_string(),
                "-fps_mode",
                "passthrough",
            ])
            .args(["-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(messages.try_clone().map_err(failed)?)
            .spawn();
        let mut child = match child {
            Ok(child) => Running(child),
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(absent()),
            Err(error) => return Err(failed(error)),
        };
        let mut output = child.0.stdout.take().expect("its output is piped");
        let bytes = 3 * self.height as usize * self.width as usize;
        for frame in 0..self.count {
            let mut pixels = vec![0; bytes];
            if output.read_exact(&mut pixels).is_err() {
                let mut text = String::new();
                let _ = child.0.wait();
                let _ = messages.seek(SeekFrom::Start(0));
                let _ = messages.take(2000).read_to_string(&mut text);
                let frame = self.first + frame as u64;
                return Err(Error::unusable(
                    name,
                    format!("the video ends before frame {frame}: {}", text.trim()),
                ));
            }
            each(pixels)?;
        }
        Ok(())
    }
}

fn absent() -> Error {
    Error::arguments(format!(
        "the dataset has videos, which the program ffmpeg decodes, and it is not installed: \
         install it (apt-get install ffmpeg, or brew install ffmpeg) or set {PROGRAM} to its path"
    ))
}
