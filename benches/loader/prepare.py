#!/usr/bin/env python3
"""Write a corpus of JPEG frames as a LeRobotDataset v3.0 for the loader benchmark, byte for byte.

    python prepare.py --frames DATA/frames --out DATA/pollen [--group-episodes 1]

`--frames` holds blob.bin (JPEG after JPEG), index.npz (`off` [episodes, steps, cameras, 2] as offset and length,
`action`, `state`) and meta.json (`steps`, `size`, `instructions`). Needs numpy and pyarrow.
"""
import argparse
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CAMERAS = ("primary", "wrist")
EPISODES_PER_FILE = 40

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--frames", type=pathlib.Path, required=True)
parser.add_argument("--out", type=pathlib.Path, required=True)
parser.add_argument("--group-episodes", type=int, default=1, help="episodes in a row group")
args = parser.parse_args()

arrays = np.load(args.frames / "index.npz")
offsets, action, state = arrays["off"], arrays["action"], arrays["state"]
meta = json.loads((args.frames / "meta.json").read_text())
blob = np.memmap(args.frames / "blob.bin", np.uint8, "r")
episodes, steps = offsets.shape[:2]
tasks = sorted(set(meta["instructions"]))
image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images(chosen, camera):
    spans = offsets[chosen, :, camera].reshape(-1, 2)
    data = pa.array([blob[start : start + length].tobytes() for start, length in spans], pa.binary())
    paths = pa.array([f"frame-{step:06}.jpg" for _ in chosen for step in range(steps)])
    return pa.StructArray.from_arrays([data, paths], fields=list(image_type))


def rows(chosen):
    first = chosen[0] * steps
    count = len(chosen) * steps
    integers = lambda values: pa.array(np.asarray(values, np.int64))
    floats = lambda values: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[-1])
    columns = {f"observation.images.{name}": images(chosen, i) for i, name in enumerate(CAMERAS)}
    columns |= {
        "observation.state": floats(state[chosen]),
        "action": floats(action[chosen]),
        "timestamp": pa.array(np.tile(np.arange(steps, dtype=np.float32) / 10, len(chosen))),
        "frame_index": integers(np.tile(np.arange(steps), len(chosen))),
        "episode_index": integers(np.repeat(chosen, steps)),
        "index": integers(np.arange(first, first + count)),
        "task_index": integers(np.repeat([tasks.index(meta["instructions"][e]) for e in chosen], steps)),
    }
    return pa.table(columns)


for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
    (args.out / folder).mkdir(parents=True, exist_ok=True)
for number, start in enumerate(range(0, episodes, EPISODES_PER_FILE)):
    writer = None
    end = min(start + EPISODES_PER_FILE, episodes)
    for group in range(start, end, args.group_episodes):
        table = rows(list(range(group, min(group + args.group_episodes, end))))
        if writer is None:
            plain = [f"observation.images.{name}.bytes" for name in CAMERAS]
            writer = pq.ParquetWriter(
                args.out / f"data/chunk-000/file-{number:03}.parquet",
                table.schema,
                compression={
                    **{name: "ZSTD" for name in table.column_names},
                    **{name: "NONE" for name in plain},
                },
                use_dictionary=False,
                write_statistics=False,
            )
        writer.write_table(table, row_group_size=table.num_rows)
    writer.close()
size = meta["size"]
feature = lambda dtype, shape: {"dtype": dtype, "shape": shape, "names": None}
info = {
    "codebase_version": "v3.0",
    "fps": 10,
    "total_episodes": episodes,
    "total_frames": episodes * steps,
    "total_tasks": len(tasks),
    "features": {
        **{f"observation.images.{name}": feature("image", [size, size, 3]) for name in CAMERAS},
        "observation.state": feature("float32", [state.shape[-1]]),
        "action": feature("float32", [action.shape[-1]]),
    },
}
(args.out / "meta/info.json").write_text(json.dumps(info, indent=1))
pq.write_table(pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": tasks}), args.out / "meta/tasks.parquet")
numbers = np.arange(episodes)
table = {"episode_index": numbers, "length": np.full(episodes, steps), "dataset_from_index": numbers * steps}
table = pa.table({name: pa.array(values, pa.int64()) for name, values in table.items()})
pq.write_table(table, args.out / "meta/episodes/chunk-000/file-000.parquet")
