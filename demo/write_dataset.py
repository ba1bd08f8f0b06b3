"""Writes the demo datasets: rendered robosuite demonstrations -> LeRobotDataset v3.0.

    python write_dataset.py RENDERED_DIR data

RENDERED_DIR holds the .npz files that render.py makes. JPEG files are copied byte for byte into
the Parquet image columns. See README.md for the conventions of states and actions.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
CHUNKS_SIZE = 1000
DATA_FILE_MB = 4  # small on purpose: the larger dataset gets several data files
ROW_GROUP_BYTES = 256 * 1024
PAGE_BYTES = 64 * 1024  # several pages a row group, so that reading single pages pays
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

# OSC_POSE of robosuite 1.4.0: input 1 is a goal 0.05 m (0.5 rad) away, per 20 Hz step.
METRES_PER_UNIT = 0.05
RADIANS_PER_UNIT = 0.5

DATASETS = {
    "lift": {
        "files": "lift_demo_*.npz",
        "robot_type": "panda",
        "task": "pick up the red cube",
        "cameras": {"observation.images.primary": "agentview",
                    "observation.images.wrist": "robot0_eye_in_hand"},
        "arms": [""],
    },
    "two_arm_handover": {
        "files": "twoarmhandover_demo_*.npz",
        "robot_type": "two_pandas",
        "task": "hand the hammer over to the other arm",
        "cameras": {"observation.images.primary": "agentview",
                    "observation.images.wrist": "robot0_eye_in_hand",
                    "observation.images.wrist_right": "robot1_eye_in_hand"},
        "arms": ["arm0_", "arm1_"],
    },
}

ACTION_NAMES = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]
STATE_NAMES = (["x", "y", "z"] + [f"rotation_{r}{c}" for r in range(3) for c in range(3)]
               + ["finger_left", "finger_right"] + [f"joint_{j}" for j in range(7)])


def rotation_matrix(axis_angle):
    """Rotation matrix of an axis-angle vector (Rodrigues)."""
    angle = np.linalg.norm(axis_angle)
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = axis_angle / angle
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)


def axis_angle(matrix):
    """Axis-angle vector of a rotation by less than pi."""
    twist = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0],
                      matrix[1, 0] - matrix[0, 1]]) / 2  # sin(angle) * axis
    sine = np.linalg.norm(twist)
    angle = np.arctan2(sine, (np.trace(matrix) - 1) / 2)
    return twist if sine < 1e-12 else twist * (angle / sine)


def compose(steps):
    """One 10 Hz action of one arm from the 20 Hz actions [n, 7] that it covers, in order.

    Deltas are in the world frame, so a later rotation is applied from the left.
    """
    steps = np.clip(steps, -1, 1)  # as the controller does
    position = METRES_PER_UNIT * steps[:, :3].sum(axis=0)
    rotation = np.eye(3)
    for step in steps:
        rotation = rotation_matrix(RADIANS_PER_UNIT * step[3:6]) @ rotation
    opening = (1 - steps[-1, 6]) / 2  # robosuite: -1 open, +1 close; here: 1 open, 0 closed
    return np.concatenate([position, axis_angle(rotation), [opening]])


def read_episode(path, cameras):
    """One rendered demonstration: states [F, P], actions [F, A], JPEG files per camera."""
    with np.load(path) as archive:
        index, raw, state = (archive[k] for k in ("frame_index", "actions_20hz", "proprio"))
        frames = {}
        for feature, camera in cameras.items():
            blob, offsets = archive[f"jpeg_{camera}"].tobytes(), archive[f"offsets_{camera}"]
            frames[feature] = [blob[a:b] for a, b in zip(offsets[:-1], offsets[1:])]
    ends = np.append(index[1:], len(raw))
    assert (ends > index).all() and (np.diff(index) == 2).all(), path
    arms = raw.shape[1] // 7
    action = np.array([np.concatenate([compose(raw[a:b, 7 * k:7 * k + 7]) for k in range(arms)])
                       for a, b in zip(index, ends)])
    assert all(len(jpegs) == len(state) for jpegs in frames.values()), path
    return {"state": state.astype(np.float32), "action": action.astype(np.float32),
            "frames": frames}


def numeric_stats(values):
    """LeRobot's statistics of an array [frames, dims], exact."""
    values = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    stats = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0),
             "std": values.std(0), "count": np.array([len(values)])}
    return stats | {name: np.quantile(values, q, axis=0) for name, q in QUANTILES.items()}


def image_histogram(jpegs):
    """Counts [3, 256] of the grey levels of every pixel."""
    counts = np.zeros((3, 256), dtype=np.int64)
    for jpeg in jpegs:
        pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        for channel in range(3):
            counts[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
    return counts


def image_stats(counts, num_frames):
    """LeRobot's image statistics [3, 1, 1] in [0, 1], from the histogram of all pixels."""
    levels = np.arange(256) / 255
    total = counts.sum(1)
    mean = (counts * levels).sum(1) / total
    stats = {"min": [levels[np.flatnonzero(c)[0]] for c in counts],
             "max": [levels[np.flatnonzero(c)[-1]] for c in counts], "mean": mean,
             "std": np.sqrt((counts * (levels - mean[:, None]) ** 2).sum(1) / total)}
    for name, q in QUANTILES.items():
        stats[name] = [levels[np.searchsorted(np.cumsum(c), q * c.sum())] for c in counts]
    stats = {name: np.reshape(value, (3, 1, 1)) for name, value in stats.items()}
    return stats | {"count": np.array([num_frames])}


def features_of(spec, episodes):
    """The `features` of info.json."""
    first = episodes[0]
    features = {}
    for feature in spec["cameras"]:
        width, height = Image.open(io.BytesIO(first["frames"][feature][0])).size
        features[feature] = {"dtype": "image", "shape": [height, width, 3],
                             "names": ["height", "width", "channels"]}
    for name, key, names in (("observation.state", "state", STATE_NAMES),
                             ("action", "action", ACTION_NAMES)):
        names = [arm + dim for arm in spec["arms"] for dim in names]
        assert len(names) == first[key].shape[1], (name, len(names))
        features[name] = {"dtype": "float32", "shape": [len(names)], "names": names}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for name in ("frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "int64", "shape": [1], "names": None}
    return features


def data_schema(features):
    """Arrow schema with the `huggingface` metadata that readers without info.json use."""
    fields, hf = [], {}
    for name, feature in features.items():
        width = feature["shape"][0]
        if feature["dtype"] == "image":
            fields.append(pa.field(name, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
            hf[name] = {"_type": "Image"}
        elif feature["shape"] == [1]:
            fields.append(pa.field(name, pa.type_for_alias(feature["dtype"])))
            hf[name] = {"dtype": feature["dtype"], "_type": "Value"}
        else:
            item = pa.field("element", pa.type_for_alias(feature["dtype"]))
            fields.append(pa.field(name, pa.list_(item, width)))
            hf[name] = {"feature": {"dtype": feature["dtype"], "_type": "Value"},
                        "length": width, "_type": "List"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": hf}})})


def episode_table(schema, episode, episode_index, first_index):
    """All frames of an episode."""
    num_frames = len(episode["state"])
    columns = {
        "observation.state": list(episode["state"]),
        "action": list(episode["action"]),
        "timestamp": np.arange(num_frames, dtype=np.float32) / np.float32(FPS),
        "frame_index": np.arange(num_frames),
        "episode_index": np.full(num_frames, episode_index),
        "index": first_index + np.arange(num_frames),
        "task_index": np.zeros(num_frames, dtype=np.int64),
    }
    for feature, jpegs in episode["frames"].items():
        columns[feature] = [{"bytes": jpeg, "path": f"frame-{i:06d}.jpg"}
                            for i, jpeg in enumerate(jpegs)]
    return pa.table([pa.array(columns[f.name], type=f.type) for f in schema], schema=schema)


def row_group_cuts(episode):
    """Cuts an episode into row groups of whole frames, about ROW_GROUP_BYTES of JPEG each."""
    sizes = np.sum([[len(j) for j in jpegs] for jpegs in episode["frames"].values()], axis=0)
    cumulative = np.concatenate([[0], np.cumsum(sizes)])
    groups = max(1, round(cumulative[-1] / ROW_GROUP_BYTES))
    targets = cumulative[-1] * np.arange(groups + 1) / groups
    return [int(np.abs(cumulative - t).argmin()) for t in targets]


def open_writer(path, schema, cameras):
    """Image columns plain and uncompressed, the others zstd; page index on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image_leaves = {f"{camera}.{leaf}" for camera in cameras for leaf in ("bytes", "path")}
    leaves = []
    for field in schema:
        if pa.types.is_struct(field.type):
            leaves += [f"{field.name}.bytes", f"{field.name}.path"]
        elif pa.types.is_fixed_size_list(field.type):
            leaves.append(f"{field.name}.list.element")
        else:
            leaves.append(field.name)
    return pq.ParquetWriter(
        path, schema, use_dictionary=False, data_page_size=PAGE_BYTES, write_batch_size=4,
        write_page_index=True,
        compression={leaf: "NONE" if leaf in image_leaves else "ZSTD" for leaf in leaves},
        write_statistics=[leaf for leaf in leaves if leaf not in image_leaves])


def write_parquet(path, columns, metadata=None):
    """A small metadata table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=4) + "\n")


def write_dataset(name, rendered, out):
    spec = DATASETS[name]
    paths = sorted(rendered.glob(spec["files"]))
    assert paths, f"no {spec['files']} in {rendered}"
    episodes = [read_episode(path, spec["cameras"]) for path in paths]
    features = features_of(spec, episodes)
    schema = data_schema(features)
    root = out / name

    file_index, file_bytes, first_index, writer, rows, tables = -1, 0, 0, None, [], []
    for number, episode in enumerate(episodes):
        table = episode_table(schema, episode, number, first_index)
        size = sum(len(j) for jpegs in episode["frames"].values() for j in jpegs)
        if writer is None or file_bytes + size > DATA_FILE_MB * 1024 * 1024:
            if writer is not None:
                writer.close()
            file_index, file_bytes = file_index + 1, 0
            path = root / f"data/chunk-000/file-{file_index:03d}.parquet"
            writer = open_writer(path, schema, spec["cameras"])
        cuts = row_group_cuts(episode)
        for start, end in zip(cuts[:-1], cuts[1:]):
            writer.write_table(table.slice(start, end - start), row_group_size=end - start)
        rows.append({"episode_index": number, "tasks": [spec["task"]], "length": len(table),
                     "data/chunk_index": 0, "data/file_index": file_index,
                     "dataset_from_index": first_index,
                     "dataset_to_index": first_index + len(table)})
        file_bytes, first_index = file_bytes + size, first_index + len(table)
        tables.append(table)
    writer.close()

    # Statistics per episode and of the whole dataset.
    whole, stats = pa.concat_tables(tables), {}
    for feature, kind in features.items():
        if kind["dtype"] == "image":
            counts = [image_histogram(episode["frames"][feature]) for episode in episodes]
            per_episode = [image_stats(c, len(t)) for c, t in zip(counts, tables)]
            stats[feature] = image_stats(sum(counts), len(whole))
        else:
            per_episode = [numeric_stats(t[feature].to_pylist()) for t in tables]
            stats[feature] = numeric_stats(whole[feature].to_pylist())
        for row, values in zip(rows, per_episode):
            for statistic, value in values.items():
                row[f"stats/{feature}/{statistic}"] = value.tolist()
    for row in rows:
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
    write_parquet(root / "meta/episodes/chunk-000/file-000.parquet",
                  {key: [row[key] for row in rows] for key in rows[0]})
    write_json(root / "meta/stats.json", {f: {k: v.tolist() for k, v in s.items()}
                                          for f, s in stats.items()})

    # Readers look the task up by row and take its text from the pandas index.
    column = {"field_name": "task_index", "name": "task_index", "pandas_type": "int64",
              "numpy_type": "int64", "metadata": None}
    index = {"field_name": "task", "name": "task", "pandas_type": "unicode",
             "numpy_type": "object", "metadata": None}
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": [column, index],
              "pandas_version": "2.3.3"}
    write_parquet(root / "meta/tasks.parquet",
                  {"task_index": pa.array([0], pa.int64()), "task": pa.array([spec["task"]])},
                  {"pandas": json.dumps(pandas)})
    write_json(root / "meta/info.json", {
        "codebase_version": "v3.0", "robot_type": spec["robot_type"],
        "total_episodes": len(rows), "total_frames": first_index, "total_tasks": 1,
        "chunks_size": CHUNKS_SIZE, "data_files_size_in_mb": DATA_FILE_MB,
        "video_files_size_in_mb": 200, "fps": FPS, "splits": {"train": f"0:{len(rows)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None, "features": features})
    return episodes


def verify(name, out, episodes):
    """Reads the dataset back and compares it with what was to be written."""
    root = out / name
    info = json.loads((root / "meta/info.json").read_text())
    files = sorted((root / "data").glob("*/*.parquet"))
    table = pa.concat_tables(pq.read_table(path) for path in files)
    assert table.num_rows == info["total_frames"] == sum(len(e["state"]) for e in episodes)
    assert table["index"].to_pylist() == list(range(table.num_rows))
    assert set(table.column_names) == set(info["features"])
    for row in pq.read_table(root / "meta/episodes").to_pylist():
        start, end = row["dataset_from_index"], row["dataset_to_index"]
        part, episode = table.slice(start, end - start), episodes[row["episode_index"]]
        assert row["length"] == end - start == len(episode["state"])
        assert part["frame_index"].to_pylist() == list(range(row["length"]))
        assert set(part["episode_index"].to_pylist()) == {row["episode_index"]}
        assert (np.array(part["action"].to_pylist(), np.float32) == episode["action"]).all()
        assert (np.array(part["observation.state"].to_pylist(), np.float32)
                == episode["state"]).all()
        for camera in episode["frames"]:
            stored = [frame["bytes"] for frame in part[camera].to_pylist()]
            assert stored == episode["frames"][camera]
            assert all(j[:3] == b"\xff\xd8\xff" and j[-2:] == b"\xff\xd9" for j in stored)
    groups = 0
    for path in files:
        metadata = pq.ParquetFile(path).metadata
        for g in range(metadata.num_row_groups):
            for c in range(metadata.num_columns):
                column = metadata.row_group(g).column(c)
                image = column.path_in_schema.startswith("observation.images.")
                assert column.compression == ("UNCOMPRESSED" if image else "ZSTD")
                assert column.has_offset_index and not column.has_dictionary_page
                assert "PLAIN" in column.encodings
        groups += metadata.num_row_groups
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    print(f"{name}: {info['total_episodes']} episodes, {info['total_frames']} frames, "
          f"{len(files)} data files, {groups} row groups, {size} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rendered", type=Path, help="folder of the .npz files of render.py")
    parser.add_argument("out", type=Path, help="folder for the datasets; must not hold them yet")
    arguments = parser.parse_args()
    for name in DATASETS:
        assert not (arguments.out / name).exists(), f"{arguments.out / name} exists: remove it"
        verify(name, arguments.out, write_dataset(name, arguments.rendered, arguments.out))


if __name__ == "__main__":
    main()
