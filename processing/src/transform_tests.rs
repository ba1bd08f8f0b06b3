//! Every kind of operation against numbers worked by hand from its formula.

use super::*;

/// Reads the parts of an action as a dataset's file writes them.
fn parse(text: &str) -> Transform {
    toml::from_str(text).expect("parses")
}

/// Applies `action = [...]` to an episode.
#[track_caller]
fn action(parts: &str, action: &[&[f32]], state: &[&[f32]]) -> Vec<f32> {
    apply(&parse(&format!("action = [{parts}]")), action, state).action
}

#[track_caller]
fn apply(transform: &Transform, action: &[&[f32]], state: &[&[f32]]) -> Transformed {
    let stored = Stored {
        action: &action.concat(),
        action_width: action[0].len(),
        state: &state.concat(),
        state_width: state.first().map_or(0, |row| row.len()),
    };
    let widths = transform.widths(stored.action_width, stored.state_width);
    let transformed = transform.apply(stored).expect("transforms");
    let frames = action.len();
    let expected = widths.expect("fits");
    assert_eq!(transformed.action.len(), frames * expected.0);
    assert_eq!(transformed.state.len(), frames * expected.1);
    transformed
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32]) {
    let close = found
        .iter()
        .zip(expected)
        .all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(
        found.len() == expected.len() && close,
        "{found:?} in place of {expected:?}"
    );
}

#[test]
fn slices_and_constants_stand_side_by_side() {
    let rows: [&[f32]; 2] = [&[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0, 7.0, 8.0]];
    let state: [&[f32]; 2] = [&[10.0, 11.0], &[12.0, 13.0]];
    let parts = r#"{ from = "action", dims = [0, -2] }, { from = "constant", value = 0, width = 1 },
        { from = "state", dims = [1, 2] }, { from = "action", dims = [-1] }"#;
    let expected = [1.0, 2.0, 0.0, 11.0, 4.0, 5.0, 6.0, 0.0, 13.0, 8.0];
    assert_eq!(action(parts, &rows, &state), expected);
    assert_eq!(
        action(r#"{ from = "action" }"#, &rows, &state),
        rows.concat()
    );
}

#[test]
fn invert_clip_and_scale() {
    let rows: [&[f32]; 3] = [&[-1.0], &[0.25], &[1.0]];
    let op = |ops: &str| {
        action(
            &format!(r#"{{ from = "action", ops = [{ops}] }}"#),
            &rows,
            &[],
        )
    };
    assert_eq!(op(r#"{ kind = "invert" }"#), [2.0, 0.75, 0.0]);
    // LIBERO: -1 open, +1 close becomes 1 open, 0 closed: 1 - clip(x, 0, 1).
    let libero = r#"{ kind = "clip", low = 0, high = 1 }, { kind = "invert" }"#;
    assert_eq!(op(libero), [1.0, 0.75, 0.0]);
    // CALVIN: a share of the largest step, 0.02 m; or -1..1 to 0..1.
    assert_close(
        &op(r#"{ kind = "scale", factor = 0.02 }"#),
        &[-0.02, 0.005, 0.02],
    );
    let rescale = r#"{ kind = "scale", factor = 0.5, offset = 0.5 }"#;
    assert_close(&op(rescale), &[0.0, 0.625, 1.0]);
}

#[test]
fn binarize_scans_from_the_end() {
    let rows: [&[f32]; 7] = [&[1.0], &[0.5], &[0.0], &[0.5], &[0.99], &[0.3], &[0.4]];
    let parts = r#"{ from = "action", ops = [{ kind = "binarize", high = 0.95, low = 0.05 }] }"#;
    // In between: what is decided next; at the end the last raw value.
    let expected = [1.0, 0.0, 0.0, 1.0, 1.0, 0.4, 0.4];
    assert_eq!(action(parts, &rows, &[]), expected);
}

#[test]
fn relative_to_absolute_carries_the_last_command() {
    let parts = r#"{ from = "action", ops = [{ kind = "relative_to_absolute" }] }"#;
    let rows: [&[f32]; 6] = [&[0.05], &[1.0], &[0.0], &[-1.0], &[0.1], &[0.0]];
    assert_eq!(action(parts, &rows, &[]), [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
    let none: [&[f32]; 2] = [&[0.0], &[0.1]];
    assert_eq!(action(parts, &none, &[]), [1.0, 1.0], "none at all: open");
    let opens: [&[f32]; 2] = [&[0.0], &[-0.5]];
    assert_eq!(action(parts, &opens, &[]), [0.0, 1.0]);
}

/// Bridge: dims 0..5 are state[t + 1] - state[t], the last step is dropped, the gripper is the
/// original one.
#[test]
fn difference_relabels_and_drops_the_last_step() {
    let rows: [&[f32]; 3] = [&[9.0, 1.0], &[9.0, 0.0], &[9.0, 1.0]];
    let state: [&[f32]; 3] = [&[0.1, 3.0], &[0.3, -3.0], &[0.2, -2.5]];
    let transform = parse(
        r#"action = [
            { from = "state", ops = [{ kind = "difference", angles = [1] }] },
            { from = "action", dims = [-1] },
        ]"#,
    );
    assert_eq!(transform.tail(), 1);
    let found = apply(&transform, &rows, &state);
    // -3 - 3 = -6, wrapped by 2 pi; the third row repeats the second.
    let turn = std::f32::consts::TAU - 6.0;
    assert_close(
        &found.action,
        &[0.2, turn, 1.0, -0.1, 0.5, 0.0, -0.1, 0.5, 0.0],
    );
    assert_eq!(found.state, state.concat(), "as stored");
    let steps: Vec<bool> = (0..3).map(|frame| transform.is_step(frame, 3)).collect();
    assert_eq!(steps, [true, true, false]);
    assert_eq!(
        [0, 1, 2].map(|frame| transform.steps_left(frame, 3)),
        [2, 1, 0]
    );
}

/// robo_set: the stored action is a joint delta, the target is action + state.
#[test]
fn plus_and_minus_state_undo_each_other() {
    let rows: [&[f32]; 2] = [&[0.5, -0.5, 7.0], &[0.25, 3.0, 7.0]];
    let state: [&[f32]; 2] = [&[0.0, 1.0, 2.0], &[0.0, 2.0, 1.0]];
    let absolute = action(
        r#"{ from = "action", dims = [0, 2], ops = [{ kind = "plus_state", dims = [1] }] }"#,
        &rows,
        &state,
    );
    assert_eq!(absolute, [1.5, 1.5, 2.25, 4.0]);
    let rows: Vec<&[f32]> = absolute.chunks(2).collect();
    let back = action(
        r#"{ from = "action", ops = [{ kind = "minus_state", dims = [1, 3], angles = [1] }] }"#,
        &rows,
        &state,
    );
    assert_eq!(back, [0.5, -0.5, 0.25, 3.0]);
}

/// berkeley_rpt: every third step; the action is the next step's joint position.
#[test]
fn next_and_every() {
    let rows: Vec<Vec<f32>> = (0..8).map(|t| vec![t as f32]).collect();
    let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
    let transform = parse(
        r#"every = 3
        action = [{ from = "state", ops = [{ kind = "next", frames = 3 }] }]"#,
    );
    let found = apply(&transform, &rows, &rows);
    let steps: Vec<u64> = (0..8)
        .filter(|&frame| transform.is_step(frame, 8))
        .collect();
    assert_eq!(steps, [0, 3]);
    assert_eq!((found.action[0], found.action[3]), (3.0, 6.0));
    assert_eq!(found.action[4..], [6.0; 4], "padded by the last step");
    assert_eq!(
        (transform.steps_left(0, 8), transform.steps_left(3, 8)),
        (2, 1)
    );
    assert!(!transform.is_step(0, 3), "an episode shorter than the step");
    apply(&transform, &rows[..3], &rows[..3]);
}

/// furniture_bench: three numbers, then the Euler angles of a quaternion x, y, z, w.
#[test]
fn rotate_changes_the_width() {
    let half = std::f32::consts::FRAC_1_SQRT_2;
    let rows: [&[f32]; 2] = [&[1.0, half, 0.0, 0.0, half], &[2.0, 0.0, 0.0, 0.0, 1.0]];
    let parts = r#"{ from = "action", dims = [0, 1] }, { from = "action", dims = [1], ops = [
        { kind = "rotate", from = "quaternion_xyzw", to = "euler" }] }"#;
    let quarter = std::f32::consts::FRAC_PI_2;
    let expected = [1.0, quarter, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0];
    assert_close(&action(parts, &rows, &[]), &expected);
    let transform = parse(&format!("action = [{parts}]"));
    let stored = Stored {
        action: &[0.0; 5],
        action_width: 5,
        state: &[],
        state_width: 0,
    };
    let error = transform.apply(stored).expect_err("no rotation");
    assert!(error.starts_with("frame 0 of its episode"), "{error}");
}

#[test]
fn faults_name_the_part() {
    let transform = parse(
        r#"every = 0
        action = [
            { from = "action", dims = [3, 9] },
            { from = "state", dims = [-3] },
            { from = "action", ops = [{ kind = "rotate", from = "rot6d", to = "euler" }] },
            { from = "action", dims = [0, 2], ops = [{ kind = "plus_state", dims = [0, 1] }] },
            { from = "action", ops = [{ kind = "clip", low = 1, high = 0 }] },
            { from = "action", ops = [{ kind = "difference", angles = [7] }] },
            { from = "action", ops = [{ kind = "next", frames = 0 }] },
            { from = "constant", value = nan, width = 1 },
        ]"#,
    );
    let faults = transform.widths(7, 2).expect_err("faults");
    assert_eq!(faults.len(), 9, "{faults:?}");
    for (i, part) in [
        "[0]: of the action",
        "[1]: of the state",
        "Rot6d takes 6",
        "do not fit 2",
        "exceeds",
        "dimension 7",
        "itself",
        "not a number",
    ]
    .iter()
    .enumerate()
    {
        assert!(faults[i + 1].contains(part), "{faults:?}");
    }
    assert!(toml::from_str::<Transform>(r#"action = [{ from = "actoin" }]"#).is_err());
    assert!(toml::from_str::<Transform>(r#"action = [{ from = "action", dim = [1] }]"#).is_err());
}

#[test]
fn nothing_chosen_changes_nothing() {
    let rows: [&[f32]; 2] = [&[1.0, 2.0], &[3.0, f32::NAN]];
    let identity = Transform::default();
    assert!(identity.is_identity());
    assert_eq!(serde_json::to_string(&identity).expect("JSON"), "{}");
    let found = apply(&identity, &rows, &[]);
    assert_eq!(found.action[..3], [1.0, 2.0, 3.0]);
    assert!(found.action[3].is_nan(), "reported where it is used");
}
