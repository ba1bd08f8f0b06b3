use std::path::Path;

use super::{Dataset, args, convert_all, real_data};
use crate::SourceKind;

/// Episode, sum of its actions, sum of its states.
const SUMS: [(i64, f64, f64); 3] = [
    (0, -338.350_000_023_841_86, 7_970.141_414_079_209),
    (1, -351.250_000_059_604_64, 8_775.744_799_487_267),
    (2, -265.5, 5_443.753_373_720_776),
];

/// Checks that images lie in this order in a file, without parsing it.
fn in_order(file: &[u8], images: &[bytes::Bytes], from: usize) -> usize {
    let mut at = from;
    for (i, image) in images.iter().enumerate() {
        let found = file[at..]
            .windows(image.len())
            .position(|bytes| bytes == &image[..]);
        at += found.unwrap_or_else(|| panic!("image {i} is not in the file behind byte {at}"));
        at += image.len();
    }
    at
}

#[test]
fn bridge_fragments_keep_every_byte_of_their_images() {
    let Some(source) = real_data("octo-bridge-debug") else {
        return;
    };
    let temp = tempfile::tempdir().unwrap();
    let report = convert_all(&args(&source, temp.path())).unwrap();
    assert_eq!(report.kind, SourceKind::Rlds);
    assert_eq!((report.episodes, report.frames, report.files), (25, 250, 1));
    assert_eq!(report.dropped, []);
    let dataset = Dataset::read(temp.path());
    assert_eq!(dataset.tasks.len(), 4);
    assert_eq!(
        (&dataset.info["fps"], &dataset.info["robot_type"]),
        (&5.into(), &"widowx".into())
    );
    let shard = source.join("bridge_dataset/1.0.0/bridge_dataset-train.tfrecord-00000-of-00001");
    let file = std::fs::read(shard).unwrap();
    let cameras = ["image_0", "image_1", "image_2", "image_3"].map(|name| dataset.images(name));
    let mut record = 0;
    for episode in 0..25 {
        let length = u64::from_le_bytes(*file[record..].first_chunk().unwrap()) as usize;
        let end = record + length + 16;
        for camera in &cameras {
            let images = &camera[10 * episode..10 * episode + 10];
            assert!(in_order(&file[..end], images, record) <= end);
        }
        record = end;
    }
    assert_eq!(record, file.len());
    for row in dataset.rows("action") {
        assert_eq!(row.len(), 7);
        assert!(row[..3].iter().all(|v| v.abs() < 0.034), "{row:?}");
        assert!(row[3..6].iter().all(|v| v.abs() < 0.27), "{row:?}");
        assert!((0.0..=1.0).contains(&row[6]), "{row:?}");
    }
    assert_eq!(dataset.rows("observation.state").len(), 250);
}

#[test]
fn robosuite_demonstrations() {
    let Some(source) = real_data("robosuite-lift-demos") else {
        return;
    };
    let temp = tempfile::tempdir().unwrap();
    let mut args = args(Path::new(&source), temp.path());
    args.task = Some("lift the cube".into());
    let report = convert_all(&args).unwrap();
    assert_eq!(
        (report.kind, report.episodes, report.frames),
        (SourceKind::Hdf5, 3, 1384)
    );
    assert!(
        report.notes.iter().any(|note| note.contains("no images")),
        "{:?}",
        report.notes
    );
    let dataset = Dataset::read(temp.path());
    let episodes = dataset.integers("episode_index");
    let length = |wanted: i64| {
        episodes
            .iter()
            .filter(|episode| **episode == wanted)
            .count()
    };
    assert_eq!([length(0), length(1), length(2)], [482, 510, 392]);
    // Sums that h5py and NumPy give for the same rows as 32-bit floats.
    let sum = |name: &str, episode: i64| -> f64 {
        let rows = dataset.rows(name);
        let rows = rows.iter().zip(&episodes).filter(|(_, e)| **e == episode);
        rows.flat_map(|(row, _)| row).map(|v| f64::from(*v)).sum()
    };
    for (episode, action, state) in SUMS {
        assert!((sum("action", episode) - action).abs() < 1e-6, "{episode}");
        assert!(
            (sum("observation.state", episode) - state).abs() < 1e-6,
            "{episode}"
        );
    }
    assert_eq!(dataset.tasks, ["lift the cube"]);
}
