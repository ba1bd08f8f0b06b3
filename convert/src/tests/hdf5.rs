use std::path::Path;

use hdf5_pure::{AttrValue, FileBuilder};

use super::{Dataset, args, convert_all, pixels};
use crate::SourceKind;
use crate::picture::Frame;

/// Writes demonstrations 1, 2 and 10 of 5, 6 and 7 rows; `original` is LIBERO's own layout.
fn write(path: &Path, libero: bool, original: bool) {
    let mut file = FileBuilder::new();
    let mut data = file.create_group("data");
    if libero {
        let info = r#"{"language_instruction": "turn on the stove"}"#;
        data.set_attr("problem_info", AttrValue::String(info.into()));
        data.set_attr("bddl_file_name", AttrValue::String("x.bddl".into()));
    }
    if original || !libero {
        data.set_attr("env_args", AttrValue::String("{}".into()));
    }
    for (name, rows) in [("demo_10", 7), ("demo_2", 6), ("demo_1", 5)] {
        let mut demo = data.create_group(name);
        let values = |width: usize, scale: f64| -> Vec<f64> {
            (0..rows * width)
                .map(|i| (i / width) as f64 * scale + (i % width) as f64 / 16.0)
                .collect()
        };
        let shape = |width: usize| [rows as u64, width as u64];
        demo.create_dataset("actions")
            .with_f64_data(&values(7, 1.0))
            .with_shape(&shape(7));
        demo.create_dataset("dones")
            .with_u8_data(&vec![0; rows])
            .with_shape(&[rows as u64]);
        let mut obs = demo.create_group("obs");
        let images: Vec<u8> = (0..rows)
            .flat_map(|row| pixels(10, 12, row as u32))
            .collect();
        let (camera, states) = if libero {
            ("agentview_rgb", ["ee_states", "gripper_states"])
        } else {
            ("agentview_image", ["robot0_eef_pos", "robot0_eef_quat"])
        };
        obs.create_dataset(camera)
            .with_u8_data(&images)
            .with_shape(&[rows as u64, 10, 12, 3])
            .with_chunks(&[1, 10, 12, 3])
            .with_deflate(4);
        obs.create_dataset(states[0])
            .with_f64_data(&values(6, 10.0))
            .with_shape(&shape(6));
        obs.create_dataset(states[1])
            .with_f64_data(&values(2, 100.0))
            .with_shape(&shape(2));
        obs.create_dataset("robot0_gripper_qpos")
            .with_f64_data(&values(2, 5.0))
            .with_shape(&shape(2));
        demo.add_group(obs.finish());
        data.add_group(demo.finish());
    }
    file.add_group(data.finish());
    file.write(path).unwrap();
}

fn turned(frame: u32) -> Vec<u8> {
    let mut pixels = pixels(10, 12, frame);
    pixels.as_chunks_mut::<3>().0.reverse();
    pixels
}

#[test]
fn liberos_own_files_are_aligned_and_turned() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("suite"), temp.path().join("out"));
    std::fs::create_dir_all(&source).unwrap();
    write(
        &source.join("KITCHEN_SCENE1_turn_on_the_stove_demo.hdf5"),
        true,
        true,
    );
    let report = convert_all(&args(&source, &out)).unwrap();
    assert_eq!(
        (report.kind, report.episodes, report.frames),
        (SourceKind::Hdf5, 3, 4 + 5 + 6)
    );
    let dataset = Dataset::read(&out);
    // The observation of row t stands beside the action of row t + 1.
    assert_eq!(dataset.rows("observation.state")[1][0], 10.0);
    assert_eq!(dataset.rows("observation.state")[1][6], 100.0);
    assert_eq!(dataset.rows("action")[1][0], 2.0);
    // `demo_10` comes last.
    assert_eq!(dataset.integers("episode_index")[4..10], [1, 1, 1, 1, 1, 2]);
    let image = Frame::new(dataset.images("agentview")[1].clone()).unwrap();
    assert_eq!(image.decode().unwrap(), turned(1));
    assert_eq!(dataset.instructions()[0], "turn on the stove");
    assert!(
        report.notes.iter().any(|note| note.contains("next action")),
        "{:?}",
        report.notes
    );
}

#[test]
fn regenerated_libero_files_are_aligned_already() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("a.hdf5"), temp.path().join("out"));
    write(&source, true, false);
    let mut args = args(&source, &out);
    args.rotate = Some(false);
    let report = convert_all(&args).unwrap();
    assert_eq!(report.frames, 18);
    let dataset = Dataset::read(&out);
    assert_eq!(dataset.rows("action")[1][0], 1.0);
    let image = Frame::new(dataset.images("agentview")[6].clone()).unwrap();
    assert_eq!(image.decode().unwrap(), pixels(10, 12, 1));
}

#[test]
fn robomimic_files() {
    let temp = tempfile::tempdir().unwrap();
    let (source, out) = (temp.path().join("low_dim.hdf5"), temp.path().join("out"));
    write(&source, false, false);
    let report = convert_all(&args(&source, &out)).unwrap();
    assert_eq!(report.frames, 18);
    assert!(
        report
            .notes
            .iter()
            .any(|note| note.contains("no instruction")),
        "{:?}",
        report.notes
    );
    let dataset = Dataset::read(&out);
    assert_eq!(dataset.rows("observation.state")[1].len(), 6 + 2 + 2);
    let image = Frame::new(dataset.images("agentview")[6].clone()).unwrap();
    assert_eq!(image.decode().unwrap(), pixels(10, 12, 1));
}

#[test]
fn broken_files_are_errors_that_name_them() {
    let temp = tempfile::tempdir().unwrap();
    let (good, bad) = (temp.path().join("good.hdf5"), temp.path().join("bad.hdf5"));
    write(&good, true, true);
    let whole = std::fs::read(&good).unwrap();
    for end in [0, 8, 100, whole.len() / 2] {
        std::fs::write(&bad, &whole[..end]).unwrap();
        let out = temp.path().join(format!("out-{end}"));
        let error = convert_all(&args(&bad, &out)).unwrap_err().to_string();
        assert!(error.contains("bad.hdf5"), "{error}");
    }
}
