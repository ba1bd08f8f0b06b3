"""Compares what happens to a camera frame with PyTorch or TensorFlow on one core: images.py PROGRAM [ROUNDS].

PROGRAM is bench_images (`cargo build --release -p pollen-processing --example bench_images`). The peer is what this
Python has: PyTorch's antialiased interpolation for bilinear, TensorFlow's image operations, compiled into one graph, for
lanczos3 and photometric. Runs are in turns; prints a Markdown table of the steps that have a peer.
"""

import statistics
import subprocess
import sys
import time


def best(once):
    """Returns the shortest of 100 runs, in microseconds."""
    shortest = float("inf")
    for _ in range(100):
        began = time.perf_counter()
        once()
        shortest = min(shortest, time.perf_counter() - began)
    return 1e6 * shortest


def torch_steps():
    import torch
    from torch.nn.functional import interpolate

    torch.set_num_threads(1)

    def bilinear(height, width, kind):
        """Of the two memory formats the faster one counts."""
        times = []
        for layout in (torch.contiguous_format, torch.channels_last):
            frame = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8).contiguous(memory_format=layout)
            times.append(best(lambda: kind(frame)))
        return min(times)

    def fixed_point(frame):
        return interpolate(frame, (224, 224), mode="bilinear", antialias=True)

    def in_f32(frame):
        return interpolate(frame.float(), (224, 224), mode="bilinear", antialias=True).round_().clamp_(0, 255).byte()

    return {
        ("bilinear", "PyTorch, f32"): lambda height, width: bilinear(height, width, in_f32),
        ("bilinear", "PyTorch, int16 (other bits)"): lambda height, width: bilinear(height, width, fixed_point),
    }


def tensorflow_steps():
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    def measure(step, height, width):
        frame = tf.constant(tf.cast(tf.random.uniform((height, width, 3), 0, 256, tf.int32), tf.uint8))
        graph = tf.function(step).get_concrete_function(frame)
        return best(lambda: graph(frame))

    def lanczos3(frame):
        resized = tf.image.resize(frame, (224, 224), "lanczos3", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)

    def photometric(frame):
        def clip(values):
            return tf.clip_by_value(values, 0, 1)

        values = tf.image.convert_image_dtype(frame, tf.float32)
        corner = tf.random.uniform((1, 2), 0, 0.05)
        values = clip(tf.image.crop_and_resize(values[None], tf.concat((corner, corner + 0.9), 1), [0], (224, 224))[0])
        values = clip(tf.image.random_brightness(values, 0.1))
        values = clip(tf.image.random_contrast(values, 0.9, 1.1))
        values = clip(tf.image.random_saturation(values, 0.9, 1.1))
        values = clip(tf.image.random_hue(values, 0.05))
        return tf.cast(values * 255, tf.uint8)

    return {
        ("lanczos3", "TensorFlow"): lambda height, width: measure(lanczos3, height, width),
        ("photometric", "TensorFlow"): lambda height, width: measure(photometric, height, width),
    }


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    peers = {}
    for steps in (torch_steps, tensorflow_steps):
        try:
            peers |= steps()
        except ModuleNotFoundError as missing:
            print(f"no {missing.name} here: its steps are left out", file=sys.stderr)
    ours, theirs = {}, {}
    for _ in range(rounds):
        lines = subprocess.run(sys.argv[1], check=True, capture_output=True, text=True).stdout
        for line in lines.splitlines():
            height, width, step, microseconds = line.split()
            frame = int(height), int(width), step
            ours.setdefault(frame, []).append(float(microseconds))
            for (name, peer), measure in peers.items():
                if name == step:
                    theirs.setdefault((frame, peer), []).append(measure(*frame[:2]))
    print("| frame | step | Pollen us | peer | its us | Pollen's speed by the peer's |\n|---|---|---|---|---|---|")
    for (frame, peer), times in theirs.items():
        us, them = statistics.median(ours[frame]), statistics.median(times)
        height, width, step = frame
        print(f"| {height} x {width} | {step} | {us:.0f} | {peer} | {them:.0f} | {them / us:.2f} |")


main()
