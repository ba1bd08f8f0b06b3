"""Opens datasets that Pollen wrote with the real `lerobot` package and compares what it yields with
the files' own bytes: every frame's actions, state, episode and instruction, and a spread of images."""

import argparse
import io
import json
import pathlib
import sys

import numpy as np
import pyarrow.parquet as pq
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image

IMAGES_PER_DATASET = 40


def stored_rows(root: pathlib.Path) -> list[dict]:
    files = sorted(root.glob("data/chunk-*/file-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def check(root: pathlib.Path) -> str:
    info = json.loads((root / "meta/info.json").read_text())
    dataset = LeRobotDataset(f"pollen/{root.name}", root=root)
    rows = stored_rows(root)
    assert len(dataset) == len(rows) == info["total_frames"], (len(dataset), len(rows))
    assert dataset.num_episodes == info["total_episodes"]
    cameras = [name for name, feature in info["features"].items() if feature["dtype"] == "image"]
    vectors = [
        name
        for name, feature in info["features"].items()
        if feature["dtype"] in ("float32", "float64")
    ]
    tasks = pq.read_table(root / "meta/tasks.parquet").to_pandas()
    texts = {int(row.task_index): text for text, row in tasks.iterrows()}

    without_images = dataset.hf_dataset.remove_columns(cameras)
    for index, row in enumerate(rows):
        item = without_images[index]
        for name in vectors:
            got, want = np.atleast_1d(item[name].numpy()), np.atleast_1d(row[name])
            assert np.array_equal(got, want.astype(got.dtype)), (index, name, got, want)
        for name in ("episode_index", "frame_index", "index", "task_index"):
            assert int(item[name]) == row[name], (index, name)

    spread = np.linspace(0, len(rows) - 1, min(IMAGES_PER_DATASET, len(rows))).astype(int)
    for index in spread:
        item, row = dataset[int(index)], rows[index]
        assert item["task"] == texts[row["task_index"]], (index, item["task"])
        for camera in cameras:
            picture = Image.open(io.BytesIO(row[camera]["bytes"])).convert("RGB")
            want = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 255
            got = item[camera].numpy()
            assert np.array_equal(got, want), (index, camera, np.abs(got - want).max())
    return (
        f"{root.name}: {len(rows)} frames of {dataset.num_episodes} episodes, "
        f"{len(spread)} x {len(cameras)} images: the same"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("roots", nargs="+", type=pathlib.Path, help="dataset folders")
    for root in parser.parse_args().roots:
        print(check(root), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
