//! Recordings made here, whose answers are known.

use pollen_core::Seed;

use super::*;
use crate::columns::Rows;

const FPS: f64 = 10.0;
const FRAMES: usize = 120;

/// What is done to a plain recording: deltas, 1 = open, an instruction, no copy.
#[derive(Clone, Copy, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
struct Twist {
    absolute: bool,
    velocity: bool,
    noise_only: bool,
    inverted: bool,
    mirrored_finger: bool,
    signed: bool,
    relative: bool,
    still: bool,
    copies: bool,
}

fn dims(names: &[&str]) -> Vec<Dimension> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    Dimension::stored(Some(names), 3)
}

/// Two arm dimensions and a gripper. The state is (x, y, finger); the finger follows by two frames.
fn recording(twist: Twist) -> Columns {
    let mut columns = Columns {
        action: Rows {
            width: 3,
            ..Rows::default()
        },
        state: Rows {
            width: 3,
            ..Rows::default()
        },
        ..Columns::default()
    };
    for episode in 0..4_u64 {
        let seed = if twist.copies { episode % 2 } else { episode };
        let mut draws = Seed::new(5).index(seed).draws();
        let mut step = || draws.uniform_f32() - 0.5;
        let changes: Vec<[f32; 2]> = (0..=FRAMES).map(|_| [step(), step()]).collect();
        let open = |frame: usize| (frame + 7 * seed as usize) % 40 < 25;
        let (mut x, mut y) = (3.0, -1.0);
        for (frame, &[dx, dy]) in changes.iter().take(FRAMES).enumerate() {
            let (dx, dy) = if twist.still && frame >= FRAMES / 2 {
                (0.0, 0.0)
            } else {
                (dx, dy)
            };
            let opening = if open(frame.saturating_sub(2)) {
                0.04
            } else {
                0.001
            };
            let finger = if twist.mirrored_finger {
                -opening
            } else {
                opening
            };
            columns.state.values.extend([x, y, finger]);
            let mut arm = [dx, dy];
            if twist.absolute {
                arm = [x + dx, y + dy];
            } else if twist.velocity {
                arm = arm.map(|change| change * FPS as f32);
            } else if twist.noise_only {
                arm = changes[(frame + 60) % FRAMES];
            }
            let mut command = f32::from(u8::from(open(frame) != twist.inverted));
            if twist.relative {
                let before = open(frame.saturating_sub(1));
                command = f32::from(u8::from(before)) - f32::from(u8::from(open(frame)));
            } else if twist.signed {
                command = 2.0 * command - 1.0;
            }
            columns.action.values.extend([arm[0], arm[1], command]);
            columns.episode.push(episode);
            columns.frame.push(frame as u64);
            columns.task.push(episode % 2);
            (x, y) = (x + dx, y + dy);
        }
    }
    columns
}

fn verdict_with(twist: Twist, tasks: [&str; 2], finger: &str) -> Verdict {
    let (actions, states) = (dims(&["a", "b", "gripper"]), dims(&["x", "y", finger]));
    let tasks = tasks.map(str::to_owned);
    let mut check = DatasetCheck::new(&actions, &states, FPS, &tasks);
    let columns = recording(twist);
    check.push(&columns);
    check.finish()
}

fn verdict(twist: Twist) -> Verdict {
    verdict_with(twist, ["lift", "drop"], "finger_left")
}

fn finding<'a>(verdict: &'a Verdict, check: &str) -> &'a Finding {
    let found = verdict.findings.iter().find(|f| f.check == check);
    found.expect("every check says something")
}

#[test]
fn a_plain_recording_is_found_in_order() {
    let plain = verdict(Twist::default());
    assert_eq!(plain.motion, Some(Motion::Delta));
    assert_eq!(plain.followed_by, [Some(0), Some(1), None]);
    assert_eq!(
        plain.grippers,
        [GripperVerdict {
            dim: 2,
            inverted: Some(false),
            signed: false,
            relative: false
        }]
    );
    assert_eq!((plain.labelled, plain.copies.len()), (1.0, 0));
    assert!(plain.findings.iter().all(|f| f.fix.is_empty()), "{plain:?}");
    let polarity = &finding(&plain, "gripper_polarity").evidence;
    assert!(polarity.contains("0.20 s later: 1 is open"), "{polarity}");
}

#[test]
fn actions_are_told_apart_by_the_states_after_them() {
    let of = |twist| verdict(twist).motion;
    let absolute = Twist {
        absolute: true,
        ..Twist::default()
    };
    let velocity = Twist {
        velocity: true,
        ..Twist::default()
    };
    let noise = Twist {
        noise_only: true,
        ..Twist::default()
    };
    assert_eq!(of(absolute), Some(Motion::Absolute));
    assert_eq!(of(velocity), Some(Motion::Velocity));
    assert_eq!(of(noise), None);
    let found = verdict(noise);
    assert!(finding(&found, "motion").fix.contains("set motion"));
    let evidence = finding(&verdict(absolute), "motion").evidence.clone();
    assert!(evidence.starts_with("absolute by 2 of 2"), "{evidence}");
}

#[test]
fn a_gripper_that_closes_at_1_is_found() {
    for (mirrored_finger, signed) in [(false, false), (true, false), (false, true)] {
        let twist = Twist {
            inverted: true,
            mirrored_finger,
            signed,
            ..Twist::default()
        };
        let found = verdict(twist);
        assert_eq!(found.grippers[0].inverted, Some(true), "{found:?}");
        assert_eq!(found.grippers[0].signed, signed);
        let finding = finding(&found, "gripper_polarity");
        assert!(finding.evidence.contains("1 is closed"), "{finding:?}");
        assert!(finding.fix.contains("invert"), "{finding:?}");
        let upright = Twist {
            inverted: false,
            ..twist
        };
        assert_eq!(verdict(upright).grippers[0].inverted, Some(false));
    }
    let relative = Twist {
        relative: true,
        ..Twist::default()
    };
    assert!(verdict(relative).grippers[0].relative);
}

#[test]
fn grippers_without_a_name_stand_last() {
    let unnamed = Dimension::stored(None, 3);
    let tasks = ["lift".to_owned(), "drop".to_owned()];
    let mut check = DatasetCheck::new(&unnamed, &unnamed, FPS, &tasks);
    let inverted = Twist {
        inverted: true,
        ..Twist::default()
    };
    check.push(&recording(inverted));
    let found = check.finish();
    assert_eq!(
        (found.grippers[0].dim, found.grippers[0].inverted),
        (2, Some(true))
    );
    // Without a state nobody can tell.
    let mut check = DatasetCheck::new(&unnamed, &[], FPS, &tasks);
    let mut blind = recording(inverted);
    blind.state = Rows::default();
    check.push(&blind);
    let found = check.finish();
    assert_eq!((found.motion, found.grippers[0].inverted), (None, None));
    assert!(
        finding(&found, "gripper_polarity")
            .fix
            .contains("unverified")
    );
}

#[test]
fn copies_missing_words_and_rest_are_counted() {
    let twist = Twist {
        copies: true,
        still: true,
        ..Twist::default()
    };
    let found = verdict_with(twist, ["lift", " "], "finger_left");
    assert_eq!(found.copies, [(0, 2), (1, 3)]);
    let copies = &finding(&found, "duplicates").evidence;
    assert!(copies.contains("episode 2 is episode 0 again"), "{copies}");
    assert_eq!(found.labelled, 0.5);
    assert!(
        finding(&found, "language")
            .fix
            .contains("filters.unlabelled")
    );
    assert!((0.4..0.5).contains(&found.idle), "{}", found.idle);
    assert!(
        finding(&found, "idle")
            .fix
            .contains("filters.idle_below = 0.001")
    );
    let wordless = verdict_with(Twist::default(), ["", ""], "finger_left");
    assert_eq!(wordless.labelled, 0.0);
    let fix = &finding(&wordless, "language").fix;
    assert!(fix.contains("instruction = \"empty\""), "{fix}");
}
