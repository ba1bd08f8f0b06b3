//! Conventions of raw actions: what converters do to grippers and absolute poses.
//!
//! Inside Pollen a gripper is 1 = open, 0 = closed.

/// Returns 1 - x: changes between 1 = open and 1 = closed.
pub fn invert(commands: &[f32]) -> Vec<f32> {
    commands.iter().map(|x| 1.0 - x).collect()
}

/// Makes a continuous opening binary: above `high` 1, below `low` 0, in between the value that is
/// reached next. In-between values at the end take the last raw value.
pub fn binarize(openings: &[f32], high: f32, low: f32) -> Vec<f32> {
    let mut carried = openings.last().copied().unwrap_or_default();
    let mut out = openings.to_vec();
    for value in out.iter_mut().rev() {
        if *value > high {
            carried = 1.0;
        } else if *value < low {
            carried = 0.0;
        }
        *value = carried;
    }
    out
}

/// Turns "close now" (+1), "open now" (-1) and "as it is" (at most 0.1 either way) into an opening.
/// Before the first command the gripper is in the state that the command ends; open if none comes.
pub fn relative_to_absolute(commands: &[f32]) -> Vec<f32> {
    const THRESHOLD: f32 = 0.1;
    let decided = |x: f32| (x.abs() > THRESHOLD).then_some(if x > 0.0 { 0.0 } else { 1.0 });
    let first = commands.iter().copied().find_map(decided);
    let mut state = first.map_or(1.0, |first| 1.0 - first);
    commands
        .iter()
        .map(|&command| {
            state = decided(command).unwrap_or(state);
            state
        })
        .collect()
}

/// Turns an absolute pose into CALVIN's relative action: differences of position (metres) and of
/// Euler angles (radians, wrapped), clipped to the largest step and divided by it.
pub fn relative_pose(target: [f64; 6], current: [f64; 6], max_step: [f64; 2]) -> [f64; 6] {
    use std::f64::consts::{PI, TAU};
    std::array::from_fn(|i| {
        let difference = target[i] - current[i];
        let (difference, step) = if i < 3 {
            (difference, max_step[0])
        } else {
            ((difference + PI).rem_euclid(TAU) - PI, max_step[1])
        };
        difference.clamp(-step, step) / step
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_nothing_out() {
        assert!(binarize(&[], 0.95, 0.05).is_empty());
        assert!(relative_to_absolute(&[]).is_empty());
    }

    #[test]
    fn inverting_twice_changes_nothing() {
        let openings = [0.0, 0.25, 1.0];
        assert_eq!(invert(&invert(&openings)), openings);
    }
}
