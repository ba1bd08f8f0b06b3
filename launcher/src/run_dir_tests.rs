#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use super::*;

fn request<'a>(root: &'a Path, identity: &'a str, second: u64) -> RunRequest<'a> {
    RunRequest {
        root,
        recipe: "demo",
        identity,
        steps: 100,
        now: SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_323_045 + second),
    }
}

#[test]
fn the_same_command_goes_on_with_the_same_run() {
    let root = tempfile::tempdir().unwrap();
    let first = RunDir::find_or_create(&request(root.path(), "a1b2c3d4e5f6", 0)).unwrap();
    assert_eq!(first.id(), "20260102-030405-a1b2c3d4");
    assert!(first.is_new());
    assert!(first.path().join("logs").is_dir());
    let again = RunDir::find_or_create(&request(root.path(), "a1b2c3d4e5f6", 9)).unwrap();
    assert_eq!(again.id(), first.id());
    assert!(!again.is_new());
    let other = RunDir::find_or_create(&request(root.path(), "ffffffff0000", 9)).unwrap();
    assert_ne!(other.id(), first.id());
}

#[test]
fn a_finished_run_is_left_alone_until_more_steps_are_wanted() {
    let root = tempfile::tempdir().unwrap();
    let wanted = request(root.path(), "aaaaaaaa", 0);
    let mut run = RunDir::find_or_create(&wanted).unwrap();
    let lock = run.lock().unwrap();
    run.next_generation(&lock).unwrap();
    run.finish(100, &lock).unwrap();
    drop(lock);

    let more = RunRequest {
        steps: 200,
        ..wanted
    };
    let continued = RunDir::find_or_create(&more).unwrap();
    assert_eq!(continued.id(), run.id());
    let fresh = RunDir::find_or_create(&wanted).unwrap();
    assert_ne!(fresh.id(), run.id());
    assert!(fresh.is_new());
}

#[test]
fn the_newest_of_several_unfinished_runs_is_taken() {
    let root = tempfile::tempdir().unwrap();
    let mut ids = Vec::new();
    for second in [0, 0, 5] {
        let wanted = request(root.path(), "aaaaaaaa", second);
        let mut run = RunDir::find_or_create(&wanted).unwrap();
        let lock = run.lock().unwrap();
        run.finish(100, &lock).unwrap();
        ids.push(run.id().to_owned());
    }
    // Two runs of the same second have different folders.
    assert_eq!(ids[1], format!("{}-2", ids[0]));
    let more = RunRequest {
        steps: 101,
        ..request(root.path(), "aaaaaaaa", 9)
    };
    assert_eq!(RunDir::find_or_create(&more).unwrap().id(), ids[2]);
}

#[test]
fn generations_are_counted_on_disk_by_whoever_holds_the_lock() {
    let root = tempfile::tempdir().unwrap();
    let wanted = request(root.path(), "aaaaaaaa", 0);
    let mut first = RunDir::find_or_create(&wanted).unwrap();
    let mut second = RunDir::find_or_create(&wanted).unwrap();
    let lock = first.lock().unwrap();
    assert_eq!(first.next_generation(&lock).unwrap(), 1);
    assert_eq!(first.next_generation(&lock).unwrap(), 2);
    assert!(second.lock().is_err());
    drop(lock);
    // The second one read run.json before the first counted.
    let lock = second.lock().unwrap();
    assert_eq!(second.next_generation(&lock).unwrap(), 3);
    assert_eq!(RunDir::open(second.path()).unwrap().record().generation, 3);
}

#[test]
fn a_damaged_record_is_named_and_foreign_folders_are_not_ours() {
    let root = tempfile::tempdir().unwrap();
    let wanted = request(root.path(), "aaaaaaaa", 0);
    let run = RunDir::find_or_create(&wanted).unwrap();
    fs::create_dir(root.path().join("demo/notes")).unwrap();
    assert_eq!(RunDir::list(root.path(), "demo").unwrap().len(), 1);
    fs::write(run.path().join("run.json"), "{").unwrap();
    let error = RunDir::find_or_create(&wanted).unwrap_err().to_string();
    assert!(error.contains("run.json is damaged"), "{error}");
    assert!(error.contains("move"), "{error}");
}
