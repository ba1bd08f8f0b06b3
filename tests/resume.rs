//! One worker on a folder: killed, stopped or extended, the run ends with the bits of an undisturbed
//! one. `faults` kills two workers at every place.

#![allow(clippy::unwrap_used, reason = "tests")]

mod lab;

use lab::{Lab, is_alive, wait_for, wait_for_mark};

const STEPS: u64 = 8;

/// Asserts 0 < restored < killed < last.
#[track_caller]
fn assert_resumed(restores: &[u64], killed: u64) {
    let &[restored] = restores else {
        panic!("one restore, not {restores:?}")
    };
    assert!(
        0 < restored && restored < killed && killed < STEPS,
        "{restored} {killed}"
    );
}

/// A frozen encoder has weights in the checkpoint and no optimizer state, and the ablations have
/// other tensors than the published model. All of it in bf16, with masters of f32.
#[test]
fn a_run_with_the_switches_of_the_ablations_resumes() {
    let lab = Lab::folder();
    let switches = [
        "train.precision=bf16",
        "model.frozen=[\"vlm.\"]",
        "model.flow.modulation=adaln_zero",
        "model.flow.layers=2",
        "model.proprioception=false",
        "model.num_cameras=1",
        "data.cameras=[\"primary\"]",
        "data.augment={ kind = \"random_shift\", pads = { primary = 4 } }",
    ];
    let calm = lab.launch("calm", 1).set(&switches).run().expect(0);
    let killed = lab
        .launch("killed", 1)
        .set(&switches)
        .fault("kill@generation=1,step=5,place=backward")
        .run()
        .expect(0);
    assert_resumed(&killed.restores(), 5);
    assert_eq!(killed.losses(), calm.losses());
    assert_eq!(
        killed.state_hashes(&lab, STEPS),
        calm.state_hashes(&lab, STEPS)
    );
}

#[test]
fn averaged_weights_are_saved_restored_and_evaluated() {
    let lab = Lab::folder();
    let plain = lab.launch("plain", 1).run().expect(0);
    let ema = &["train.ema={}"];
    let calm = lab.launch("calm", 1).set(ema).run().expect(0);
    let want = calm.state_hashes(&lab, STEPS);
    let fault = "kill@generation=1,step=5,place=optimizer";
    let killed = lab
        .launch("killed", 1)
        .set(ema)
        .fault(fault)
        .run()
        .expect(0);
    assert_resumed(&killed.restores(), 5);
    assert_eq!(killed.state_hashes(&lab, STEPS), want);
    assert_eq!(killed.evaluation(), calm.evaluation());

    let without = plain.state_hashes(&lab, STEPS);
    let same = |name: &String| want.get(name) == without.get(name);
    let names: Vec<&String> = want.keys().filter(|name| !same(name)).collect();
    assert_eq!(
        names,
        ["ema-00001-of-00001.safetensors"],
        "averaging changes no weight"
    );
    let model = &want["model-00001-of-00001.safetensors"];
    assert_ne!(&want["ema-00001-of-00001.safetensors"], model);
    assert_ne!(calm.evaluation(), plain.evaluation());
}

#[test]
fn activations_that_are_computed_again_train_the_same_weights() {
    let lab = Lab::folder();
    let kept = lab.launch("kept", 1).run().expect(0);
    let again = lab
        .launch("again", 1)
        .set(&[r#"model.recompute=["vision", "language", "flow"]"#])
        .run()
        .expect(0);
    assert_eq!(again.losses(), kept.losses());
    assert_eq!(
        again.state_hashes(&lab, STEPS),
        kept.state_hashes(&lab, STEPS)
    );
}

#[test]
fn a_killed_launcher_takes_its_worker_along_and_the_same_command_goes_on() {
    let lab = Lab::folder();
    let want = lab
        .launch("calm", 1)
        .run()
        .expect(0)
        .state_hashes(&lab, STEPS);
    let mark = lab.path("mark");
    let fault = format!(
        "freeze@generation=1,step=5,place=forward,mark={}",
        mark.display()
    );
    let running = lab.launch("killed", 1).fault(&fault).spawn();
    let worker = wait_for_mark(&mark);
    running.signal("KILL");
    drop(running);
    wait_for("the worker to die with its launcher", || {
        (!is_alive(worker)).then_some(())
    });
    let first = lab::run_dir(&lab.path("runs-killed/demo"));
    let resumed = lab.launch("killed", 1).run().expect(0);
    assert_eq!(resumed.run_dir(), first, "the same run goes on");
    assert_resumed(&resumed.restores(), 5);
    assert_eq!(resumed.state_hashes(&lab, STEPS), want);
}

#[test]
fn a_complete_run_says_so_and_goes_on_when_the_steps_are_raised() {
    let lab = Lab::folder();
    let want = lab
        .launch("calm", 1)
        .run()
        .expect(0)
        .state_hashes(&lab, STEPS);
    let first = lab
        .launch("raised", 1)
        .set(&["train.steps=4"])
        .run()
        .expect(0);
    let again = lab
        .launch("raised", 1)
        .set(&["train.steps=4"])
        .run()
        .expect(0);
    assert!(again.stdout.contains("is complete"), "{}", again.stdout);
    assert_eq!(
        again.events().len(),
        first.events().len(),
        "nothing was started"
    );
    let raised = lab.launch("raised", 1).run().expect(0);
    assert_eq!(raised.run_id(), first.run_id());
    assert_eq!(raised.restores(), [4]);
    assert_eq!(raised.state_hashes(&lab, STEPS), want);
}

#[test]
fn an_interrupt_saves_and_leaves_no_process() {
    let lab = Lab::folder();
    let mark = lab.path("mark");
    let fault = format!(
        "mark@generation=1,step=5,place=forward,mark={}",
        mark.display()
    );
    let running = lab
        .launch("stopped", 1)
        .set(&["train.steps=100000"])
        .fault(&fault)
        .spawn();
    let worker = wait_for_mark(&mark);
    running.signal("INT");
    let stopped = running.wait().expect(130);
    assert!(!is_alive(worker));
    let saved = stopped.losses().keys().copied().max().unwrap();
    let steps = saved + 2;
    let resumed = lab
        .launch("stopped", 1)
        .set(&[&format!("train.steps={steps}")])
        .run()
        .expect(0);
    assert_eq!(
        resumed.restores(),
        [saved],
        "the interrupted step was saved"
    );
}
