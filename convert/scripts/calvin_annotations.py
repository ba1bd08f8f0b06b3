"""Writes the language annotations of a CALVIN folder as JSON, for `pollen data convert`.

    python calvin_annotations.py DATASET/training

reads lang_annotations/auto_lang_ann.npy, a pickle, and writes lang_annotations/auto_lang_ann.json
beside it: {"version": 1, "segments": [{"start": 3, "end": 66, "text": "...", "task": "..."}]}.
Frame numbers are those of the recording, ends inclusive. Needs NumPy only. A pickle can run code:
use this on files of a source that you trust.
"""

import json
import sys
from pathlib import Path

import numpy as np


def main():
    folder = Path(sys.argv[1]) / "lang_annotations"
    annotations = np.load(folder / "auto_lang_ann.npy", allow_pickle=True).item()
    language, spans = annotations["language"], annotations["info"]["indx"]
    segments = [{"start": int(start), "end": int(end), "text": str(text), "task": str(task)}
                for (start, end), text, task in zip(spans, language["ann"], language["task"],
                                                    strict=True)]
    out = folder / "auto_lang_ann.json"
    out.write_text(json.dumps({"version": 1, "segments": segments}, indent=1) + "\n")
    print(f"{out}: {len(segments)} segments")


if __name__ == "__main__":
    main()
