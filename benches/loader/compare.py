#!/usr/bin/env python3
"""Compare the pixels of the loader's first batches with libjpeg-turbo's, image by image.

    bench_loader --data DATA/pollen --dump 100 ... | python compare.py --frames DATA/frames

Reads records of one u64 (frame) and two cameras of [3, size, size] bytes from standard input; ends with 1 when a value
differs by more than 4 of 255. Needs numpy and simplejpeg.
"""
import argparse
import json
import pathlib
import sys

import numpy as np
import simplejpeg

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--frames", type=pathlib.Path, required=True)
parser.add_argument("--limit", type=int, default=4)
args = parser.parse_args()
offsets = np.load(args.frames / "index.npz")["off"]
size = json.loads((args.frames / "meta.json").read_text())["size"]
blob = np.memmap(args.frames / "blob.bin", np.uint8, "r")
record = 8 + 2 * 3 * size * size
count, worst, total = 0, 0, 0.0
while len(data := sys.stdin.buffer.read(record)) == record:
    frame = int.from_bytes(data[:8], "little")
    found = np.frombuffer(data, np.uint8, offset=8).reshape(2, 3, size, size).transpose(0, 2, 3, 1)
    for camera in range(2):
        start, length = offsets.reshape(-1, 2, 2)[frame, camera]
        expected = simplejpeg.decode_jpeg(blob[start : start + length].tobytes(), colorspace="RGB")
        difference = np.abs(found[camera].astype(np.int16) - expected)
        worst, total = max(worst, int(difference.max())), total + float(difference.mean())
        count += 1
print(f"{count} images, largest difference {worst} of 255, mean {total / max(count, 1):.3f}")
sys.exit(count == 0 or worst > args.limit)
