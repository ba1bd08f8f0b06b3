use std::path::Path;

use super::{Dataset, args, convert_all, pixels};
use crate::SourceKind;
use crate::npy::writing::{npy, npz};
use crate::picture::Frame;

fn floats(values: &[f32]) -> Vec<u8> {
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    npy("<f4", &format!("({},)", values.len()), &data)
}

/// Writes recordings 3..=6 and 20..=24, and a stray frame 9.
fn write(folder: &Path, annotations: Option<&str>) {
    let training = folder.join("training");
    std::fs::create_dir_all(training.join("lang_annotations")).unwrap();
    let ids: Vec<u8> = [3_i64, 6, 20, 24]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    std::fs::write(
        training.join("ep_start_end_ids.npy"),
        npy("<i8", "(2, 2)", &ids),
    )
    .unwrap();
    for frame in [3, 4, 5, 6, 9, 20, 21, 22, 23, 24] {
        let archive = npz(&[
            ("actions", floats(&[9.0; 7])),
            ("rel_actions", floats(&[frame as f32 / 100.0; 7])),
            ("robot_obs", floats(&[frame as f32; 15])),
            (
                "rgb_static",
                npy("|u1", "(12, 10, 3)", &pixels(12, 10, frame)),
            ),
            (
                "rgb_gripper",
                npy("|u1", "(8, 8, 3)", &pixels(8, 8, frame + 500)),
            ),
            ("depth_static", npy("<f4", "(1, 2)", &[0; 8])),
        ]);
        std::fs::write(training.join(format!("episode_{frame:07}.npz")), archive).unwrap();
    }
    match annotations {
        Some(text) => {
            let path = training.join("lang_annotations/auto_lang_ann.json");
            std::fs::write(path, text).unwrap();
        }
        None => std::fs::remove_dir(training.join("lang_annotations")).unwrap(),
    }
}

const SEGMENTS: &str = r#"{"version": 1, "segments": [
    {"start": 21, "end": 23, "text": "open the drawer", "task": "open_drawer"},
    {"start": 3, "end": 4, "text": "push the button"},
    {"start": 22, "end": 24, "text": "open the drawer"}]}"#;

#[test]
fn language_segments_become_episodes() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("calvin"), temp.path().join("out"));
    write(&source, Some(SEGMENTS));
    let report = convert_all(&args(&source, &out)).unwrap();
    assert_eq!(
        (report.kind, report.episodes, report.frames),
        (SourceKind::Calvin, 3, 8)
    );
    let dataset = Dataset::read(&out);
    assert_eq!(dataset.info["fps"], 30);
    let frames: Vec<f32> = dataset
        .rows("observation.state")
        .iter()
        .map(|row| row[0])
        .collect();
    assert_eq!(frames, [21.0, 22.0, 23.0, 3.0, 4.0, 22.0, 23.0, 24.0]);
    assert_eq!(dataset.rows("action")[4], [0.04; 7]);
    assert_eq!(
        dataset.instructions()[2..4],
        ["open the drawer", "push the button"]
    );
    // Arrays become PNG without loss.
    let image = Frame::new(dataset.images("static")[3].clone()).unwrap();
    assert_eq!(image.decode().unwrap(), pixels(12, 10, 3));
    assert_eq!(
        dataset.info["features"]["observation.images.gripper"]["shape"][0],
        8
    );
}

#[test]
fn recordings_become_episodes_where_nothing_is_annotated() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("calvin"), temp.path().join("out"));
    write(&source, None);
    let mut args = args(&source, &out);
    args.jpeg_quality = Some(95);
    let report = convert_all(&args).unwrap();
    assert_eq!((report.episodes, report.frames), (2, 9));
    assert!(
        report
            .notes
            .iter()
            .any(|note| note.contains("whole recordings"))
    );
    assert!(
        report
            .notes
            .iter()
            .any(|note| note.contains("2 episodes have no instruction"))
    );
    let dataset = Dataset::read(&out);
    assert!(
        dataset
            .images("static")
            .iter()
            .all(|image| image.starts_with(&[0xff, 0xd8]))
    );
}

#[test]
fn what_is_wrong_is_named() {
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("calvin");
    let fails = |name: &str| {
        let out = temp.path().join(name);
        convert_all(&args(&source, &out)).unwrap_err().to_string()
    };
    write(
        &source,
        Some(r#"{"version": 1, "segments": [{"start": 5, "end": 9}]}"#),
    );
    let error = fails("a");
    assert!(
        error.contains("frames 5 to 9 lie in no recording"),
        "{error}"
    );
    let annotations = source.join("training/lang_annotations");
    std::fs::remove_file(annotations.join("auto_lang_ann.json")).unwrap();
    std::fs::write(annotations.join("auto_lang_ann.npy"), b"\x93NUMPY").unwrap();
    let error = fails("b");
    assert!(error.contains("calvin_annotations.py"), "{error}");
    std::fs::write(annotations.join("auto_lang_ann.json"), SEGMENTS).unwrap();
    // A frame that is cut off is broken; one that is missing costs its episodes.
    let frame = source.join("training/episode_0000022.npz");
    let whole = std::fs::read(&frame).unwrap();
    std::fs::write(&frame, &whole[..whole.len() / 2]).unwrap();
    let error = fails("c");
    assert!(
        error.contains("episode_0000022.npz is broken at byte"),
        "{error}"
    );
    std::fs::remove_file(&frame).unwrap();
    let report = convert_all(&args(&source, &temp.path().join("d"))).unwrap();
    assert_eq!((report.episodes, report.dropped.len()), (1, 2));
    assert!(
        report.dropped[0]
            .why
            .contains("episode_0000022.npz: the file is missing")
    );
}
