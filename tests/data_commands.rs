//! `pollen data stats` and its kin on copies of the committed demo.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs `pollen data` in the repository's root.
fn data(args: &[&str]) -> Output {
    data_command(args).output().unwrap()
}

fn data_command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pollen"));
    command.arg("data").args(args).current_dir(workspace());
    command.env_remove("POLLEN_DATA__ROOT");
    command
}

#[track_caller]
fn done(args: &[&str]) -> String {
    let output = data(args);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn refused(args: &[&str], parts: &[&str]) {
    let output = data(args);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let error = String::from_utf8(output.stderr).unwrap();
    for part in parts {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

/// Copies the demo's datasets without their indexes.
fn demo(to: &Path) {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let target = to.join(entry.file_name());
            if entry.path().is_dir() {
                copy(&entry.path(), &target);
            } else if entry.file_name() != "pollen.json" {
                std::fs::copy(entry.path(), target).unwrap();
            }
        }
    }
    copy(&workspace().join("demo/data"), to);
}

fn json(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn statistics_are_printed_for_a_recipe_a_dataset_and_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    demo(dir.path());
    let root = dir.path().to_str().unwrap();
    let of_recipe = json(&done(&[
        "stats", "demo", "--root", root, "--json", "--warn",
    ]));
    let names: Vec<&str> = of_recipe
        .iter()
        .map(|d| d["dataset"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["lift", "two_arm_handover"]);
    let lift = &of_recipe[0];
    assert_eq!(
        (&lift["frames"], &lift["embodiment"]),
        (&692.into(), &"eef_delta".into())
    );
    // No index was made; the one that the loader makes says the same.
    let path = dir.path().join("lift/meta/pollen.json");
    assert!(!path.exists());
    done(&["index", "demo", "--set", &format!("data.root={root}")]);
    let index = std::fs::read(path).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    for (dim, row) in lift["action"].as_array().unwrap().iter().enumerate() {
        for figure in ["mean", "std", "min", "q01", "q99", "max"] {
            assert_eq!(
                row[figure], index["action"][figure][dim],
                "{figure} of {dim}"
            );
        }
    }
    assert_eq!(lift["action"][6]["name"], "gripper");
    assert_eq!(lift["action"][6]["unit"], "open_fraction");
    assert_eq!(lift["state"][12]["name"], "finger_left");
    // By the name of its file and by that of its table, kept from the first time.
    for name in ["demo-lift", "lift"] {
        let text = done(&["stats", name, "--root", root]);
        for part in [
            "lift: 3 episodes, 692 frames, eef_delta",
            "droll",
            "rad",
            "q99",
            "kept",
        ] {
            assert!(text.contains(part), "`{part}` is not in: {text}");
        }
    }
    // A folder alone: columns as stored, with the dataset's own names.
    let folder = dir.path().join("lift");
    let folder = folder.to_str().unwrap();
    let plain = json(&done(&["stats", folder, "--json"]));
    assert_eq!(plain[0]["embodiment"], Value::Null);
    assert_eq!(plain[0]["action"][0]["name"], "dx");
    assert_eq!(plain[0]["action"][0]["unit"], "");
    let declared = json(&done(&["stats", folder, "--dataset", "lift", "--json"]));
    assert_eq!(declared[0]["action"], lift["action"]);
}

#[test]
fn the_demo_is_read_without_its_server() {
    let dir = tempfile::tempdir().unwrap();
    demo(dir.path());
    let run = |more: &[&str]| {
        let mut command = data_command(&["stats", "demo", "--dataset", "lift"]);
        command.env("POLLEN_RUN__STAGE_FROM", dir.path());
        let output = command.args(more).output().unwrap();
        let [out, error] = [output.stdout, output.stderr].map(|b| String::from_utf8(b).unwrap());
        (output.status.success(), out, error)
    };
    let (done, text, error) = run(&[]);
    let note = format!("reading {}, of which s3://", dir.path().display());
    assert!(done && error.contains(&note), "{error}");
    assert!(text.contains("lift: 3 episodes"), "{text}");
    // A root that is given is the one that is read.
    let (done, _, error) = run(&["--root", "nowhere"]);
    assert!(!done && error.contains("nowhere"), "{error}");
}

#[test]
fn what_is_meant_by_a_name_is_said_when_it_is_nothing() {
    refused(
        &["stats", "lifd"],
        &["`lifd`", "no recipe", "lift", "two_arm_handover"],
    );
    refused(&["stats", "lift"], &["--root", "POLLEN_DATA__ROOT"]);
    refused(
        &["stats", "demo", "--root", "x", "--dataset", "y"],
        &["lift", "two_arm_handover"],
    );
}

#[test]
fn the_demo_is_added_and_loads() {
    let dir = tempfile::tempdir().unwrap();
    demo(dir.path());
    let add = |name: &str, embodiment: &str, arms: &[&str]| {
        let folder = dir.path().join(name);
        let file = dir.path().join(format!("{name}.toml"));
        let (folder, file) = (folder.to_str().unwrap(), file.to_str().unwrap());
        let printed = done(&["add", folder, "my_arm", "--out", file]);
        let text = std::fs::read_to_string(file).unwrap();
        for part in [
            "motion: delta by",
            "embodiment = ",
            "hz = 10",
            "chunk_length = 10",
        ] {
            let found = printed.contains(part) || text.contains(part);
            assert!(found, "`{part}` is not in: {printed}{text}");
        }
        for gripper in arms {
            let line = printed.lines().find(|line| {
                line.contains("gripper_polarity") && line.contains(&format!("`{gripper}`"))
            });
            let line = line.unwrap_or_else(|| panic!("`{gripper}` is not in: {printed}"));
            assert!(
                line.contains("ok:") && line.ends_with("1 is open"),
                "{line}"
            );
        }
        assert!(
            printed.contains("episodes have an instruction (100 %)"),
            "{printed}"
        );
        assert!(text.contains("gripper = \"one_is_open\""), "{text}");
        assert!(!text.contains("transform"), "{text}");
        // What it wrote is read, and fits the dataset.
        let stats = json(&done(&["stats", folder, "--dataset", file, "--json"]));
        assert_eq!(stats[0]["embodiment"], embodiment);
        refused(
            &["add", folder, "my_arm", "--out", file],
            &["exists", "--force"],
        );
        (printed, text)
    };
    let (printed, text) = add("lift", "eef_delta", &["gripper"]);
    assert!(
        text.contains("wrist = \"observation.images.wrist\""),
        "{text}"
    );
    // Lift's human never turned the hand about x and y.
    for dim in ["droll", "dpitch"] {
        let found = format!("`{dim}`: it is 0 in all 692 frames");
        assert!(printed.contains(&found), "`{found}` is not in: {printed}");
    }
    let (_, text) = add(
        "two_arm_handover",
        "bimanual_eef_delta",
        &["arm0_gripper", "arm1_gripper"],
    );
    assert!(
        text.contains("Not used: observation.images.wrist_right"),
        "{text}"
    );
    refused(&["add", "/nowhere/at/all", "x y"], &["letters, digits"]);
}

#[test]
fn episodes_are_shown_as_a_page_and_a_sheet() {
    let dir = tempfile::tempdir().unwrap();
    demo(dir.path());
    let root = dir.path().to_str().unwrap();
    let out = dir.path().join("look");
    let args = [
        "inspect",
        "lift",
        "--root",
        root,
        "--frames",
        "4",
        "--episodes",
        "0,1-2",
    ];
    let printed = done(&[&args[..], &["--out", out.to_str().unwrap()]].concat());
    for part in [
        "lift, episode 2",
        "pick up the red cube",
        "gripper [open_fraction]",
        "sheet.png",
    ] {
        assert!(printed.contains(part), "`{part}` is not in: {printed}");
    }
    let page = std::fs::read_to_string(out.join("lift/index.html")).unwrap();
    // Nothing is loaded from elsewhere.
    assert!(!page.contains("http") && !page.contains("<script") && !page.contains("<link"));
    assert_eq!(page.matches("<section>").count(), 3);
    assert_eq!(page.matches("data:image/jpeg;base64,").count(), 3 * 2 * 4);
    // Per episode and dimension a raw and a normalised curve.
    assert_eq!(page.matches("<polyline").count(), 3 * 7 * 2);
    for part in ["dx [m]", "0.00 s", "frame 0<", "pick up the red cube"] {
        assert!(page.contains(part), "`{part}` is not in the page");
    }
    // Tags are balanced, so that a browser shows what was meant.
    for tag in [
        "section", "table", "tr", "td", "svg", "figure", "div", "body", "html",
    ] {
        let opened =
            page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
    let sheet = std::fs::File::open(out.join("lift/sheet.png")).unwrap();
    let mut reader = png::Decoder::new(std::io::BufReader::new(sheet))
        .read_info()
        .unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let frame = reader.next_frame(&mut pixels).unwrap();
    assert!(frame.width >= 720 && frame.height > 3 * 7 * 44, "{frame:?}");
    let colors: std::collections::HashSet<&[u8]> = pixels.chunks(3).collect();
    assert!(
        colors.len() > 1000,
        "pictures and curves, not {} colours",
        colors.len()
    );
    refused(
        &[
            "inspect",
            "lift",
            "--root",
            root,
            "--episodes",
            "7",
            "--out",
            root,
        ],
        &["names episode 7", "has 3"],
    );
}
