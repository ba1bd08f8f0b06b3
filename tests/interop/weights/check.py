"""Opens exports with the real safetensors and transformers packages.

    python tests/interop/weights/check.py DIR

DIR holds what `scripts/test-interop-weights.sh` made: `weights/` and `activations.safetensors` of the small
model, the exports `flower/`, `flower-bf16/` and `vlm/`, and `imported/`, made from `flower/`. Every
check prints its figure; the first that fails ends the script with status 1.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Florence2ForConditionalGeneration

TOLERANCE = 1e-5


def check(what, ok, figure):
    print(f"{'ok  ' if ok else 'FAIL'} {what}: {figure}")
    if not ok:
        sys.exit(1)


def sharded(folder):
    """Reads a folder by its index, as Hugging Face's readers do."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for name in sorted(set(index["weight_map"].values())):
        with safe_open(folder / name, framework="pt") as shard:
            assert shard.metadata()["format"] == "pt", name
            for key in shard.keys():
                assert index["weight_map"][key] == name, key
                tensors[key] = shard.get_tensor(key)
    assert set(tensors) == set(index["weight_map"])
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size == index["metadata"]["total_size"], (size, index["metadata"])
    return tensors


def relative(ours, theirs):
    """Largest difference, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def round_trips(folder, weights):
    flower = sharded(folder / "flower")
    same = all(torch.equal(flower[name], value) for name, value in weights.items())
    tied = "vlm.language_model.model.encoder.embed_tokens.weight"
    same &= torch.equal(flower[tied], weights["vlm.language_model.model.shared.weight"])
    check("flower export opens and holds the weights", same, f"{len(flower)} tensors, bit-equal")
    half = sharded(folder / "flower-bf16")
    same = all(torch.equal(half[name], value.bfloat16()) for name, value in weights.items())
    check("bf16 export is torch's own rounding", same, f"{len(half)} tensors, bit-equal")
    back = sharded(folder / "imported")
    same = set(back) == set(weights) and all(torch.equal(back[n], v) for n, v in weights.items())
    check("export and import give back the weights", same, f"{len(back)} tensors, bit-equal")


def activations(folder):
    """Runs transformers' Florence-2 on the exported encoder."""
    model, info = Florence2ForConditionalGeneration.from_pretrained(
        folder / "vlm", output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    model.eval()
    unexpected = set(info["unexpected_keys"]) - {"prompt_embeds"}
    strangers = [key for key in info["missing_keys"] if "decoder" not in key and key != "lm_head.weight"]
    check(
        "transformers finds every tensor of the encoder",
        not unexpected and not strangers and not info["mismatched_keys"],
        f"unexpected {sorted(unexpected)}, missing {strangers}",
    )
    ours = load_file(folder / "activations.safetensors")
    pixels = ours["input.images"]
    batch, cameras = pixels.shape[:2]
    with torch.no_grad():
        images = model.model.get_image_features(pixels.flatten(0, 1)).pooler_output
        images = images.reshape(batch, -1, images.shape[-1])
        error = relative(ours["output.image_tokens"], images)
        check("image tokens", error <= TOLERANCE, f"{error:.2e} relative, {cameras} cameras")
        prompt = sharded(folder / "vlm")["prompt_embeds"].expand(batch, 1, -1)
        text = model.get_input_embeddings()(ours["input.ids"].long())
        # Prompt vector, images, text: the order of the recipe.
        joined = torch.cat([prompt, images, text], dim=1)
        encoder = model.model.get_encoder()
        encoded = encoder(inputs_embeds=joined, attention_mask=ours["input.mask"].long())
        error = relative(ours["output.encoded"], encoded.last_hidden_state)
        check("encoded context", error <= TOLERANCE, f"{error:.2e} relative, {joined.shape[1]} tokens")
    return model


def saved_by_transformers(model, folder):
    """Writes what transformers makes of the encoder; the next import reads it."""
    model.save_pretrained(folder / "resaved")
    print("saved the encoder with transformers")


def pickled(folder, weights):
    """Writes a Lightning checkpoint whose averages are the weights plus one."""
    names = {f"agent.{name}": value for name, value in weights.items()}
    averages = [value + 1 for value in names.values()]
    checkpoint = {"state_dict": names, "callbacks": {"EMA": {"ema_weights": averages}}}
    torch.save(checkpoint, folder / "last.ckpt")


def main():
    folder = Path(sys.argv[1])
    weights = load_file(folder / "weights" / "model.safetensors")
    if sys.argv[2:] == ["--second"]:
        second(folder, weights)
        return
    round_trips(folder, weights)
    saved_by_transformers(activations(folder), folder)
    pickled(folder, weights)


def second(folder, weights):
    """Looks at what was imported from files that Python wrote."""
    encoder = {n: v for n, v in weights.items() if n.startswith("vlm.")}
    table = "vlm.language_model.model.shared.weight"
    back = sharded(folder / "resaved-imported")
    same = all(torch.equal(back[n], v) for n, v in encoder.items() if n != table)
    same &= torch.equal(back[table][:-1], encoder[table][:-1])
    mean = encoder[table][:-1].double().mean(0).float()
    error = relative(back["prompt_embeds"][0, 0], mean)
    check("what transformers saved imports to the same weights", same, f"{len(encoder)} tensors, bit-equal")
    check("prompt vector is the mean row", error < 1e-6, f"{error:.2e} relative")
    averages = load_file(folder / "averaged.safetensors")
    same = all(torch.equal(averages[f"agent.{n}"], v + 1) for n, v in weights.items())
    check("averaged weights of a Lightning checkpoint keep their names", same, f"{len(averages)} tensors, bit-equal")


if __name__ == "__main__":
    main()
