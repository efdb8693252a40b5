"""A task of lmms-eval with pictures drawn here: `python tests/lmms_eval_task.py FOLDER`."""

import io
import sys
from pathlib import Path

from visionpulse.data import tiny, trail

NAME = "glyph_trail"
SEED, COUNT = 5, 3
TASK = f"""task: {NAME}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: DATA
test_split: test
output_type: generate_until
doc_to_visual: !function glyph_trail_utils.visual
doc_to_text: !function glyph_trail_utils.text
doc_to_target: answer
process_results: !function glyph_trail_utils.judge
generation_kwargs:
  max_new_tokens: 64
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
import io

from PIL import Image


def visual(doc):
    return [Image.open(io.BytesIO(doc["picture"])).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def judge(doc, results):
    return {"exact": float(results[0].split() == doc["answer"].split())}
"""


def main(folder):
    """Write the task and its data in lmms-eval's format."""
    from datasets import Dataset
    from PIL import Image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for picture, question in trail.test_set(SEED, COUNT, tiny.SIDE, "crowded"):
        png = io.BytesIO()
        Image.fromarray(picture.pixels).save(png, "png")
        rows.append(
            {
                "picture": png.getvalue(),
                "question": " ".join(trail.words(question.prompt)),
                # the word that ends an answer is the end of a sequence, and is not in the text
                "answer": " ".join(trail.words(question.answer[:-1])),
            }
        )
    Dataset.from_list(rows).to_parquet(folder / "test.parquet")
    (folder / f"{NAME}.yaml").write_text(TASK.replace("DATA", str(folder / "test.parquet")))
    (folder / "glyph_trail_utils.py").write_text(UTILS)


if __name__ == "__main__":
    main(*sys.argv[1:])
