//! What a user gets wrong is said in one line that names the fix, with exit code 2.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use lab::{Finished, Lab};

/// One line on standard error that holds all `parts`.
#[track_caller]
fn assert_one_line(run: &Finished, parts: &[&str]) {
    let lines: Vec<&str> = run.stderr.lines().collect();
    let [line] = lines.as_slice() else {
        panic!("one line, not {lines:?}")
    };
    for part in parts {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_known_one() {
    let lab = Lab::folder();
    let run = lab
        .launch("typo", 1)
        .set(&["train.stepz=3"])
        .run()
        .expect(2);
    assert_one_line(&run, &["train.stepz", "did you mean `steps`?"]);
}

#[test]
fn a_missing_bucket_is_named_with_its_endpoint() {
    let lab = Lab::s3();
    let endpoint = lab.server().endpoint();
    let set = ["data.root=s3://no-such-bucket/datasets"];
    let run = lab.launch("bucket", 1).set(&set).run().expect(2);
    assert_one_line(&run, &["no-such-bucket", &endpoint]);
}

#[test]
fn a_world_size_that_does_not_fit_is_refused_with_those_that_do() {
    let lab = Lab::folder();
    let run = lab.launch("world", 3).run().expect(2);
    assert_one_line(&run, &["1, 2, 4"]);
}

#[test]
fn wrong_credentials_are_named() {
    let lab = Lab::s3();
    let run = lab
        .launch("keys", 1)
        .env("AWS_SECRET_ACCESS_KEY", "wrong")
        .run()
        .expect(2);
    assert_one_line(&run, &["AWS_SECRET_ACCESS_KEY"]);
}

#[test]
fn a_gpu_that_is_not_there_is_refused_and_the_cpu_offered() {
    let lab = Lab::folder();
    let run = lab
        .launch("gpu", 1)
        .set(&["train.device=cuda"])
        .env("CUDA_VISIBLE_DEVICES", "")
        .run()
        .expect(2);
    assert_one_line(&run, &["train.device", "no GPU", "train.device=cpu"]);
}
