"""Record what every step kept, save it, and draw it.

python examples/trace_and_plot.py photo.jpg "What is on the table?"
"""

import sys
from pathlib import Path

import visionpulse as vp

MODEL = "Qwen/Qwen3-VL-4B-Instruct"


def main(model, processor, picture, question="What is in the picture?", folder=".", tokens=128):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ).to(model.device)  # fmt: skip
    with vp.patch(model, "10pct", record=True) as session:
        model.generate(**inputs, max_new_tokens=tokens)
        trace = session.trace
    path = Path(folder) / "trace.npz"
    trace.save(path)
    for row in list(vp.Trace.load(path))[:5]:
        print(f"step {row.step}: mass {row.mass:.3f}, kept {len(row.kept)} of {row.n_visual}")
    try:
        print(trace.plot(Path(folder) / "trace.png"))
    except ImportError as error:  # matplotlib is optional
        print(error)
    print(trace.to_html(Path(folder) / "trace.html"))
    return trace


if __name__ == "__main__":
    from transformers import AutoModelForImageTextToText, AutoProcessor

    main(
        AutoModelForImageTextToText.from_pretrained(MODEL, dtype="auto", device_map="auto"),
        AutoProcessor.from_pretrained(MODEL),
        *sys.argv[1:],
    )
