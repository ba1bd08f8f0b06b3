"""Measures training and inference of the PyTorch model, one JSON line for each setting.

Tries every combination of the given lists and repeats the best ones in a last line, with the
samples per second of training and the latency of one policy call. See README.md.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import flops
from config import FlowerConfig, load_toml
from flower import Batch
from layers import num_parameters
from timing import (
    emit,
    environment,
    forget_peak,
    median_ms,
    open_device,
    peak_memory_mib,
    peak_tflops,
    percentile,
    times_ms,
    wait,
)
from training import Policy, Setting, TrainStep, compiled, make_model, new_step, random_batch

BOOLS = {"on": True, "off": False}


def settings(args: argparse.Namespace) -> list[Setting]:
    """Returns every combination of the lists on the command line."""
    sdpa, channels_last, fused = (
        [BOOLS[word] for word in words] for words in (args.sdpa, args.channels_last, args.fused)
    )
    lists = (args.precision, args.compile, sdpa, channels_last, args.depthwise, fused)
    return [Setting(*choice) for choice in itertools.product(*lists)]


class Bench:
    """The runs of one command line."""

    def __init__(self, args: argparse.Namespace, config: FlowerConfig):
        self.args, self.config = args, config
        self.device = open_device(args.device)
        self.peak = args.peak_tflops or peak_tflops(self.device)
        dim = next(s.dim for s in config.spaces if s.name == args.spaces[0])
        self.forward_flops = flops.by_part(config, args.text_len, dim)
        self.end = time.monotonic() + args.time_limit
        self.how = {"seconds": args.seconds, "warmup": args.warmup}

    def batch(self, size: int) -> Batch:
        """Draws a batch of the command line's kind."""
        args = self.args
        return random_batch(self.config, size, args.text_len, args.spaces, self.device)

    def out_of_time(self) -> bool:
        """Returns whether the time limit forbids another setting."""
        return time.monotonic() > self.end

    def step(self, setting: Setting) -> TrainStep:
        """Builds a model and its optimizer."""
        model = make_model(self.config, setting, self.device)
        if self.args.freeze_token_table:
            model.freeze_token_table()
        max_norm = self.args.clip or None
        return TrainStep(model, setting, self.device, self.args.stage, max_norm, self.args.ema)

    def release(self) -> None:
        """Frees what a setting left behind."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def utilisation(self, flop: float, ms: float) -> dict:
        """Returns the rate of model FLOPs and its share of the device's peak."""
        rate = flop / ms / 1e9
        return {"tflops_per_s": rate, "mfu": rate / self.peak if self.peak else None}

    # ---- training ------------------------------------------------------------------------------

    def train(self, setting: Setting) -> list[dict]:
        """Measures training steps at every micro-batch, from small to large."""
        lines, step = [], self.step(setting)
        for size in sorted(self.args.micro_batch):
            line = {"kind": "train", "micro_batch": size, **setting.as_dict()}
            if self.out_of_time():
                lines.append(line | {"error": "time limit"})
                break
            try:
                line |= self.train_line(step, size)
            except torch.OutOfMemoryError:
                step.model.zero_grad(set_to_none=True)
                lines.append(line | {"error": "out of memory"})
                break
            lines.append(line)
        return lines

    def train_line(self, step: TrainStep, size: int) -> dict:
        """Measures steps at one micro-batch."""
        batch = self.batch(size)
        start = time.perf_counter()
        loss = step(batch).item()
        first = time.perf_counter() - start
        forget_peak(self.device)
        times = times_ms(lambda: step(batch), self.device, **self.how)
        ms = statistics.median(times)
        flop = flops.TRAIN_FACTOR * sum(self.forward_flops.values()) * size
        return {
            "step_ms": ms,
            "step_ms_p90": percentile(times, 0.9),
            "samples_per_s": 1e3 * size / ms,
            "peak_memory_mib": peak_memory_mib(self.device),
            "steps": len(times),
            "first_step_s": first,
            "loss": loss,
            **self.utilisation(flop, ms),
        }

    def parts(self, setting: Setting, size: int) -> dict:
        """Times vision, text, flow transformer and optimizer by themselves, at one micro-batch.

        Each of the first three is a forward and a backward pass from given inputs to given output
        gradients, compiled as a graph of its own.
        """
        step, batch = self.step(setting), self.batch(size)
        model, args = step.model, self.args
        with torch.no_grad(), setting.autocast(self.device):
            images = model.vlm.image_tokens(batch.images.to(model.cond_linear.weight.dtype))
            joined = model.join(images, batch.input_ids)
            content = model.content_mask(batch, images.shape[1])
            features = model.encode_joined(joined, content)

        def flow(features):
            context = model.context(features, content, batch.spaces, batch.frequency_hz)
            return model.flow_loss(batch.actions, batch.noise, batch.t, context)

        def text(images):
            return model.encode_joined(model.join(images, batch.input_ids), content)

        def vision(images):
            return model.vlm.image_tokens(images.to(model.cond_linear.weight.dtype))

        inputs = {"vision": batch.images, "text": images, "flow": features}
        line = {"kind": "parts", "micro_batch": size, **setting.as_dict()}
        for (name, given), run in zip(inputs.items(), (vision, text, flow)):
            given = given.detach().requires_grad_(name != "vision")
            ms = self.time_part(step, compiled(run, setting), given)
            line[f"{name}_ms"] = ms
            rate = self.utilisation(flops.TRAIN_FACTOR * self.forward_flops[name] * size, ms)
            line[f"{name}_tflops_per_s"] = rate["tflops_per_s"]
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        line["optimizer_ms"] = median_ms(step.update, self.device, seconds=args.seconds)
        parts = ("vision", "text", "flow", "optimizer")
        total = sum(line[f"{part}_ms"] for part in parts)
        return line | {f"{part}_share": line[f"{part}_ms"] / total for part in parts}

    def time_part(self, step: TrainStep, run, given: torch.Tensor) -> float:
        """Returns the milliseconds of `run` on `given`, forward and backward."""
        setting = step.setting
        with setting.autocast(self.device):
            upstream = torch.randn_like(run(given).detach())

        def once():
            new_step(setting)
            with setting.autocast(self.device):
                output = run(given)
            output.backward(upstream)
            step.model.zero_grad(set_to_none=True)
            given.grad = None

        return median_ms(once, self.device, **self.how)

    # ---- inference -----------------------------------------------------------------------------

    def latency(self, setting: Setting) -> dict:
        """Measures one policy call: one observation to one chunk."""
        args = self.args
        policy = Policy(make_model(self.config, setting, self.device), setting, self.device)
        batch = self.batch(1)
        noise = torch.randn_like(batch.actions)

        def call():
            actions = policy(batch, noise, args.denoising_steps)
            wait(self.device)
            return actions

        start = time.perf_counter()
        call()
        first = time.perf_counter() - start
        forget_peak(self.device)
        times = times_ms(call, self.device, **self.how)
        return {
            "kind": "latency",
            **setting.as_dict(),
            "denoising_steps": args.denoising_steps,
            "ms": statistics.median(times),
            "ms_p90": percentile(times, 0.9),
            "calls": len(times),
            "first_call_s": first,
            "peak_memory_mib": peak_memory_mib(self.device),
        }

    # ---- all -----------------------------------------------------------------------------------

    def guarded(self, kind: str, setting: Setting, measure) -> list[dict]:
        """Runs a measurement; a failure becomes its line, and the next setting goes on."""
        line = {"kind": kind, **setting.as_dict()}
        torch.manual_seed(self.args.seed)
        try:
            lines = [line | {"error": "time limit"}] if self.out_of_time() else measure()
        except Exception as error:  # noqa: BLE001 - a setting that cannot run is a result
            reason = (str(error).strip().splitlines() or [""])[0]
            lines = [line | {"error": f"{type(error).__name__}: {reason}"[:300]}]
        self.release()
        for line in lines:
            emit(line)
        return [line for line in lines if "error" not in line]

    def run(self) -> int:
        """Measures everything; returns the exit code."""
        args, trained, called = self.args, [], []
        for setting in settings(args):
            if "train" in args.measure:
                trained += self.guarded("train", setting, lambda s=setting: self.train(s))
        best = max(trained, key=lambda line: line["samples_per_s"], default=None)
        if best is not None and "parts" in args.measure:
            setting = Setting(**{key: best[key] for key in Setting().as_dict()})
            self.guarded("parts", setting, lambda: [self.parts(setting, best["micro_batch"])])
        if "latency" in args.measure:
            # The optimizer plays no part here: one setting stands for both of its forms.
            for setting in dict.fromkeys(replace(s, fused_adamw=True) for s in settings(args)):
                called += self.guarded("latency", setting, lambda s=setting: [self.latency(s)])
        quickest = min(called, key=lambda line: line["ms"], default=None)
        emit({"kind": "best", "train": best, "latency": quickest})
        return 0 if trained or called else 1


def arguments() -> argparse.Namespace:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--model", type=Path, default=root / "configs/model/flower.toml")
    add("--measure", nargs="+", default=["train", "parts", "latency"],
        choices=("train", "parts", "latency"))
    add("--cameras", type=int, help="cameras of an observation, instead of the model file's")
    add("--chunk", type=int, help="steps of an action chunk, instead of the model file's")
    add("--text-len", type=int, default=50, help="text tokens of every sample")
    add("--spaces", nargs="+", default=["eef_delta"],
        help="action spaces; several: a mixed batch, whose FLOPs are counted as those of the first")
    add("--stage", default="pretrain", choices=("pretrain", "finetune"),
        help="parameter groups; finetune also takes its token order and masks")
    add("--micro-batch", nargs="+", type=int, default=[8])
    add("--precision", nargs="+", default=["bf16"], metavar="P", help="f32 tf32 autocast bf16")
    add("--compile", nargs="+", default=["none"], metavar="MODE",
        help="none, a mode of torch.compile, or blocks:MODE")
    for name, text in (("sdpa", "fused attention"), ("channels-last", "convolutions as maps lie"),
                       ("fused", "one kernel for AdamW")):
        add(f"--{name}", nargs="+", default=["on"], choices=list(BOOLS), help=text)
    add("--depthwise", nargs="+", default=["conv"], choices=("conv", "shifts"))
    add("--dropout", default="on", choices=list(BOOLS), help="the model file's dropout rates")
    add("--freeze-token-table", action="store_true", help="as the reference's pretraining does")
    add("--clip", type=float, default=1.0, help="largest global gradient norm; 0: none")
    add("--ema", action="store_true", help="keep averaged weights")
    add("--denoising-steps", type=int, default=4)
    add("--seconds", type=float, default=3.0, help="time to measure each setting for")
    add("--warmup", type=int, default=3, help="runs before that")
    add("--time-limit", type=float, default=3600.0, help="seconds after which none is started")
    add("--peak-tflops", type=float, help="of the device, for MFU")
    add("--threads", type=int, help="of the CPU")
    add("--seed", type=int, default=0, help="of weights, batches and dropout, for every setting")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = load_toml(args.model)
    if args.stage == "finetune":
        config = config.finetuning()
    if args.dropout == "off":
        config = config.without_dropout()
    if args.cameras:
        config = replace(config, num_cameras=args.cameras)
    if args.chunk:
        config = replace(config, flow=replace(config.flow, action_horizon=args.chunk))
    settings(args)  # refuses a misspelt list before anything runs
    faults = config.faults(args.text_len)
    known = [space.name for space in config.spaces]
    if unknown := set(args.spaces) - set(known):
        faults.append(f"--spaces {sorted(unknown)}: the model knows {known}")
    if faults:
        raise SystemExit("; ".join(faults))
    bench = Bench(args, config)
    emit(environment(bench.device) | {
        "model": args.model.name,
        "parameters": num_parameters(make_model(config, Setting(), torch.device("meta"))),
        "cameras": config.num_cameras,
        "chunk": config.flow.action_horizon,
        "text_len": args.text_len,
        "spaces": args.spaces,
        "stage": args.stage,
        "dropout": args.dropout,
        "forward_gflops": {k: round(v / 1e9, 3) for k, v in bench.forward_flops.items()},
        "peak_tflops": bench.peak,
    })
    return bench.run()


if __name__ == "__main__":
    sys.exit(main())
