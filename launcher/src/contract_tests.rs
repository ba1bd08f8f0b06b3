#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;

use super::*;

fn detect(variables: &[(&str, &str)], flags: &WorkerFlags) -> Result<WorkerEnv, Error> {
    let map: HashMap<&str, &str> = variables.iter().copied().collect();
    WorkerEnv::detect(|name| map.get(name).map(|text| (*text).to_owned()), flags)
}

fn plain(variables: &[(&str, &str)]) -> WorkerEnv {
    detect(variables, &WorkerFlags::default()).unwrap()
}

fn refusal(variables: &[(&str, &str)]) -> String {
    detect(variables, &WorkerFlags::default())
        .unwrap_err()
        .to_string()
}

const TORCHRUN: [(&str, &str); 8] = [
    ("RANK", "5"),
    ("LOCAL_RANK", "1"),
    ("WORLD_SIZE", "8"),
    ("LOCAL_WORLD_SIZE", "4"),
    ("GROUP_RANK", "1"),
    ("MASTER_ADDR", "10.0.0.1"),
    ("MASTER_PORT", "29500"),
    ("TORCHELASTIC_RESTART_COUNT", "2"),
];

const SLURM: [(&str, &str); 8] = [
    ("SLURM_PROCID", "3"),
    ("SLURM_LOCALID", "0"),
    ("SLURM_NTASKS", "4"),
    ("SLURM_STEP_NUM_TASKS", "4"),
    ("SLURM_NODEID", "1"),
    ("SLURM_STEP_TASKS_PER_NODE", "3,1"),
    ("SLURM_STEP_NODELIST", "n[07-08]"),
    ("SLURM_JOB_ID", "123456"),
];

#[test]
fn what_goes_out_comes_back_in() {
    let worker = WorkerEnv {
        rank: 3,
        local_rank: 1,
        world_size: 4,
        local_world_size: 2,
        node_rank: 1,
        master_addr: "n1".into(),
        master_port: 29500,
        generation: 7,
        source: "RANK (torchrun's variables)".into(),
    };
    let variables = worker.to_env();
    let back = WorkerEnv::detect(
        |name| {
            let found = variables.iter().find(|(key, _)| key == name);
            found.map(|(_, value)| value.clone())
        },
        &WorkerFlags::default(),
    );
    assert_eq!(back.unwrap(), worker);
}

#[test]
fn torchrun_is_understood() {
    let worker = plain(&TORCHRUN);
    assert_eq!(
        (worker.rank, worker.local_rank, worker.world_size),
        (5, 1, 8)
    );
    assert_eq!((worker.local_world_size, worker.node_rank), (4, 1));
    assert_eq!(
        (worker.master_addr.as_str(), worker.master_port),
        ("10.0.0.1", 29500)
    );
    assert_eq!(worker.generation, 3);
    assert!(worker.describe().contains("RANK (torchrun's variables)"));
}

#[test]
fn slurm_is_understood_without_any_of_our_variables() {
    let worker = plain(&SLURM);
    assert_eq!(
        (worker.rank, worker.local_rank, worker.world_size),
        (3, 0, 4)
    );
    assert_eq!((worker.local_world_size, worker.node_rank), (1, 1));
    assert_eq!(
        (worker.master_addr.as_str(), worker.master_port),
        ("n07", 23456)
    );
    assert!(worker.source.contains("SLURM_PROCID"));
}

#[test]
fn our_variables_beat_slurm_and_open_mpi_beats_slurm() {
    let mut both = SLURM.to_vec();
    both.extend(TORCHRUN);
    assert_eq!(plain(&both).rank, 5);

    let mut mpi = SLURM.to_vec();
    mpi.extend([
        ("OMPI_COMM_WORLD_RANK", "1"),
        ("OMPI_COMM_WORLD_SIZE", "2"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ("MASTER_ADDR", "n1"),
        ("MASTER_PORT", "1234"),
    ]);
    let worker = plain(&mpi);
    assert_eq!(
        (worker.rank, worker.world_size, worker.node_rank),
        (1, 2, 0)
    );
}

#[test]
fn pmix_gives_a_rank_only_and_the_rest_is_asked_for() {
    assert!(refusal(&[("PMIX_RANK", "1")]).contains("WORLD_SIZE"));
    let worker = plain(&[
        ("PMIX_RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "n1"),
        ("MASTER_PORT", "1234"),
    ]);
    assert_eq!((worker.rank, worker.world_size), (1, 2));
}

#[test]
fn a_job_index_counts_pods() {
    let pod = [
        ("JOB_COMPLETION_INDEX", "2"),
        ("WORLD_SIZE", "8"),
        ("MASTER_ADDR", "run-0-0.run"),
        ("MASTER_PORT", "29500"),
    ];
    let worker = plain(&pod);
    assert_eq!(
        (worker.rank, worker.local_world_size, worker.node_rank),
        (2, 1, 2)
    );
    let mut two = pod.to_vec();
    two.extend([("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")]);
    let worker = plain(&two);
    assert_eq!((worker.rank, worker.node_rank), (5, 2));
}

#[test]
fn flags_beat_the_environment_value_by_value() {
    let flags = WorkerFlags {
        rank: Some(6),
        master_port: Some(1),
        generation: Some(9),
        ..WorkerFlags::default()
    };
    let worker = detect(&TORCHRUN, &flags).unwrap();
    assert_eq!(
        (worker.rank, worker.world_size, worker.master_port),
        (6, 8, 1)
    );
    assert_eq!(worker.generation, 9);
    assert_eq!(worker.source, "--rank, which beats RANK");
}

#[test]
fn nothing_at_all_is_a_run_of_one() {
    let worker = plain(&[("PATH", "/bin")]);
    assert_eq!(
        (worker.rank, worker.world_size, worker.generation),
        (0, 1, 1)
    );
    // An empty variable is as good as none.
    assert_eq!(plain(&[("RANK", "")]), worker);
    let flags = WorkerFlags {
        world_size: Some(2),
        ..WorkerFlags::default()
    };
    assert!(
        detect(&[], &flags)
            .unwrap_err()
            .to_string()
            .contains("--rank")
    );
}

#[test]
fn what_is_missing_or_contradicts_is_named() {
    assert!(refusal(&[("RANK", "0")]).contains("WORLD_SIZE"));
    assert!(refusal(&[("RANK", "0"), ("WORLD_SIZE", "2")]).contains("LOCAL_RANK"));
    let mut addressless: Vec<_> = TORCHRUN.to_vec();
    addressless.retain(|(name, _)| *name != "MASTER_ADDR");
    assert!(refusal(&addressless).contains("MASTER_ADDR"));
    let mut outside = TORCHRUN.to_vec();
    outside[0] = ("RANK", "8");
    assert!(refusal(&outside).contains("rank 8 is outside world size 8"));
    outside[0] = ("RANK", "-1");
    assert!(refusal(&outside).contains("RANK is `-1`"));
}
