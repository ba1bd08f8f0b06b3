"""Renders the demonstrations that the PyPI package robosuite 1.4.0 ships: states -> .npz files.

    pip install -r requirements-render.txt       # needs EGL, for example Mesa's software renderer
    python render.py RENDERED_DIR

Each recorded simulator state is set, not simulated, so the images belong to the very states that
the human operator reached. write_dataset.py turns the result into the demo datasets.
"""

import os

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])

import argparse
import io
import time
from pathlib import Path

import h5py
import numpy as np
import robosuite
from PIL import Image

STRIDE = 2  # every second state: 10 Hz of 20 Hz
SIDE = 96
JPEG = {"quality": 85, "subsampling": "4:2:0"}
DEMONSTRATIONS = Path(robosuite.__file__).parent / "models/assets/demonstrations"

TASKS = {
    "lift": {
        "file": DEMONSTRATIONS / "lift/demo.hdf5",
        "environment": {"env_name": "Lift", "robots": "Panda"},
        "stored_model": True,
        "cameras": ["agentview", "robot0_eye_in_hand"],
    },
    # The model stored with these demonstrations is of an older release and does not load; the
    # states do not depend on it.
    "twoarmhandover": {
        "file": DEMONSTRATIONS / "handover/panda_panda/demo.hdf5",
        "environment": {"env_name": "TwoArmHandover", "robots": ["Panda", "Panda"],
                        "env_configuration": "single-arm-opposed"},
        "stored_model": False,
        "cameras": ["agentview", "robot0_eye_in_hand", "robot1_eye_in_hand"],
    },
}


def make_environment(task):
    np.random.seed(0)  # the hammer's size is drawn when the two-arm scene is built
    environment = robosuite.make(
        **task["environment"], has_renderer=False, has_offscreen_renderer=True,
        use_camera_obs=False, control_freq=20, ignore_done=True)
    environment.reset()
    return environment


def proprioception(environment):
    """Per arm: position of the grip site 3, rotation matrix of the hand 9, fingers 2, joints 7.

    Metres and radians; position and rotation in the world frame.
    """
    data, parts = environment.sim.data, []
    for robot in environment.robots:
        parts += [data.site_xpos[robot.eef_site_id],
                  data.get_body_xmat(robot.robot_model.eef_name).ravel(),
                  data.qpos[robot._ref_gripper_joint_pos_indexes],
                  data.qpos[robot._ref_joint_pos_indexes]]
    return np.concatenate(parts)


def jpeg(environment, camera):
    """One frame as a JPEG file, upright."""
    pixels = environment.sim.render(width=SIDE, height=SIDE, camera_name=camera)[::-1]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", **JPEG)
    return buffer.getvalue()


def render(environment, states, cameras):
    """Proprioception and JPEG files of the given states."""
    proprio, frames = [], {camera: [] for camera in cameras}
    for state in states:
        environment.sim.set_state_from_flattened(state)
        environment.sim.forward()
        proprio.append(proprioception(environment))
        for camera in cameras:
            frames[camera].append(jpeg(environment, camera))
    return np.array(proprio), frames


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="one episode, for example lift_demo_1")
    parser.add_argument("--max-frames", type=int, help="stop each episode after so many frames")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        environment = None
        with h5py.File(task["file"], "r") as archive:
            for demo, group in archive["data"].items():
                if arguments.only not in (None, f"{name}_{demo}"):
                    continue
                start = time.monotonic()
                environment = environment or make_environment(task)
                if task["stored_model"]:
                    xml = environment.edit_model_xml(group.attrs["model_file"])
                    environment.reset_from_xml_string(xml)
                index = np.arange(0, len(group["states"]), STRIDE)[:arguments.max_frames]
                proprio, frames = render(environment, group["states"][()][index], task["cameras"])
                arrays = {"frame_index": index, "actions_20hz": group["actions"][()],
                          "proprio": proprio}
                for camera, files in frames.items():
                    arrays[f"jpeg_{camera}"] = np.frombuffer(b"".join(files), np.uint8)
                    arrays[f"offsets_{camera}"] = np.cumsum([0] + [len(f) for f in files])
                np.savez_compressed(arguments.out / f"{name}_{demo}.npz", **arrays)
                print(f"{name}_{demo}: {len(index)} frames x {len(frames)} cameras, "
                      f"{time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
