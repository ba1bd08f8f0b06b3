"""Compares this implementation with the golden vectors of the reference.

Every `output.*`, `grad.*` and `grad_finetune.*` tensor of each file must be recomputed and lie
within the file's own tolerance, once for each choice of fast paths. Prints one line per file and
choice; the exit code is 1 if any tensor misses.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import config as sizes
import flops
from config import FLOWER_SPACES, FastPaths
from flow_block import FlowBlock, modulate, rotate
from flow_transformer import Context, FlowHead
from flower import Batch, Flower
from golden import Golden
from language import LanguageModel
from layers import RmsNorm, load_weights
from optimizer import Ema, MasterWeights, adamw, clip, decays
from timing import open_device
from vision import ImageEncoder

EEF = 1
CHOICES = {
    "plain": FastPaths(sdpa=False, channels_last=False),
    "sdpa, channels-last": FastPaths(sdpa=True, channels_last=True),
    "sdpa, shifts": FastPaths(sdpa=True, depthwise="shifts"),
}


def outputs(**tensors: Tensor) -> dict[str, Tensor]:
    """Names computed tensors as a golden file does."""
    return {f"output.{name}": tensor for name, tensor in tensors.items()}


def gradients(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Returns the gradients of a module's parameters; one that has none counts as zero."""
    return {
        f"{prefix}.{name}": torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters(remove_duplicate=False)
    }


# ---- one function per file ---------------------------------------------------------------------


def flow_block(golden: Golden, fast: FastPaths) -> dict[str, Tensor]:
    x, cond, context, shared, content = (
        golden.inputs[n] for n in ("x", "cond", "context", "global_adaln", "cross_mask_float")
    )
    block = FlowBlock(sizes.golden_flow(golden.config), fast).to(x.device).eval()
    load_weights(block, golden.weights)
    shared = shared.transpose(0, 1)[:, :6]
    kv = block.cross_attn.keys_values(context)
    own = block.adaLN_modulation(cond)
    shift, scale = (own.unflatten(-1, (6, -1)) + shared).unbind(1)[:2]
    modulated = modulate(block.norm1(x), shift, scale)
    tables = block.self_attn.cos, block.self_attn.sin
    mask = content[:, None, None, :]
    result = outputs(
        local_modulation=own,
        norm1_of_x=block.norm1(x),
        modulated_norm1=modulated,
        self_attn=block.self_attn(modulated),
        cross_attn_of_norm2=block.cross_attn(block.norm2(x), kv, None),
        mlp_of_x=block.mlp(x),
        block=block(x, cond, kv, shared),
        block_no_global=block(x, cond, kv),
        block_additive_mask=block(x, cond, kv, shared, mask),
        block_boolean_mask=block(x, cond, kv, shared, mask.bool()),
        rope_q=rotate(golden.inputs["rope_q"], *tables),
        rope_k=rotate(golden.inputs["rope_k"], *tables),
    )
    for module in block.modules():
        if isinstance(module, RmsNorm):
            module.variant = "variance"
    kv = block.cross_attn.keys_values(context)
    return result | outputs(block_variance_norm=block(x, cond, kv, shared))


def golden_head(golden: Golden, fast: FastPaths) -> FlowHead:
    """Builds the flow transformer of a file that has no encoder."""
    flow = sizes.golden_flow(golden.config)
    head = FlowHead(flow, golden.config["vlm"], FLOWER_SPACES, fast, "additive")
    head.to(golden.inputs["features"].device).eval()
    load_weights(head, golden.weights)
    return head


def head_contexts(golden: Golden, head: FlowHead) -> tuple[Context, Context]:
    """Returns the context in the form of [P] and of [C]: one space, 3 Hz, no mask, no proprio."""
    i = golden.inputs
    features = i["features"]
    pretrain = head.context(
        features, i["attention_mask"], i["action_type"], i["frequency_hz"][:, 0], i["proprio"][:, 0]
    )
    hz = torch.full((len(features),), 3.0, device=features.device)
    return pretrain, head.context(features, None, EEF, hz)


def dit(golden: Golden, fast: FastPaths) -> dict[str, Tensor]:
    head, i = golden_head(golden, fast), golden.inputs
    pretrain, finetune = head_contexts(golden, head)
    trace: dict[str, Tensor] = {}
    velocity = head.velocity(i["z"], i["t"], pretrain, trace)
    hz, spaces = i["frequency_hz"][:, 0], i["action_type"]
    return outputs(
        action_space_embed_unused=head.action_space_embedder(spaces),
        context=head.project_context(i["features"]),
        frequency_embed=head.frequency_embedder(hz),
        frequency_sinusoid=head.frequency_embedder.sinusoid(hz),
        finetune_frequency_embed=head.frequency_embedder(torch.full_like(hz, 3.0)),
        proprio_embed=head.proprio_embed(i["proprio"][:, 0], spaces, len(hz)),
        timestep_embed=head.t_embedder(i["t"]),
        timestep_sinusoid=head.t_embedder.sinusoid(i["t"]),
        velocity=velocity,
        finetune_velocity=head.velocity(i["finetune_z"], i["t"], finetune),
        **trace,
    )


def flow_loss(golden: Golden, fast: FastPaths) -> dict[str, Tensor]:
    head, i = golden_head(golden, fast), golden.inputs
    i["features"].requires_grad_()
    pretrain, _ = head_contexts(golden, head)
    trace: dict[str, Tensor] = {}
    loss = head.flow_loss(i["actions"], i["noise"], i["t"], pretrain, trace=trace)
    loss.backward()
    grads = gradients(head, "grad")
    grads["grad.features"] = i["features"].grad.clone()
    norm = torch.cat([g.flatten() for n, g in grads.items() if n.startswith("grad.dit.")]).norm()
    for name, grad in grads.items():
        if name not in golden.wanted and grad.abs().max() > 0.0:
            golden.wanted[name] = torch.zeros_like(grad)
    head.zero_grad()
    _, finetune = head_contexts(golden, head)
    other = head.flow_loss(i["finetune_actions"], i["finetune_noise"], i["finetune_t"], finetune)
    other.backward()
    kept = ("z_t", "velocity", "valid_mask")
    return outputs(
        loss=loss,
        finetune_loss=other,
        grad_norm_dit_only=norm,
        **{name: trace[name] for name in kept},
    ) | grads | gradients(head, "grad_finetune")


def sampler(golden: Golden, fast: FastPaths) -> dict[str, Tensor]:
    head, i = golden_head(golden, fast), golden.inputs
    pretrain, finetune = head_contexts(golden, head)
    steps = golden.config["steps"]
    path: list[Tensor] = []
    finetune_path: list[Tensor] = []
    with torch.no_grad():
        actions = head.denoise(i["noise"], steps, pretrain, path)
        tuned = head.denoise(i["finetune_noise"], steps, finetune, finetune_path)
        five = head.denoise(i["finetune_noise"], 5, finetune)
    times = torch.tensor([step / steps for step in range(steps, 0, -1)], device=actions.device)
    return outputs(
        trajectory=torch.stack(path),
        actions=actions,
        finetune_actions=tuned,
        finetune_actions_5_steps=five,
        finetune_times=times.unsqueeze(1).expand(-1, len(actions)),
        finetune_trajectory_inputs=torch.stack(finetune_path[:-1]),
    )


def davit(golden: Golden, fast: FastPaths) -> dict[str, Tensor]:
    images = golden.inputs["pixel_values"]
    encoder = ImageEncoder(sizes.golden_vision(golden.config), golden.config["d"], fast)
    encoder.to(images.device).eval()
    load_weights(encoder, golden.part("vlm."))
    trace: dict[str, Tensor] = {}
    last = encoder.vision_tower(images, trace)
    trace["feature_map"] = last
    maps = {name: value.permute(0, 3, 1, 2) for name, value in trace.items()}
    return outputs(tokens=encoder.project(last), **maps)


def bart_encoder(golden: Golden, fast: FastPaths) -> dict[str, Tensor]:
    x, mask = golden.inputs["inputs_embeds"], golden.inputs["attention_mask"]
    model = LanguageModel(sizes.golden_language(golden.config), fast).to(x.device).eval()
    load_weights(model, golden.part("vlm.language_model."))
    encoder = model.model["encoder"]
    return outputs(
        token_embeddings=model.token_embeddings(golden.inputs["token_ids"]),
        after_embedding_norm=encoder.embed(x),
        after_layer0_no_mask=encoder.layers[0](encoder.embed(x)),
        encoded_all_ones_mask=model.encode(x, torch.ones_like(mask)),
        encoded_with_mask=model.encode(x, mask),
    )


def joined_model(golden: Golden, fast: FastPaths) -> tuple[Flower, Batch]:
    """Builds the whole tiny model and its batch in the form of [P]."""
    i = golden.inputs
    model = Flower(sizes.golden_joined(golden.config), fast)
    model.to(i["image_primary"].device).eval()
    load_weights(model, golden.weights)
    return model, Batch(
        images=i["image_primary"],
        input_ids=i["input_ids"],
        text_mask=i["text_attention_mask"],
        frequency_hz=i["frequency_hz"][:, 0],
        spaces=i["action_type"],
        actions=i["actions"],
        noise=i["noise"],
        t=i["t"],
        proprio=i["proprio"][:, 0],
    )


def joined(golden: Golden, fast: FastPaths) -> dict[str, Tensor]:
    i, steps = golden.inputs, golden.config["steps"]
    model, batch = joined_model(golden, fast)
    trace: dict[str, Tensor] = {}
    loss = model(batch, trace)
    loss.backward()
    grads = gradients(model, "grad")
    pair = batch._replace(
        images=torch.cat((i["image_primary"], i["image_second"]), 1),
        frequency_hz=torch.full_like(batch.frequency_hz, 3.0),
        spaces=EEF,
        actions=i["finetune_actions"],
        noise=i["finetune_noise"],
        t=i["finetune_t"],
        proprio=None,
    )
    with torch.no_grad():
        images = model.vlm.image_tokens(batch.images)
        merged = model.join(images, batch.input_ids)
        features, content = model.encode(batch)
        actions = model.act(batch, i["sample_noise"], steps)
        model.config = model.config.finetuning()
        model.cross_attention_mask = model.config.cross_attention_mask
        finetune_features, _ = model.encode(pair)
        finetune_loss = model(pair)
        finetune_actions = model.act(pair, i["finetune_sample_noise"], steps)
    return grads | outputs(
        image_tokens=images,
        merged_embeds=merged,
        encoder_mask=content,
        features=features,
        velocity=trace["velocity"],
        loss=loss,
        sampled_actions=actions,
        finetune_features=finetune_features,
        finetune_loss=finetune_loss,
        finetune_sampled_actions=finetune_actions,
    )


def adamw_steps(golden: Golden, fast: FastPaths) -> dict[str, Tensor]:
    c, prefix = golden.config, "param."
    params = {
        n.removeprefix(prefix): nn.Parameter(t.clone())
        for n, t in golden.inputs.items()
        if n.startswith(prefix)
    }
    if {n for n in params if decays(n)} != set(c["decay"]):
        raise ValueError(f"these parameters decay: {sorted(n for n in params if decays(n))}")
    groups = [
        {"params": [p for n, p in params.items() if decays(n) == wanted], "weight_decay": rate}
        for wanted, rate in ((True, c["weight_decay"]), (False, 0.0))
    ]
    for group in groups:
        group.update(lr=c["lr"], betas=tuple(c["betas"]))
    optimizer = adamw(groups, fused=fast.sdpa)
    ema = Ema(list(params.values()))
    result = {}
    for step, lr in enumerate(golden.inputs["lr"].tolist()):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in params.items():
            p.grad = golden.inputs[f"grad.{step}.{name}"].clone()
        optimizer.step()
        ema.update(step + 1)
        after = {f"param.{step + 1}.{name}": p.detach().clone() for name, p in params.items()}
        result |= outputs(**after)
    norm = clip(params.values(), 1.0)
    result |= outputs(clip_total_norm=norm)
    for average, (name, p) in zip(ema.average, params.items()):
        state = optimizer.state[p]
        result |= outputs(**{f"clipped_grad.{name}": p.grad, f"ema.{name}": average})
        result |= outputs(**{f"{m}.{name}": state[m] for m in ("exp_avg", "exp_avg_sq")})
    return result


CHECKS = {
    "flow_block": flow_block,
    "dit": dit,
    "flow_loss": flow_loss,
    "sampler": sampler,
    "davit": davit,
    "davit_small_image": davit,
    "bart_encoder": bart_encoder,
    "joined": joined,
    "adamw": adamw_steps,
}


# ---- beyond the files --------------------------------------------------------------------------


def precision_fault(golden: Golden, fast: FastPaths) -> str | None:
    """Checks that the two bf16 forms of the whole model give the golden loss within 2 %."""
    want = golden.wanted["output.loss"].item()
    model, batch = joined_model(golden, fast)
    with torch.no_grad():
        with torch.autocast(batch.images.device.type, torch.bfloat16):
            autocast = model(batch).item()
        MasterWeights(model)
        bf16 = model(batch).item()
    if max(abs(autocast / want - 1.0), abs(bf16 / want - 1.0)) <= 0.02:
        return None
    return f"loss {want:.5f} in f32, {autocast:.5f} under autocast, {bf16:.5f} with bf16 weights"


def flops_fault(golden: Golden) -> str | None:
    """Checks our own count of operations against that of PyTorch's counter."""
    ours, theirs = flops.compare(sizes.golden_joined(golden.config), text_len=9)
    return None if ours == theirs else f"{ours} FLOPs by our count, {theirs} by PyTorch's"


def main() -> int:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--golden", type=Path, default=root / "tests/golden")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), help="files to check")
    args = parser.parse_args()
    open_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    failed = False
    for name in args.only or CHECKS:
        for choice, fast in CHOICES.items():
            golden = Golden(args.golden / f"{name}.safetensors", args.device)
            faults, worst = golden.faults(CHECKS[name](golden, fast))
            if name == "joined":
                golden = Golden(args.golden / f"{name}.safetensors", args.device)
                faults += filter(None, [precision_fault(golden, fast)])
                faults += filter(None, [flops_fault(golden)])
            failed |= bool(faults)
            verdict = "MISS" if faults else "ok"
            count = len(golden.wanted)
            print(f"{name:<18} {choice:<20} {count:>4} tensors  {worst:.1e}  {verdict}")
            for fault in faults:
                print(f"    {fault}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
