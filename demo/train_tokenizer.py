"""Trains the demo's tokenizer: byte-level BPE on the demo's own prompts.

    python train_tokenizer.py data tokenizer.json

The demo has two instructions, so the vocabulary is the 256 bytes, the four special tokens and the
few merges that these prompts yield; any other text still tokenises, byte by byte.
"""

import argparse
import json
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 320  # small, yet the demo's prompts fit into 50 ids
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in BART
PROMPT = "Agent Type: {arms}-arm {robot}, Action Space: {space},  Task Instruction: {task}"


def prompts(data):
    """The prompts of every dataset below `data`."""
    for root in sorted(path for path in data.iterdir() if path.is_dir()):
        names = json.loads((root / "meta/info.json").read_text())["features"]["action"]["names"]
        arms = len(names) // 7
        for task in pq.read_table(root / "meta/tasks.parquet")["task"].to_pylist():
            yield PROMPT.format(arms=arms, robot="Franka Panda", space="Delta End-Effector",
                                task=task)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    texts = list(prompts(arguments.data))
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=1, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() <= VOCABULARY
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids[0] == 0 and ids[-1] == 2 and 3 not in ids
        assert tokenizer.decode(ids) == text
        print(f"{len(ids)} ids: {text}")
    tokenizer.save(str(arguments.out), pretty=True)
    print(f"{tokenizer.get_vocab_size()} entries")


if __name__ == "__main__":
    main()
