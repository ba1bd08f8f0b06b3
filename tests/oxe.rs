//! The pretraining recipes need nothing but the address of the datasets.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::{Command, Output};

fn pollen(args: &[&str], root: Option<&str>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pollen"));
    command.args(args).env_remove("POLLEN_DATA__ROOT");
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    command.envs(root.map(|root| ("POLLEN_DATA__ROOT", root)));
    command.output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn the_address_is_all_that_is_asked_for() {
    for recipe in ["oxe", "oxe-reference"] {
        let missing = pollen(&["plan", recipe], None);
        assert_eq!(missing.status.code(), Some(2));
        let error = String::from_utf8(missing.stderr).unwrap();
        assert!(
            error.contains("data.root is empty") && error.contains("POLLEN_DATA__ROOT="),
            "{error}"
        );
        let root = Some("s3://bucket/oxe");
        let plan = stdout(&pollen(&["plan", recipe], root));
        let (batch, steps) = match recipe {
            "oxe" => (
                "1024 samples a step = 32 a micro-batch x 4 workers x 8",
                "360,000,",
            ),
            _ => (
                "1200 samples a step = 150 a micro-batch x 4 workers x 2",
                "400,000,",
            ),
        };
        let plain = plan.replace("1,024", "1024").replace("1,200", "1200");
        assert!(plain.contains(batch) && plan.contains(steps), "{plan}");
        assert!(plan.contains("capped at 200 GPU-hours"), "{plan}");
        let rows = stdout(&pollen(&["config", "explain", recipe], root));
        let row = |key: &str| {
            let found = rows
                .lines()
                .find(|line| line.starts_with(&format!("{key} = ")));
            found
                .unwrap_or_else(|| panic!("{key} is not in {rows}"))
                .to_owned()
        };
        assert!(row("data.root").contains("# environment POLLEN_DATA__ROOT"));
        let weight = row("data.datasets.bridge_dataset.weight");
        assert!(
            weight.contains("4.2") && weight.contains("mixtures/cross_x.toml"),
            "{weight}"
        );
        let hz = row("data.datasets.fractal20220817_data.hz");
        assert!(
            hz.contains("= 3") && hz.contains("datasets/fractal20220817_data.toml"),
            "{hz}"
        );
    }
}

#[test]
fn a_mixture_with_a_dataset_that_cannot_be_trained_on_says_why() {
    let set = "data.datasets.droid.refused=\"half of it is missing\"";
    let refused = pollen(&["plan", "oxe", "--set", set], Some("s3://bucket/oxe"));
    assert_eq!(refused.status.code(), Some(2));
    let error = String::from_utf8(refused.stderr).unwrap();
    let parts = [
        "droid cannot be trained on: half",
        "data.datasets.droid.weight to 0",
    ];
    assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    let without = [
        "plan",
        "oxe",
        "--set",
        set,
        "--set",
        "data.datasets.droid.weight=0",
    ];
    stdout(&pollen(&without, Some("s3://bucket/oxe")));
}
