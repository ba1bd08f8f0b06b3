//! The text that the model reads: the embodiment, then the instruction.

use pollen_core::ActionSpace;
use serde::{Deserialize, Serialize};

/// How an instruction becomes a prompt; one per dataset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "style", rename_all = "snake_case", deny_unknown_fields)]
pub enum Prompt {
    /// The instruction behind a description of the robot.
    Minimal {
        /// Number of arms.
        num_arms: u32,
        /// Name of the robot, for example `Franka Panda`.
        robot: String,
        /// Wording of the action space, for example `Delta End-Effector`.
        action_space: String,
    },
    /// The instruction alone.
    Instruction,
}

impl Prompt {
    /// Describes a robot in the wording of its action space.
    ///
    /// ```
    /// use pollen_processing::Prompt;
    /// let prompt = Prompt::Minimal {
    ///     num_arms: 1,
    ///     robot: "WidowX".into(),
    ///     action_space: "Delta End-Effector".into(),
    /// };
    /// assert_eq!(
    ///     prompt.text("open the drawer"),
    ///     "Agent Type: 1-arm WidowX, Action Space: Delta End-Effector,  \
    ///      Task Instruction: open the drawer"
    /// );
    /// ```
    pub fn minimal(space: &ActionSpace, robot: &str) -> Self {
        Self::Minimal {
            num_arms: space.num_arms,
            robot: robot.into(),
            action_space: space.prompt.clone(),
        }
    }

    /// Returns the prompt of an instruction. The two spaces before "Task" are the reference's.
    pub fn text(&self, instruction: &str) -> String {
        match self {
            Self::Minimal {
                num_arms,
                robot,
                action_space,
            } => one_line(&format!(
                "Agent Type: {num_arms}-arm {robot}, Action Space: {action_space},  \
                 Task Instruction: {instruction}"
            )),
            Self::Instruction => instruction.into(),
        }
    }
}

/// Trims the ends; if there are several lines, trims each and joins them with single spaces.
fn one_line(text: &str) -> String {
    let text = text.trim();
    text.lines().map(str::trim).collect::<Vec<&str>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn franka() -> Prompt {
        Prompt::Minimal {
            num_arms: 2,
            robot: "Franka Panda".into(),
            action_space: "joint position".into(),
        }
    }

    #[test]
    fn line_breaks_become_single_spaces() {
        let text = franka().text("  open it \n  then close it\t\n");
        assert_eq!(
            text,
            "Agent Type: 2-arm Franka Panda, Action Space: joint position,  \
             Task Instruction:   open it then close it"
        );
    }

    #[test]
    fn an_empty_instruction_leaves_the_prefix() {
        assert!(franka().text("").ends_with("Task Instruction:"));
        assert_eq!(Prompt::Instruction.text(" as it is "), " as it is ");
    }
}
